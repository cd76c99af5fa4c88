"""A vision-language model as one question and its answer, whether it runs behind a server or on this machine.

Critic, instructor and judge each have a prompt and a type of answer of their own; all of them ask through a `Chat`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL.Image import Image
from pydantic import BaseModel

from rpo.curation.answers import Answer, Reply, understand
from rpo.curation.component_config import ChatConfig
from rpo.curation.prompt_file import PromptFile
from rpo.curation.records import Component, Fault
from rpo.data.pixels import rgb


@dataclass(frozen=True)
class Question:
    """Images, a text that speaks of them, and the type of answer that the model is held to, if it can be held."""

    text: str
    images: tuple[Image, ...]
    answer: type[BaseModel] | None = None


class Chat(Component, Protocol):
    """Something that answers questions about images."""

    @property
    def is_held_to_schema(self) -> bool:
        """Whether what decodes the answer enforces its schema; if not, the prompt must tell it."""
        ...

    def __call__(self, questions: Sequence[Question]) -> Sequence[Reply | Fault]:
        """One reply per question, whatever it says.

        Raises:
            Unavailable: It cannot answer now.
        """
        ...


def ask(
    chat: Chat,
    prompt: PromptFile,
    images: Sequence[tuple[Image, ...]],
    values: Sequence[Mapping[str, str]],
    answer: type[Answer],
) -> list[Answer | Fault]:
    """Ask one question per group of images, and take the answers apart."""
    shown = None if chat.is_held_to_schema else answer
    questions = [
        Question(prompt.render(told, answer=shown), tuple(rgb(image) for image in group), answer)
        for group, told in zip(images, values, strict=True)
    ]
    replies = chat(questions)
    return [reply if isinstance(reply, Fault) else understand(reply, answer) for reply in replies]


def load_chat(config: ChatConfig, cache_folder: Path | None) -> Chat:
    """The model that a configuration names.

    Args:
        cache_folder: Where answers are kept if the configuration wants that; None for nowhere.
    """
    folder = cache_folder if config.cache else None
    if config.kind == "server":
        from rpo.curation.chat_server import ServerChat

        return ServerChat(config, cache_folder=folder)
    from rpo.curation.chat_local import LocalChat

    return LocalChat(config, cache_folder=folder)


def chat_identity(chat: Chat, prompt: PromptFile) -> dict[str, str]:
    """What decides the answers of a component that asks `chat` by `prompt`."""
    return {**chat.identity, "prompt_sha256": prompt.sha256}
