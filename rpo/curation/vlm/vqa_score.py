"""VQAScore (arXiv:2404.01291): how sure a vision-language model is that an image shows its prompt.

score = P("Yes" | image, 'Does this figure show "PROMPT"? Please answer yes or no.')

P is that of the first token of the answer, over the whole vocabulary: 0 to 1, higher is better. It was made for prompts
of several objects, their attributes and relations, which the bag of words of a CLIP confuses; unlike the cosines above
it can be compared between prompts. How much of the answer is "Yes" or "No" at all is logged beside it: where that is
little, the model does not answer the question, and the score means nothing.

Any `image-text-to-text` model of transformers that can be asked in turns will do, in the precision of its checkpoint.
Qwen3-VL-8B-Instruct (Apache-2.0) takes 18 GB. The authors' own model, a CLIP with FlanT5, is none of transformers.
Nothing is sampled, and there is no gradient.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from rpo.curation.curate_config import ChatConfig
from rpo.curation.vlm.chat import Question
from rpo.curation.vlm.local import conversation, load_model
from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.version import version_of_weights
from rpo.types import Images, PerSample

CHECKPOINT = "Qwen/Qwen3-VL-8B-Instruct"
TEMPLATE = 'Does this figure show "{}"? Please answer yes or no.'
ANSWERS = ("Yes", "No")


@final
class VqaScore:
    """The probability that a model answers yes.

    Example:
        >>> VqaScore("my/model")
        VqaScore('my/model')
    """

    is_differentiable = False

    def __init__(self, model: str, *, batch_size: int = 4) -> None:
        """Say which model; nothing is loaded yet.

        Args:
            model: Folder or hub id of an image-text-to-text model with its processor.
            batch_size: Images that it is asked about at once.
        """
        self.source, self.batch_size = model, batch_size
        self._loaded: tuple[Any, Any, list[int]] | None = None

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        return f"VqaScore({self.source!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> tuple[PerSample, dict[str, PerSample]]:
        """P("Yes") of every image for its own prompt, and P("Yes") + P("No") beside it."""
        check_batch(images, prompts)
        check_range(images)
        pictures = [_picture(pixels) for pixels in to_pixels(images.detach().float())]
        questions = [
            Question(TEMPLATE.format(prompt), (picture,)) for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        starts = range(0, len(questions), self.batch_size)
        found = torch.cat([self._asked(questions[n : n + self.batch_size], images.device) for n in starts])
        return found[:, 0].to(images.device), {"answers": found.sum(dim=1)}

    def version(self) -> str:
        """A hash of the weights and of how they are asked."""
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
        """Have the model in the main memory until it is asked again."""
        if self._loaded is not None:
            self._loaded[1].to("cpu")

    @torch.inference_mode()
    def _asked(self, questions: Sequence[Question], device: torch.device) -> Tensor:
        """P of the two answers, [questions, 2]."""
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


def _first_tokens(tokenizer: Any, source: str) -> list[int]:
    first = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ANSWERS]
    if len(set(first)) < len(ANSWERS):
        raise InputError(
            f"the tokenizer of {source!r} begins {' and '.join(ANSWERS)} with the same token; expected two, by which "
            "the answers can be told apart; take another model"
        )
    return first


def _picture(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


VQA_SCORE = VqaScore(CHECKPOINT)
