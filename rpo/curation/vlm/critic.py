"""A vision-language model as critic: it sees image and caption, and answers in the type of a critique."""

from collections.abc import Sequence
from typing import final

from PIL.Image import Image

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Critique, Fault
from rpo.curation.vlm.answers import AnswerCache
from rpo.curation.vlm.asking import Asking, load_chat
from rpo.curation.vlm.prompts import PromptFile


@final
class VlmCritic(Asking):
    """Asks a model what is wrong with images."""

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> list[Critique | Fault]:
        """One critique per image."""
        return self._ask([(image,) for image in images], [{"caption": caption} for caption in captions], Critique)


def vlm_critic(config: ChatConfig, answers: AnswerCache) -> VlmCritic:
    """The critic behind a server or on this machine, as the configuration's kind says."""
    prompt = PromptFile.load("critique", config.prompt, variables=("caption",))
    return VlmCritic(load_chat(config, answers), prompt)
