"""Qwen-Image-Edit (arXiv:2508.02324) and its Plus versions: Qwen-Image whose text encoder sees the image to edit, too.

The transformer reads the image's latents after its own; Qwen2.5-VL reads the image before the instruction. So what it
makes of an instruction is another for every image. Plus shows it a small one.
"""

import math
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import Edits, TextContext
from rpo.models.families.qwen_image import QwenImage, filled
from rpo.types import Embedding, Images

TOKENS = 2048
"""Of an instruction and an image of one megapixel, which has 1,400 to 1,600."""

SMALL_AREA = 384 * 384
"""Pixels that Plus shows to its text encoder."""

MULTIPLE = 32
"""Of a side, to which the pipelines round."""


class QwenImageEdit(QwenImage):
    """The family of `QwenImageEditPipeline`."""

    name = "Qwen-Image-Edit"
    pipelines: tuple[str, ...] = ("QwenImageEditPipeline",)
    single_file_key = ""  # a file of it cannot be told from one of Qwen-Image
    prompts_per_call = 1
    edits: Edits = "always"
    text_sees = True

    def context(self, pipe: Any) -> TextContext:
        """What the image leaves of the tokens is hardly ever used up."""
        return TextContext(pipe.tokenizer, TOKENS)

    def embed_with(self, pipe: Any, prompts: list[str], originals: Images, device: torch.device) -> Embedding:
        """Qwen2.5-VL's last hidden states of image and instruction, and which of them count."""
        seen = [self._seen(one) for one in originals]
        parts = [pipe.encode_prompt([prompt], [image], device) for prompt, image in zip(prompts, seen, strict=True)]
        if (longest := max(tokens.shape[1] for tokens, _ in parts)) > TOKENS:
            raise InputError(
                f"an image and its instruction take {longest} tokens of the text encoder, but there are {TOKENS}; "
                "expected about one megapixel: give a smaller resolution, or a shorter instruction"
            )
        rows = [filled(tokens, mask, TOKENS) for tokens, mask in parts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _seen(self, image: Tensor) -> Image.Image:
        return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


@final
class QwenImageEditPlus(QwenImageEdit):
    """The family of `QwenImageEditPlusPipeline`: Qwen-Image-Edit-2509 and later."""

    name = "Qwen-Image-Edit Plus"
    pipelines: tuple[str, ...] = ("QwenImageEditPlusPipeline",)

    def _seen(self, image: Tensor) -> Image.Image:
        height, width = image.shape[-2:]
        scale = math.sqrt(SMALL_AREA / (height * width))
        small = (round(side * scale / MULTIPLE) * MULTIPLE for side in (width, height))
        return super()._seen(image).resize((next(small), next(small)), Image.Resampling.LANCZOS)
