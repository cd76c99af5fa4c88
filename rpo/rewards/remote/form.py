"""What goes over the wire: images, prompts and what is known of them there; scores and failures back.

    GET  /health    {"status": "ok", "rewards": {NAME: {"asked": images, "failed": images}}}
    GET  /rewards   {"rewards": [NAME, …], "rpo": {"form": 1, "max_bytes": …, "files": …, "details": {NAME: {…}}}}
    GET  /version/… {"version": what two scores of one name can be held against each other by}
    POST /score     {"reward": NAME, "images": [PNG in base64, …], "prompts": [text, …], "metadata": [{…}, …]}
                    with "files": [path, …] in the place of "images", where both see the same folder
      answer        {"scores": [number or null, …], "failures": [null or why, …], "info": {name: number}}
    anything else   a status from 400 on, {"detail": what was wrong}

Images are 8-bit PNG, as a person would see them. A score that is null is one that could not be judged; NaN is no JSON
and is refused on either side.
"""

import base64
import binascii
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rpo.data.pixels import decode_image, upright_size
from rpo.errors import InputError

FORM = 1
"""Number of the form above; another one is not understood."""

MAX_BYTES = 256 * 2**20
"""Of a request, unless the server is told otherwise: 64 images of 1024 × 1024 pixels fit."""

MAX_ANSWER_BYTES = 4 * 2**20
"""Of an answer, which has a number and perhaps a sentence for each image."""

MAX_PIXELS = 2**26
"""Of one image, 8192 × 8192: a small file may unfold to a huge one."""

MAX_PIXELS_AT_ONCE = 2**28
"""Of all images of a request: 64 of 2048 × 2048."""

TOKEN_VARIABLE = "RPO_REWARD_TOKEN"  # noqa: S105 - the name of a variable
"""Where server and client find the token, if there is one."""

VERSIONS = "/version/"
"""Before the name of a reward."""

Pixels = NDArray[np.uint8]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Model = TypeVar("Model", bound=BaseModel)


class WireError(InputError):
    """What came over the wire is not what was agreed on; the status is what a server answers it with."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        """Say what is wrong."""
        super().__init__(message)
        self.status = status


class Asked(BaseModel):
    """A question: one reward about some images."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reward: str
    images: list[str] | None = None
    files: list[str] | None = None
    prompts: list[str]
    metadata: list[Any]


class Said(BaseModel):
    """Its answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    scores: list[Number | None]
    failures: list[str | None]
    info: dict[str, Number]


class Version(BaseModel):
    """What a reward is, as `rpo.rewards.version` tells it."""

    version: str


class Details(BaseModel):
    """What a server says of itself, beside the names of its rewards."""

    form: int
    max_bytes: int
    files: str | None
    details: dict[str, dict[str, Any]]


class Listed(BaseModel):
    """The answer to GET /rewards; only rpo's own server has the second part."""

    rewards: list[str]
    rpo: Details | None = None


def token() -> str:
    """What the environment has for one; empty if nothing. A wrong one is told without a letter of it."""
    found = os.environ.get(TOKEN_VARIABLE, "")
    if not found.isascii() or not found.isprintable() or " " in found:
        raise InputError(
            f"{TOKEN_VARIABLE} has a blank, the end of a line or a letter beyond ASCII, which no header can hold; "
            "expected letters, digits and signs alone; set another one, here and there"
        )
    return found


def read_json(body: bytes) -> Any:
    """The value in a body, which is JSON and nothing more: no NaN, no bytes that are no text."""

    def refused(name: str) -> Any:
        raise WireError(f"it has the number {name}, which JSON does not; expected null where a score failed")

    def finite(digits: str) -> float:
        return number if math.isfinite(number := float(digits)) else refused(digits[:20])

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refused, parse_float=finite)
    except WireError:
        raise
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError of its own
        raise WireError(f"it is no JSON ({error}), but {beginning(body)}; expected an object of JSON") from error


def read_as(model: type[Model], value: Any) -> Model:
    """A value of JSON as one of the forms above; the error says where it is another."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise WireError(f"{place} is wrong: {first['msg']}; expected the form of rpo.rewards.remote.form") from error


def written(value: BaseModel | Mapping[str, Any]) -> bytes:
    """The body that holds a value."""
    plain = value.model_dump() if isinstance(value, BaseModel) else value
    return json.dumps(plain, allow_nan=False).encode()


def beginning(body: bytes) -> str:
    """How a body begins, for a message."""
    text = " ".join(body[:200].decode("utf-8", errors="replace").split())
    return f"{text!r}{' …' if len(body) > 200 else ''}" if text else "nothing"  # noqa: PLR2004


def to_base64(data: bytes) -> str:
    """Bytes as JSON can hold them."""
    return base64.b64encode(data).decode("ascii")


def images_of(asked: Asked, folder: Path | None) -> list[Pixels]:
    """The images of a question, one per prompt.

    Args:
        folder: The one that files may lie in; None where none may be named.
    """
    given = asked.images if asked.files is None else asked.files
    if given is None or (asked.images is not None and asked.files is not None):
        raise WireError("the question has to have images or files; expected one of the two")
    if not len(given) == len(asked.prompts) == len(asked.metadata) or not given:
        raise WireError(
            f"{len(given)} images come with {len(asked.prompts)} prompts and {len(asked.metadata)} metadata; expected "
            "at least one image, with one of each"
        )
    names = [f"image {number}" for number in range(len(given))]
    if asked.files is None:
        return every_pixels((name, from_base64(text, name)) for name, text in zip(names, given, strict=True))
    return every_pixels((name, _in_folder(path, folder)) for name, path in zip(names, given, strict=True))


def from_base64(text: str, name: str) -> bytes:
    """The bytes that JSON holds so."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"{name} is no base64 ({error}); expected an image file, encoded") from error


def every_pixels(files: Iterable[tuple[str, bytes]]) -> list[Pixels]:
    """The pixels of image files with their names, as a viewer shows them; no more than there is room for."""
    found, room = list[Pixels](), MAX_PIXELS_AT_ONCE
    for name, data in files:
        found.append(_pixels_of(data, name, room))
        room -= found[-1][..., 0].size
    return found


def _pixels_of(data: bytes, name: str, room: int) -> Pixels:
    try:
        width, height = upright_size(data, name)
        if width * height > MAX_PIXELS:
            raise InputError(f"{name} has {width} × {height} pixels; expected {MAX_PIXELS:,} at most; shrink it")
        if width * height > room:
            raise WireError(
                f"the images up to {name} have more than {MAX_PIXELS_AT_ONCE:,} pixels; ask about fewer at once",
                status=413,
            )
        return np.asarray(decode_image(data, name).image)
    except WireError:
        raise
    except InputError as error:
        raise WireError(str(error)) from error


def _in_folder(path: str, folder: Path | None) -> bytes:
    if folder is None:
        raise WireError("images are named by their files, which this server does not read; send them", status=403)
    try:
        place = Path(path).resolve()  # of what lies elsewhere not even whether it is there is told
        if not place.is_relative_to(folder.resolve()):
            raise WireError(f"the file {path!r} is not in {folder}, where images may be read; put it there", status=403)
        if not place.is_file():  # a pipe would be waited for
            raise WireError(f"there is no file {path!r} here; expected an image in {folder}")
        return place.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"the file {path!r} cannot be read here ({error}); expected an image in {folder}") from error


def same_length(what: Sequence[Any], count: int, name: str) -> None:
    """Refuse an answer that does not have one of something for each image."""
    if len(what) != count:
        raise WireError(f"it has {len(what)} {name} for {count} images; expected one for each, in their order")
