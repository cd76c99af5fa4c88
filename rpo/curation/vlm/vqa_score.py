"""VQAScore (arXiv:2404.01291): how sure a vision-language model is that an image shows its prompt.

score = P("Yes" | image, 'Does this figure show "PROMPT"? Please answer yes or no.')

P is that of the first token of the answer, over the whole vocabulary: 0 to 1, higher is better. It was made for prompts
of several objects, their attributes and relations, which the bag of words of a CLIP confuses; unlike the cosines above
it can be compared between prompts. How much of the answer is "Yes" or "No" at all is logged beside it: where that is
little, the model does not answer the question, and the score means nothing.

    vqa-score:FOLDER    vqa-score:owner/name    vqa-score:http://HOST:PORT/v1#MODEL

Any `image-text-to-text` model of transformers that can be asked in turns will do, in the precision of its checkpoint.
Qwen3-VL-8B-Instruct (Apache-2.0) takes 18 GB. The authors' own model, a CLIP with FlanT5, is none of transformers.
A server tells its 20 likeliest first tokens: a "Yes" that is not among them counts 0, which is short of the truth by
less than the least of them, and an image for which neither answer is among them has no score.
Nothing is sampled, and there is no gradient.
"""

from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from PIL import Image
from torch import Tensor

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Fault
from rpo.curation.vlm.answers import AnswerCache
from rpo.curation.vlm.asking import asked_by_name, load_server
from rpo.curation.vlm.chat import Chat, Question, Reply
from rpo.curation.vlm.local import conversation, load_model
from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards.answers import FAILURE
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.version import version_of_weights
from rpo.types import Images, PerSample

CHECKPOINT = "Qwen/Qwen3-VL-8B-Instruct"
TEMPLATE = 'Does this figure show "{}"? Please answer yes or no.'
ANSWERS = ("Yes", "No")


class _Answering(Protocol):
    """A model that tells how likely its answers are."""

    def __call__(self, questions: Sequence[Question], device: torch.device) -> tuple[Tensor, list[str | None]]:
        """P of the two answers, [questions, 2], NaN where there is none, and why there is none."""
        ...

    def version(self) -> str:
        """What answers, and how it is asked."""
        ...

    def leave(self) -> None:
        """Make room on the device."""
        ...


@final
class VqaScore:
    """The probability that a model answers yes.

    Example:
        >>> VqaScore("my/model")
        VqaScore('my/model')
    """

    is_differentiable = False

    def __init__(self, model: str, *, batch_size: int = 4) -> None:
        """Say which model; nothing is loaded or asked yet.

        Args:
            model: Folder or hub id of an image-text-to-text model with its processor, or the address of a server.
            batch_size: Images that a model on this machine is asked about at once.
        """
        self.source = model
        asked = asked_by_name(model, "vqa-score")
        self._model: _Answering = _Served(asked) if asked["kind"] == "server" else _Local(model, batch_size)

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        return f"VqaScore({self.source!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> tuple[PerSample, dict[str, Any]]:
        """P("Yes") of every image for its own prompt, and P("Yes") + P("No") beside it; NaN, and why, of no answer."""
        check_batch(images, prompts)
        check_range(images)
        pictures = [Image.fromarray(pixels) for pixels in to_pixels(images.detach().float())]  # pyright: ignore
        questions = [
            Question(TEMPLATE.format(prompt), (picture,)) for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        found, whys = self._model(questions, images.device)
        return found[:, 0].to(images.device), {"answers": found.sum(dim=1), FAILURE: whys}

    def version(self) -> str:
        """A hash of the weights of a model of this machine, of a server the name alone; and how it is asked."""
        return self._model.version()

    def leave(self) -> None:
        """Have a model of this machine in the main memory until it is asked again."""
        self._model.leave()


@final
class _Local:
    """A model of transformers on this machine."""

    def __init__(self, source: str, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size
        self._loaded: tuple[Any, Any, list[int]] | None = None

    def __call__(self, questions: Sequence[Question], device: torch.device) -> tuple[Tensor, list[str | None]]:
        starts = range(0, len(questions), self.batch_size)
        found = torch.cat([self._asked(questions[n : n + self.batch_size], device) for n in starts])
        return found, [None] * len(found)

    def version(self) -> str:
        processor, model, tokens = self._on(torch.device("cpu"))
        own = vars(processor)
        return version_of_weights(
            {"model": model},
            vocabulary=sorted(own["tokenizer"].get_vocab().items()),
            preprocess=own["image_processor"].to_dict(),
            turns=processor.chat_template,
            template=TEMPLATE,
            answers=tokens,
        )

    def leave(self) -> None:
        if self._loaded is not None:
            self._loaded[1].to("cpu")

    @torch.inference_mode()
    def _asked(self, questions: Sequence[Question], device: torch.device) -> Tensor:
        processor, model, tokens = self._on(device)
        inputs = processor.apply_chat_template(
            [conversation(question) for question in questions],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(device, model.dtype)
        # One token by `generate`, which knows what each model wants of positions where prompts are padded.
        said = model.to(device).generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return said.logits[0].float().softmax(dim=-1)[:, tokens]

    def _on(self, device: torch.device) -> tuple[Any, Any, list[int]]:
        """Processor, model and the tokens of the answers; loaded to `device` if they are not there yet."""
        if self._loaded is None:
            processor, model = load_model(ChatConfig(kind="local", model=self.source), device)
            self._loaded = processor, model, _first_tokens(vars(processor)["tokenizer"], self.source)
        return self._loaded


@final
class _Served:
    """A model behind an OpenAI-compatible server, asked for one token."""

    def __init__(self, asked: dict[str, str]) -> None:
        self._config = ChatConfig(max_tokens=1, cache=False, answer_format="prompt", **asked)  # pyright: ignore
        self._chat: Chat | None = None

    def __call__(self, questions: Sequence[Question], device: torch.device) -> tuple[Tensor, list[str | None]]:
        if self._chat is None:
            self._chat = load_server(self._config, AnswerCache(None), tells_first_tokens=True)
        found = [_both(reply) for reply in self._chat(questions)]
        rows = [(torch.nan, torch.nan) if isinstance(one, str) else one for one in found]
        return torch.tensor(rows), [one if isinstance(one, str) else None for one in found]

    def version(self) -> str:
        return f"model {self._config.model} of a server, asked {TEMPLATE}"

    def leave(self) -> None:
        """It is not on this machine."""


def _both(reply: Reply | Fault) -> tuple[float, float] | str:
    """P of "Yes" and of "No", or why there is none."""
    if isinstance(reply, Fault):
        return f"{reply.message} (it said {reply.raw[:200]!r})"
    told = reply.first_tokens
    if told is None:
        return "the server tells no probabilities of tokens; expected logprobs with its answer"
    if not any(answer in told for answer in ANSWERS):
        return f"neither {' nor '.join(ANSWERS)} is among its likeliest first tokens, which are {sorted(told)[:5]}"
    yes, no = (told.get(answer, 0.0) for answer in ANSWERS)
    return yes, no


def _first_tokens(tokenizer: Any, source: str) -> list[int]:
    first = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ANSWERS]
    if len(set(first)) < len(ANSWERS):
        raise InputError(
            f"the tokenizer of {source!r} begins {' and '.join(ANSWERS)} with the same token; expected two, by which "
            "the answers can be told apart; take another model"
        )
    return first


VQA_SCORE = VqaScore(CHECKPOINT)
