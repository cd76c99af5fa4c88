"""A vision-language model as instructor: a call and a prompt of its own; it sees image, caption and critique."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image

from rpo.curation.chat import Chat, ask, chat_identity, load_chat
from rpo.curation.component_config import InstructorConfig
from rpo.curation.instructors.commands import check_commands
from rpo.curation.prompt_file import PromptFile
from rpo.curation.records import Critique, Fault, Instructions


class VlmInstructor:
    """Asks a model what an editor should do to images."""

    identity: Mapping[str, str]
    batch_size: int
    concurrency: int

    def __init__(self, chat: Chat, prompt: PromptFile) -> None:
        """Ask `chat` by `prompt`, which is told the caption and the critique."""
        self._chat, self._prompt = chat, prompt
        self.identity = chat_identity(chat, prompt)
        self.batch_size, self.concurrency = chat.batch_size, chat.concurrency

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], critiques: Sequence[Critique]
    ) -> list[Instructions | Fault]:
        """Instructions for each image."""
        values = [
            {"caption": caption, "critique": json.dumps(critique.model_dump(mode="json"), ensure_ascii=False)}
            for caption, critique in zip(captions, critiques, strict=True)
        ]
        answers = ask(self._chat, self._prompt, [(image,) for image in images], values, Instructions)
        return [answer if isinstance(answer, Fault) else check_commands(answer) for answer in answers]


def vlm_instructor(config: InstructorConfig, cache_folder: Path | None) -> VlmInstructor:
    """The instructor behind a server or on this machine, as the configuration's kind says."""
    prompt = PromptFile.load("instruct", config.prompt, variables=("caption", "critique"))
    return VlmInstructor(load_chat(config, cache_folder), prompt)
