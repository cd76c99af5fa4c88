"""A reward that is computed elsewhere: `http://HOST:PORT/NAME`, of `rpo serve-rewards` or of a UniRL reward service.

The address is all there is to set. What stands behind a `?` in it:

    seconds     for one request, 300                       batch    images of one request, 64
    patience    from the first try of a question, 300      files    a folder of both machines that images are laid in
    score       which of several numbers counts, of a UniRL service

A token is taken from RPO_REWARD_TOKEN. Images travel as 8-bit PNG, so that a reward may differ in its last digits from
what it says in the same process. A score that failed is NaN, with the server's reason; anything else that is not what
was asked for ends the run: nothing is guessed, and it resumes where it was.
"""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from rpo.data.pixels import to_pixels
from rpo.data.preference import encode_png
from rpo.errors import InputError
from rpo.plugins import in_words, nearest
from rpo.rewards.answers import FAILURE, RewardError
from rpo.rewards.remote import form, unirl
from rpo.rewards.remote.exchange import OK, Bounds, HttpAnswer, Place, asked
from rpo.rewards.remote.form import WireError
from rpo.types import Images

SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Options:
    """What stands behind the "?" of an address."""

    seconds: float = 300.0
    patience: float = 300.0
    batch: int = 64
    files: str = ""
    score: str = ""


@dataclass(frozen=True)
class Address:
    """Where a reward is asked for."""

    place: Place
    name: str
    options: Options

    @property
    def short(self) -> str:
        """What it is, wherever it is."""
        return f"http:{self.name}" + (f".{self.options.score}" if self.options.score else "")

    @property
    def told(self) -> str:
        """For messages."""
        return f"the reward server at {self.place}, asked for {self.name!r},"


def address_of(text: str) -> Address:
    """Take an address apart.

    Raises:
        InputError: It is none, or has an option that there is not.

    Example:
        >>> address_of("http://127.0.0.1:8765/ocr?seconds=60").options.seconds
        60.0
    """
    try:
        parts = urlsplit(text)
        port, options = parts.port, parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise InputError(
            f"reward {text!r} is no address ({error}); expected http://HOST:PORT/NAME?seconds=60; write it so"
        ) from error
    name = unquote(parts.path.lstrip("/"))
    if parts.scheme not in SCHEMES or not parts.hostname or not name or parts.fragment:
        raise InputError(
            f"reward {text!r} is no address of a reward; expected http://HOST:PORT/NAME; give the name of what "
            "is served there, as `rpo serve-rewards` prints it"
        )
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"the address of reward {name!r} has a name or password before its host, which would be written into every "
            f"log; give a token in the environment variable {form.TOKEN_VARIABLE}"
        )
    place = Place(parts.hostname, port, parts.scheme == "https")
    return Address(place, name, _options(options, text))


def _options(given: Sequence[tuple[str, str]], text: str) -> Options:
    known = {one.name: type(one.default) for one in fields(Options)}
    found = dict[str, Any]()
    for name, value in given:
        if name not in known:
            raise InputError(
                f"reward {text!r} has {name!r} behind its '?'; expected {', '.join(known)}"
                f"{in_words(nearest(name, known))}"
            )
        try:
            found[name] = known[name](value)
            is_sound = isinstance(found[name], str) or (math.isfinite(found[name]) and found[name] > 0)
        except ValueError:
            is_sound = False
        if not is_sound or value == "":
            kind = "a text" if known[name] is str else f"a number ({known[name].__name__}) above 0"
            raise InputError(f"reward {text!r} has {name}={value!r}; expected {kind}; give one, or leave it out")
    return Options(**found)


@final
class RemoteReward:
    """Asks a server what images are worth.

    Example:
        >>> RemoteReward("http://127.0.0.1:8765/ocr")
        RemoteReward('http://127.0.0.1:8765/ocr')
    """

    is_differentiable = False

    def __init__(self, address: str) -> None:
        """Take the address; nothing is asked yet."""
        self.source = address
        self._address = address_of(address)
        self._listed: form.Listed | None = None

    def __repr__(self) -> str:
        """Where it is, as it would be written."""
        return f"RemoteReward({self.source!r})"

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[list[float], dict[str, Any]]:
        """Ask about some images at a time.

        Returns:
            Scores, NaN where one failed, and what else the server says; why a score failed is under `FAILURE`.

        Raises:
            RewardError: What came back is not an answer, or nothing came.
        """
        files = [encode_png(pixels) for pixels in to_pixels(images.detach().float())]
        scores, told = list[float](), list[dict[str, list[Any]]]()
        for start in range(0, len(files), self._address.options.batch):
            part = slice(start, start + self._address.options.batch)
            said = self._ask(files[part], prompts[part], metadata[part])
            scores += [math.nan if score is None else score for score in said.scores]
            told.append(
                {name: [mean] * len(said.scores) for name, mean in said.info.items()} | {FAILURE: said.failures}
            )
        names = dict.fromkeys(name for one in told for name in one)
        return scores, {
            name: [value for one in told for value in one.get(name, [math.nan] * len(one[FAILURE]))] for name in names
        }

    def version(self) -> str:
        """What the server says of it; nothing is known of that of a UniRL service."""
        if self._server().rpo is None:
            return "unknown, of a UniRL service"
        try:
            path = form.VERSIONS + quote(self._address.name, safe="")
            return form.read_as(form.Version, self._send(path, None)).version
        except WireError as error:
            raise RewardError(f"{self._address.told} {error}; nothing was taken of it") from error

    def _ask(self, files: list[bytes], prompts: Sequence[str], metadata: Sequence[Any]) -> form.Said:
        address = self._address
        listed = self._server()
        try:
            if listed.rpo is None:
                asks_files = bool(address.options.files)
                batch = unirl.question(address.name, files, prompts, metadata, asks_files=asks_files)
                answer = self._send("/score", form.written(batch))
                return unirl.answer(answer, address.name, address.options.score, len(files))
            if address.options.score:
                raise WireError("answers with one number for each image; leave ?score=… out")
            with ExitStack() as stack:
                given = _given(files, address.options.files, stack)
                question = form.Asked(reward=address.name, prompts=list(prompts), metadata=list(metadata), **given)
                body = form.written(question)
                if len(body) > listed.rpo.max_bytes:
                    raise WireError(
                        f"takes {listed.rpo.max_bytes:,} bytes, and {len(files)} images make {len(body):,}; ask for "
                        "fewer at once (?batch=…), or start it with a larger --max-request"
                    )
                return _checked(form.read_as(form.Said, self._send("/score", body)), len(files))
        except WireError as error:
            raise RewardError(f"{address.told} {error}; nothing was taken of it") from error

    def _server(self) -> form.Listed:
        """What the server has, asked once."""
        if self._listed is not None:
            return self._listed
        address = self._address
        try:
            listed = form.read_as(form.Listed, self._send("/rewards", None))
        except WireError as error:
            raise RewardError(f"{address.told} {error}; see that a reward server listens there") from error
        if listed.rpo is not None and listed.rpo.form != form.FORM:
            raise RewardError(
                f"{address.told} speaks form {listed.rpo.form}; expected {form.FORM}; run the same rpo on either side"
            )
        if address.name not in listed.rewards:
            near = f"; the nearest is {nearest(address.name, listed.rewards)!r}" if listed.rewards else ""
            raise RewardError(f"{address.told} has no such reward; expected one of {', '.join(listed.rewards)}{near}")
        self._listed = listed
        return listed

    def _send(self, path: str, body: bytes | None) -> Any:
        """The JSON that is answered."""
        address, token = self._address, form.token()
        options = address.options
        headers = {"Accept": "application/json", **({} if body is None else {"Content-Type": "application/json"})}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        bounds = Bounds(options.seconds, options.patience, form.MAX_ANSWER_BYTES)
        answer = asked(address.place, path, body, headers, bounds, who=address.told)
        if answer.status != OK:
            reason = _reason(answer)
            told = reason.replace(token, "[token]") if token else reason
            raise WireError(f"refuses with status {answer.status}: {told}")
        if answer.kind != "application/json":
            raise WireError(f"answered with {answer.kind} and not with JSON: {form.beginning(answer.body)}")
        try:
            return form.read_json(answer.body)
        except WireError as error:
            raise WireError(f"answered what is wrong: {error}") from error


def _reason(answer: HttpAnswer) -> str:
    try:
        told = form.read_json(answer.body)
    except WireError:
        return form.beginning(answer.body)
    return str(told.get("detail", told) if isinstance(told, dict) else told)[:1000]


def _given(files: list[bytes], folder: str, stack: ExitStack) -> dict[str, list[str]]:
    if not folder:
        return {"images": [form.to_base64(data) for data in files]}
    try:
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rpo-reward-", dir=folder)))
        own.chmod(0o755)  # the server may be another user's
        for number, data in enumerate(files):
            (own / f"{number}.png").write_bytes(data)
    except OSError as error:
        raise RewardError(
            f"images cannot be laid into {folder!r} ({error}); expected a folder that the server reads, too; give it "
            "as ?files=…, or leave that out"
        ) from error
    return {"files": [str(own / f"{number}.png") for number in range(len(files))]}


def _checked(said: form.Said, count: int) -> form.Said:
    form.same_length(said.scores, count, "scores")
    form.same_length(said.failures, count, "failures")
    for number, (score, why) in enumerate(zip(said.scores, said.failures, strict=True)):
        if why and score is not None:
            raise WireError(f"says that image {number} failed ({why[:200]}) and gives it the score {score:g}")
    return said
