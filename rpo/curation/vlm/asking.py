"""What critic, instructor and judge have in common: they ask a model, each by a prompt and for a type of answer."""

from collections.abc import Mapping, Sequence

from PIL.Image import Image

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Fault
from rpo.curation.vlm.answers import Answer, AnswerCache, understand
from rpo.curation.vlm.chat import Chat, Question
from rpo.curation.vlm.prompts import PromptFile
from rpo.data.pixels import rgb
from rpo.errors import InputError

_ADDRESSES = ("http://", "https://")


class Asking:
    """A component that asks a model."""

    identity: Mapping[str, str]
    batch_size: int
    concurrency: int

    def __init__(self, chat: Chat, prompt: PromptFile) -> None:
        """Ask `chat` by `prompt`."""
        self._chat, self._prompt = chat, prompt
        self.identity = {**chat.identity, "prompt_sha256": prompt.sha256}
        self.batch_size, self.concurrency = chat.batch_size, chat.concurrency

    def _ask(
        self, images: Sequence[tuple[Image, ...]], values: Sequence[Mapping[str, str]], answer: type[Answer]
    ) -> list[Answer | Fault]:
        """One question per group of images, which the prompt is filled in for, and the answers taken apart."""
        shown = None if self._chat.is_held_to_schema else answer
        questions = [
            Question(self._prompt.render(told, answer=shown), tuple(map(rgb, group)), answer)
            for group, told in zip(images, values, strict=True)
        ]
        return [one if isinstance(one, Fault) else understand(one, answer) for one in self._chat(questions)]


def asked_by_name(model: str, name: str) -> dict[str, str]:
    """What a configuration says of the model that a reward is given: FOLDER, owner/name, http://HOST:PORT/v1#MODEL."""
    if not model.startswith(_ADDRESSES):
        return {"kind": "local", "model": model}
    address, _, served = model.rpartition("#")
    if not (address and served):
        raise InputError(
            f"{name} is given {model!r}; expected http://HOST:PORT/v1#MODEL; say which model of the server"
        )
    return {"kind": "server", "base_url": address, "model": served}


def load_chat(config: ChatConfig, answers: AnswerCache) -> Chat:
    """The model that a configuration names.

    Args:
        answers: Where they are kept, if the configuration wants that.
    """
    cache = answers if config.cache else AnswerCache(None)
    if config.kind == "local":
        from rpo.curation.vlm.local import LocalChat

        return LocalChat(config, cache)
    return load_server(config, cache)


def load_server(config: ChatConfig, cache: AnswerCache, *, tells_first_tokens: bool = False) -> Chat:
    """The model behind a server; of its answers the likeliest first tokens, too, where that is wanted."""
    try:
        from rpo.curation.vlm.server import ServerChat
    except ImportError as error:
        raise InputError(f"asking a server needs the openai library ({error}); pip install 'rpo[judge]'") from error
    return ServerChat(config, cache, tells_first_tokens=tells_first_tokens)
