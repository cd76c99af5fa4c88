"""A vision-language model as one question and its answer, whether it runs behind a server or on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image
from pydantic import BaseModel

from rpo.curation.records import Component, Fault
from rpo.files.text import encodable


@dataclass(frozen=True)
class Question:
    """Images, a text that speaks of them, and the type of answer that the model is held to, if it can be held."""

    text: str
    images: tuple[Image, ...]
    answer: type[BaseModel] | None = None


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    refusal: str = ""
    """Why it would not answer, where the server tells that apart."""
    is_cut: bool = False
    """Whether the answer ended because it had become too long."""
    first_tokens: Mapping[str, float] | None = None
    """The likeliest first tokens of the answer and how likely each was, where that was asked for and told."""

    def __post_init__(self) -> None:
        """Write out what no file can hold."""
        object.__setattr__(self, "text", encodable(self.text))
        object.__setattr__(self, "refusal", encodable(self.refusal))


class Chat(Component, Protocol):
    """Something that answers questions about images."""

    @property
    def is_held_to_schema(self) -> bool:
        """Whether what decodes the answer enforces its schema; if not, the prompt must tell it."""
        ...

    def __call__(self, questions: Sequence[Question]) -> Sequence[Reply | Fault]:
        """One reply per question, whatever it says."""
        ...
