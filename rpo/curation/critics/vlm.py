"""A vision-language model as critic: it sees image and caption, and answers in the type of a critique."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image

from rpo.curation.chat import Chat, ask, chat_identity, load_chat
from rpo.curation.component_config import CriticConfig
from rpo.curation.prompt_file import PromptFile
from rpo.curation.records import Critique, Fault


class VlmCritic:
    """Asks a model what is wrong with images."""

    identity: Mapping[str, str]
    batch_size: int
    concurrency: int

    def __init__(self, chat: Chat, prompt: PromptFile) -> None:
        """Ask `chat` by `prompt`, which is told the caption."""
        self._chat, self._prompt = chat, prompt
        self.identity = chat_identity(chat, prompt)
        self.batch_size, self.concurrency = chat.batch_size, chat.concurrency

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> list[Critique | Fault]:
        """One critique per image."""
        values = [{"caption": caption} for caption in captions]
        return ask(self._chat, self._prompt, [(image,) for image in images], values, Critique)


def vlm_critic(config: CriticConfig, cache_folder: Path | None) -> VlmCritic:
    """The critic behind a server or on this machine, as the configuration's kind says."""
    prompt = PromptFile.load("critique", config.prompt, variables=("caption",))
    return VlmCritic(load_chat(config, cache_folder), prompt)
