"""What a model wrote → a checked value, or a fault that says why not; and answers on disk, to ask once only.

Nothing is repaired and nothing is guessed.

A model asked for JSON writes it plain, in a code fence, after a chain of thought, or between sentences. So the one JSON
object in the text is looked for; two different ones, one that is broken or cut, and one that says a key twice are
faults, and the object found must satisfy the type as it stands: "3" is no number, and a missing field is missing.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any, TypeVar, final

from pydantic import BaseModel, ValidationError

from rpo.curation.records import Fault
from rpo.curation.store.address import Store
from rpo.curation.vlm.chat import Question, Reply
from rpo.errors import InputError

Answer = TypeVar("Answer", bound=BaseModel)

ANSWER_LIMIT = 100_000
"""Characters of an answer that is still looked into; a whole critique has a few thousand."""

_OBJECT_START = re.compile(r'\{\s*["}]')  # a brace of prose is followed by something else
_MAX_ERRORS = 3


def understand(reply: Reply, model: type[Answer]) -> Answer | Fault:
    """The value that a reply holds, or what is wrong with it.

    Example:
        >>> from rpo.curation.records import Instructions
        >>> understand(Reply('Sure! {"instructions": ["add a tree"]}'), Instructions).text
        'add a tree'
    """
    if reply.refusal:
        return Fault("invalid", f"the model refused to answer: {reply.refusal[:200]}", raw=reply.refusal)
    value = read_answer(reply.text, model)
    if isinstance(value, Fault) and reply.is_cut:
        return Fault(value.kind, f"{value.message}; the answer was cut: raise max_tokens", raw=reply.text)
    return value


def read_answer(text: str, model: type[Answer]) -> Answer | Fault:
    """The value of the one JSON object in a text, or what is wrong with it."""
    if not text.strip():
        return Fault("empty", "the answer is empty; expected a JSON object", raw=text)
    if len(text) > ANSWER_LIMIT:
        message = f"the answer has {len(text)} characters; expected a JSON object within {ANSWER_LIMIT}"
        return Fault("parse_error", message, raw=text)
    try:
        found = _the_object(_without_thoughts(text))
    except (ValueError, RecursionError) as error:
        return Fault("parse_error", str(error), raw=text)
    try:
        return model.model_validate_json(found, strict=True)
    except ValidationError as error:
        return Fault("invalid", _in_words(error), raw=text)


def answer_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a type in the form that servers enforce: every field is required and none other allowed."""
    schema = _strict(model.model_json_schema())
    assert isinstance(schema, dict)
    return schema


def _strict(node: object) -> object:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(value) for key, value in node.items() if key != "default"}
    if node.get("type") == "object":
        strict |= {"required": list(node.get("properties", {})), "additionalProperties": False}
    return strict


def _without_thoughts(text: str) -> str:
    """What a reasoning model says after its thoughts; nothing if these have no end."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _the_object(text: str) -> str:
    """The text of the only JSON object, or of the first where all are the same."""
    decoder = json.JSONDecoder(object_pairs_hook=_unambiguous, parse_constant=_refuse_constant)
    found: dict[str, str] = {}
    start = _OBJECT_START.search(text)
    while start:
        try:
            value, end = decoder.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            raise InputError(f"the JSON object in the answer is broken or cut: {error}") from error
        except RecursionError as error:
            raise InputError("the JSON object in the answer is nested too deeply to be read") from error
        found.setdefault(json.dumps(value, sort_keys=True), text[start.start() : end])
        start = _OBJECT_START.search(text, end)
    if len(found) != 1:
        number = f"{len(found)} different JSON objects" if found else "no JSON object"
        raise InputError(f"there is {number} in the answer; expected one")
    return next(iter(found.values()))


def _unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of which no key comes twice; Python itself would silently take the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise InputError(f"a JSON object in the answer says a key twice, among {sorted(value)}; expected each once")
    return value


def _refuse_constant(name: str) -> object:
    raise InputError(f"the answer holds {name}, which is no JSON; expected numbers")


def _in_words(error: ValidationError) -> str:
    """The first few things that do not fit the type, each with its place."""
    problems = [
        f"{'.'.join(map(str, one['loc'])) or 'the answer'}: {one['msg']} (got {str(one['input'])[:80]!r})"
        for one in error.errors(include_url=False)
    ]
    more = f"; and {len(problems) - _MAX_ERRORS} more" if len(problems) > _MAX_ERRORS else ""
    return f"the answer is not of the form asked for: {'; '.join(problems[:_MAX_ERRORS])}{more}"


@final
class AnswerCache:
    """Replies that were paid for, kept in a run so that no question is asked twice, whatever becomes of a worker.

        answers/0000017/<sha256>.json    of a shard in work, each by the sha256 of everything that decides it
        answers/0000017.jsonl            of a sealed shard, packed

    Whatever is asked within `of` a place belongs there. What cannot be read (a power cut) counts as absent.
    """

    def __init__(self, store: Store | None) -> None:
        """Keep replies in a run; None keeps nothing."""
        self._store, self._lock = store, threading.Lock()
        self._known: dict[str, dict[str, Reply]] = {}

    @contextmanager
    def of(self, place: str) -> Iterator[None]:
        """Inside, in this thread, questions are asked for a place: a shard, or an audit."""
        token = _PLACE.set(place)
        try:
            yield
        finally:
            _PLACE.reset(token)

    def load(self, asked: Mapping[str, str], question: Question) -> Reply | None:
        """What was answered, if the question was asked before.

        Args:
            asked: The model and its settings.
        """
        if self._store is None:
            return None
        return self._of(self._store, _PLACE.get()).get(_digest(asked, question))

    def save(self, asked: Mapping[str, str], question: Question, reply: Reply) -> None:
        """Keep an answer, at once."""
        if self._store is None:
            return
        place, digest = _PLACE.get(), _digest(asked, question)
        with self._lock:
            self._store.write(f"{ANSWERS}/{place}/{digest}.json", _line(asdict(reply)))
        self._of(self._store, place)[digest] = reply

    def pack(self, place: str) -> None:
        """Put all answers of a place into one file; nothing more is asked there."""
        if self._store is None or place not in self._known:  # nobody has asked there
            return
        if loose := self._store.names(f"{ANSWERS}/{place}"):
            lines = [_line({"question": digest, **asdict(one)}) for digest, one in self._of(self._store, place).items()]
            self._store.write(f"{ANSWERS}/{place}.jsonl", b"".join(lines))
            for name in loose:
                self._store.remove(f"{ANSWERS}/{place}/{name}")
            self._store.sweep(f"{ANSWERS}/{place}")
            self._store.remove_if_empty(f"{ANSWERS}/{place}")
        with self._lock:
            self._known.pop(place, None)

    def _of(self, store: Store, place: str) -> dict[str, Reply]:
        """The answers of a place."""
        with self._lock:
            if place not in self._known:
                self._known[place] = dict(_read(store, place))
            return self._known[place]


_PLACE = ContextVar("place", default="other")
ANSWERS = "answers"


def _read(store: Store, place: str) -> Iterator[tuple[str, Reply]]:
    packed = store.read_all([f"{ANSWERS}/{place}.jsonl"]).values()
    loose = store.read_all([f"{ANSWERS}/{place}/{name}" for name in store.names(f"{ANSWERS}/{place}")])
    for line in (line for data in packed for line in data.split(b"\n")):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            found = json.loads(line)
            yield found.pop("question"), Reply(**found)
    for name, data in loose.items():
        with suppress(ValueError, TypeError, RecursionError):
            yield name.rpartition("/")[2].removesuffix(".json"), Reply(**json.loads(data))


def _line(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _digest(asked: Mapping[str, str], question: Question) -> str:
    digest = hashlib.sha256(json.dumps(dict(asked), sort_keys=True).encode())
    # Pixels and not the bytes of a file: the same image may be compressed in many ways.
    for image in question.images:
        digest.update(f"\0{image.mode}{image.size}\0".encode() + image.tobytes())
    schema = question.answer.model_json_schema() if question.answer else None
    digest.update(f"\0{json.dumps(schema, sort_keys=True)}\0{question.text}".encode())
    return digest.hexdigest()
