"""The form of the public UniRL reward service (Tencent-Hunyuan/UniRL, unirl-reward-service, protocol version 1).

    GET  /rewards   {"rewards": [NAME, …]}
    POST /score     {"requests": [{"history": [{"text": prompt, "image_b64": file}], "required_rewards": [NAME, …],
                                   "metadata": {…} or null}, …]}
      answer        {"results": [{NAME: {part: number}}, …], "errors": [{NAME: why}, …], "identities": […]}

As there, the last turn of a history is what is judged, any image file will do, and a reward that failed is missing in
`results` and has its reason in `errors`. Videos, tensors in shared GPU memory, gradients and pinned versions of a
scorer are refused. A reward may answer with several numbers; which of them counts has to be said (`?score=…`). A number
that is null failed, as pydantic writes a NaN so.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from rpo.rewards.remote import form
from rpo.rewards.remote.form import Number, WireError

VERSION = "1"
IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "scorer_version", "idempotency_key")
"""What a client may say of a request, to find it again in the answer; no version of a scorer can be named here."""


class Turn(BaseModel):
    """One text and its image."""

    text: str
    image_b64: str | None = None


class Request(BaseModel):
    """One image that several rewards are asked about."""

    model_config = ConfigDict(extra="allow")

    history: list[Turn]
    required_rewards: list[str]
    metadata: dict[str, Any] | None = None
    scorer_version: str | None = None


class Batch(BaseModel):
    """What is posted."""

    protocol_version: str = VERSION
    requests: list[Request]
    grad_mode: bool = False


class Results(BaseModel):
    """What is answered."""

    results: list[dict[str, dict[str, Number | None]]]
    errors: list[dict[str, str]] = []


def is_batch(value: Any) -> bool:
    """Whether a question has this form."""
    return isinstance(value, dict) and "requests" in value


def read_batch(value: Any) -> Batch:
    """The question in a body."""
    batch = form.read_as(Batch, value)
    if batch.protocol_version != VERSION or batch.grad_mode:
        raise WireError(
            f"protocol_version is {batch.protocol_version!r} and grad_mode {batch.grad_mode}; expected version "
            f"{VERSION} without gradients"
        )
    for number, one in enumerate(batch.requests):
        if one.scorer_version is not None:
            raise WireError(f"requests.{number} wants scorer_version {one.scorer_version!r}; leave it out")
        if not one.history or one.history[-1].image_b64 is None:
            raise WireError(f"requests.{number} has no image_b64 in its last turn; expected an image file in base64")
    return batch


def images_of(batch: Batch) -> list[form.Pixels]:
    """What is judged, one image of each request."""
    files = (
        (f"the image of requests.{number}", one.history[-1].image_b64) for number, one in enumerate(batch.requests)
    )
    return form.every_pixels((name, form.from_base64(text or "", name)) for name, text in files)


def written(batch: Batch, scores: Sequence[dict[str, float]], errors: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The answer: of each request its scores and its failures, by reward."""
    identities = [
        {name: (one.model_extra or {}).get(name) if name != "scorer_version" else None for name in IDENTITY}
        for one in batch.requests
    ]
    results = [{name: {name: score} for name, score in one.items()} for one in scores]
    return {"results": results, "errors": list(errors), "identities": identities, "protocol_version": VERSION}


def question(
    name: str, files: Sequence[bytes], prompts: Sequence[str], metadata: Sequence[Any], *, asks_files: bool
) -> dict[str, Any]:
    """What to post to a service of this form."""
    if asks_files:
        raise WireError("is a UniRL service, which reads no image by its path; leave ?files=… out")
    strange = [known for known in metadata if not isinstance(known, dict)]
    if strange:
        raise WireError(f"is a UniRL service, which takes metadata as an object, not {strange[0]!r}; name its parts")
    return {
        "protocol_version": VERSION,
        "requests": [
            {
                "history": [{"text": prompt, "image_b64": form.to_base64(data)}],
                "required_rewards": [name],
                "metadata": known or None,
            }
            for data, prompt, known in zip(files, prompts, metadata, strict=True)
        ],
    }


def answer(value: Any, name: str, part: str, count: int) -> form.Said:
    """What such a service says, in our form."""
    found = form.read_as(Results, value)
    form.same_length(found.results, count, "results")
    errors = found.errors or [{} for _ in range(count)]
    form.same_length(errors, count, "errors")
    said = [_one(result, why, name, part, n) for n, (result, why) in enumerate(zip(found.results, errors, strict=True))]
    return form.Said(scores=[score for score, _ in said], failures=[why for _, why in said], info={})


def _one(
    result: dict[str, dict[str, float | None]], errors: dict[str, str], name: str, part: str, number: int
) -> tuple[float | None, str | None]:
    if name in errors and name not in result:
        return None, errors[name]
    numbers = result.get(name)
    if not numbers or name in errors:
        raise WireError(f"says neither a score of {name!r} nor why it failed, or both, for image {number}")
    if not part and len(numbers) > 1:
        raise WireError(f"answers with {', '.join(numbers)}; say which of them counts: ?score={next(iter(numbers))}")
    wanted = part or next(iter(numbers))
    if wanted not in numbers:
        raise WireError(f"has no {wanted!r} in its answer; expected one of {', '.join(numbers)}; name it by ?score=…")
    score = numbers[wanted]
    return score, None if score is not None else "it answered null"
