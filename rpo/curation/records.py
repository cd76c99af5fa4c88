"""What passes between the stages of curation, what a component of each promises, and the whole history of a record.

A component gets a batch and answers item by item: with a result, or with a `Fault` that says what went wrong and keeps
what a model really said. What a model says is checked by pydantic, so that a wrong answer is counted and never guessed
at. A component that cannot work at all at the moment raises `Unavailable`, and nothing is recorded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from PIL.Image import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from rpo.curation.store.mark import STAGES, StageName
from rpo.curation.store.run import CurationRun
from rpo.curation.store.shard import Row, Shard
from rpo.data.pixels import decode_image
from rpo.errors import InputError
from rpo.files.text import encodable

RAW_LIMIT = 20_000
"""Characters that a fault keeps of what a model said."""

MAX_WORDS = 25
"""Words of one instruction at most: editors follow short ones."""

FaultKind = Literal["parse_error", "invalid", "raised", "empty"]
"""No JSON; JSON of another form; an exception; no answer at all."""

Verdict = Literal["first", "second", "tie"]
"""What a judge says of two images."""

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]


def _is_short_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise InputError("an instruction holds a line break; expected one line")
    if (words := len(text.split())) > MAX_WORDS:
        raise InputError(f"an instruction has {words} words; expected at most {MAX_WORDS}")
    return text


_Instruction = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(_is_short_line)
]


class Problem(BaseModel):
    """One thing in an image that does not fit its caption, or is badly drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: _Text
    """In plain words, as in "the circle is blue, not red"."""
    where: Annotated[str, StringConstraints(strip_whitespace=True, max_length=300)] = ""
    """Place in the image, as in "left"; empty for the whole image."""
    severity: Annotated[int, Field(ge=1, le=3)]
    """1 is a blemish, 3 contradicts the caption."""


class Critique(BaseModel):
    """What a critic says of one image and its caption."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problems: Annotated[tuple[Problem, ...], Field(max_length=20)]
    """The worst first; none if there is nothing to fix."""
    keep: tuple[_Text, ...] = ()
    """What is right and must stay as it is."""
    overall: Annotated[int, Field(ge=1, le=10)]
    """How well the image fits its caption; 10 is perfectly."""

    @property
    def nothing_to_fix(self) -> bool:
        """Whether the critic found no problem; the image is then not edited."""
        return not self.problems


class Instructions(BaseModel):
    """What an editor is to do to one image: at most three short, local changes, or nothing.

    Example:
        >>> Instructions(instructions=("make the circle red", "remove the star")).text
        'make the circle red; remove the star'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instructions: Annotated[tuple[_Instruction, ...], Field(max_length=3)]

    @property
    def text(self) -> str:
        """What the editor is told."""
        return "; ".join(self.instructions)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that an editor could do."""
        return not self.instructions


@dataclass(frozen=True)
class Fault:
    """Why a component has no result for one item.

    Example:
        >>> Fault("parse_error", "no JSON object in the answer", raw="The image is lovely.").kind
        'parse_error'
    """

    kind: FaultKind
    message: str
    raw: str = ""
    """What the model really said; a longer text is cut at `RAW_LIMIT` characters and says how long it was."""

    def __post_init__(self) -> None:
        """Cut what is too long to keep, and write out what no file can hold."""
        object.__setattr__(self, "message", encodable(self.message))
        object.__setattr__(self, "raw", encodable(self.raw))
        if len(self.raw) > RAW_LIMIT:
            note = f" … [cut: {len(self.raw)} characters in all]"
            object.__setattr__(self, "raw", self.raw[: RAW_LIMIT - len(note)] + note)


class Unavailable(RuntimeError):
    """A server or device cannot answer now: the run stops, and nothing is recorded for the items in flight."""


class Component(Protocol):
    """What all components say about themselves; one that cannot answer now raises `Unavailable`."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that decides the answers, such as kind, model, revision, sha256 of the prompt and decoding."""
        ...

    @property
    def batch_size(self) -> int:
        """How many items it wants at once."""
        ...

    @property
    def concurrency(self) -> int:
        """How many batches it takes at the same time, in threads; 1 if it is not thread safe."""
        ...


class Critic(Component, Protocol):
    """Says what is wrong with images."""

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Sequence[Critique | Fault]:
        """One critique per RGB image and its caption."""
        ...


class Instructor(Component, Protocol):
    """Turns critiques into what an editor can do."""

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], critiques: Sequence[Critique]
    ) -> Sequence[Instructions | Fault]:
        """The instructions for each image."""
        ...


class Editor(Component, Protocol):
    """Carries out instructions."""

    @property
    def licence(self) -> str:
        """Licence of the weights, which binds what is made with them; empty if unknown."""
        ...

    def __call__(
        self, images: Sequence[Image], instructions: Sequence[str], seeds: Sequence[int]
    ) -> Sequence[Image | Fault]:
        """The edited images, each of the size of its source; one generator per image, made of its seed."""
        ...


class Judge(Component, Protocol):
    """Says which of two images fits a caption better."""

    def __call__(
        self, first_images: Sequence[Image], second_images: Sequence[Image], captions: Sequence[str]
    ) -> Sequence[Verdict | Fault]:
        """One verdict per pair."""
        ...


NotEdited = Literal[
    "critique_fault", "nothing_to_fix", "instruction_fault", "no_instructions", "edit_fault", "score_fault"
]
Window = Literal["too_close", "too_far", "too_dissimilar", "too_similar"]
Undecidable = Literal["equal_scores", "got_worse", "small_margin", "not_good", "disagreement", "no_rule"]
Reason = Literal[NotEdited, Window, Undecidable]
"""Why a pair was not made: a fault of a stage; nothing to do; source and edit too much or too little alike; the scores
do not tell them apart, tell against the edit, by too little, of an image that is not good, or contradict each other;
nothing says which is better."""


@dataclass(frozen=True)
class Source:
    """The image that a record begins with."""

    id: str
    caption: str
    image: str
    """Its sha256."""
    order: int
    """Place in the plan."""
    origin: Mapping[str, str | int]
    """Where it comes from."""
    group: str
    """Id of the record that it is done together with, or its own."""
    side: str
    """"chosen" or "rejected" if it was a side of a pair, else empty."""
    look: str = ""
    """What it looks like, in 64 bits: see `rpo.curation.duplicates`."""

    @property
    def name(self) -> str:
        """What messages call the record."""
        return f"record {self.id} ({self.caption!r})"


@dataclass(frozen=True)
class Edit:
    """An edited image."""

    image: str
    """Its sha256."""
    seed: int
    others: Sequence[str] = ()
    """The sha256 of further ones by the same instruction."""


@dataclass(frozen=True)
class Scores:
    """What was found out about source and edit."""

    source: Mapping[str, float]
    """By each reward that filters."""
    edit: Mapping[str, float] | None
    distance: float | None
    """Mean absolute difference of the pixels, in [0, 1]."""
    similarity: float | None
    """Cosine of the embeddings of the similarity model, where one is asked."""
    evaluation: Mapping[str, float]
    """By the reward that evaluates: "source", and "edit" where there is one; never used for a decision."""
    others: Sequence[Mapping[str, float]] = ()
    """Of further edits, by each reward that filters."""


@dataclass(frozen=True)
class Outcome:
    """What became of two images, each called by its record and kind, as in "0123456789abcdef/edit"."""

    first: str
    second: str
    chosen: str = ""
    """The better one of the two; empty if they were dropped."""
    label: str = ""
    """Who says so: "reward:NAME", "given" for a pair that came with its label, "edit" by decree."""
    reason: Reason | None = None
    """Why they were dropped."""

    @property
    def rejected(self) -> str:
        """The worse one of the two; empty if they were dropped."""
        if not self.chosen:
            return ""
        return self.second if self.chosen == self.first else self.first


@dataclass(frozen=True)
class History:
    """Everything that is known of a record; None where a stage was not reached."""

    source: Source
    critique: Critique | Fault | None = None
    instructions: Instructions | Fault | None = None
    edit: Edit | Fault | None = None
    scores: Scores | Fault | None = None
    outcomes: tuple[Outcome, ...] | None = None
    """What was decided."""

    def image_of(self, kind: str) -> str | None:
        """The sha256 of "source", "edit", or "edit-1" and so on, if there is such an image."""
        if kind == "source":
            return self.source.image
        if not isinstance(self.edit, Edit):
            return None
        return self.edit.image if kind == "edit" else self.edit.others[int(kind.removeprefix("edit-")) - 1]

    @property
    def own_outcome(self) -> Outcome | None:
        """What became of the edit and its source; None if that is not decided yet."""
        names = {f"{self.source.id}/source", f"{self.source.id}/edit"}
        return next((one for one in self.outcomes or () if {one.first, one.second} == names), None)


def fault_in(row: Row) -> Fault | None:
    """The fault that a row records, if it does."""
    found: Any = row.get("fault")
    return Fault(**found) if found else None


def read_row(stage: StageName, row: Row) -> Any:
    """What a row of a stage records: the stage's result, or a fault."""
    return fault_in(row) or _READ[stage](**row)


_READ: dict[StageName, Callable[..., Any]] = {
    "critiques": lambda critique: Critique.model_validate(critique),
    "instructions": Instructions,
    "edits": Edit,
    "scores": Scores,
    "decisions": lambda outcomes: tuple(Outcome(**one) for one in outcomes),
}


def source_in(shard: Shard, record: str) -> Source:
    """The image that a record of a shard begins with."""
    return Source(id=record, **shard.rows["sources"][record])


def result_of(shard: Shard, stage: StageName, record: str) -> Any:
    """What a later stage has found out about a record: a result, a fault, or None."""
    row = shard.rows[stage].get(record)
    return None if row is None else read_row(stage, row)


def history_of(shard: Shard, record: str) -> History:
    """What the stages have found out about one record of a shard."""
    return History(source_in(shard, record), *(result_of(shard, stage, record) for stage in STAGES[1:]))


def histories(run: CurationRun) -> Iterator[History]:
    """All records that are sealed, in the order of the plan."""
    return (history_of(shard, record) for shard in run.shards() for record in shard.ids)


def encoded_of(run: CurationRun, history: History, kind: str) -> bytes:
    """The encoded "source", "edit", or "edit-1" and so on of a record, which has such an image."""
    digest, source = history.image_of(kind), history.source
    assert digest is not None
    return run.image_bytes(digest, source.order, source.name)


def image_of(run: CurationRun, history: History, kind: str) -> Image:
    """The pixels of the same."""
    return decode_image(encoded_of(run, history, kind), f"{history.source.name}: the {kind}").image
