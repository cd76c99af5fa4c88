"""How well an image fits its prompt by a CLIP model: CLIPScore, PickScore and checkpoints of one's own in one class.

score = scale * cos(image embedding, text embedding)

- PickScore (arXiv:2305.01569) is a CLIP model trained on people's choices; its scale is the checkpoint's own,
  exp(logit_scale).
- CLIPScore (arXiv:2104.08718) takes a stock CLIP model: 2.5 max(cos, 0) in the paper, 100 cos in most tools. Here it is
  100 cos; the cut-off at 0 is an option, since below it there is no gradient and no order.

The score is differentiable in the image. It is float32 throughout, under autocast too: images of one prompt differ by a
few hundredths of the cosine, which bfloat16 hardly resolves. The model is loaded when the first image comes; making a
reward touches neither network nor disk. One reward serves one thread at a time.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from rpo.errors import InputError
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.clip_preprocessing import read_preprocessing
from rpo.rewards.version import version_of_weights
from rpo.types import Images, PerSample

CLIP_CHECKPOINT = "openai/clip-vit-large-patch14"
PICK_CHECKPOINT = "yuvalkirstain/PickScore_v1"
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""PickScore is a fine-tuned copy of this checkpoint, whose tokenizer and image processor it goes with."""

CLIP_SCALE = 100.0
MAX_TEXTS = 4096
"""Prompts whose embeddings are kept: 16 MB for a ViT-H."""


@dataclass(frozen=True)
class ClipParts:
    """A checkpoint in memory."""

    model: Any
    """A CLIPModel that is ready to be asked."""
    tokenizer: Any
    preprocess: Callable[[Images], Images]
    """What makes of images in [0, 1] what the model reads."""


@dataclass(frozen=True)
class _Loaded:
    """The same with what is read off once."""

    model: Any
    tokenizer: Any
    preprocess: Callable[[Images], Images]
    scale: float
    max_tokens: int


def read_clip(source: str, processor: str) -> ClipParts:
    """The checkpoint of a folder or hub id, as transformers saves it, with tokenizer and image processor."""
    from transformers import AutoConfig, CLIPModel, CLIPTokenizer
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != "clip":
            raise InputError(f"its configuration says model_type {config.model_type!r}")
        # The dtype is given explicitly since transformers 5 takes that of the file.
        model, info = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise InputError(f"it lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}")
        tokenizer = CLIPTokenizer.from_pretrained(processor)
        preprocess = read_preprocessing(BaseImageProcessor.get_image_processor_dict(processor)[0])
    except (OSError, ValueError) as error:
        where = f"{source!r}" if processor == source else f"{source!r} with the processor of {processor!r}"
        raise InputError(
            f"no CLIP reward can be made of {where}: {error}; expected a folder or hub id with a CLIPModel, its "
            "tokenizer and its image processor; give another one, or download it where there is a network"
        ) from error
    return ClipParts(model.eval().requires_grad_(False), tokenizer, preprocess)


@final
class ClipReward:
    """The scaled cosine of a CLIP checkpoint; higher is better, and only comparable within one prompt.

    Example:
        >>> reward = ClipReward("openai/clip-vit-base-patch32", scale=2.5, is_clamped=True)    # the paper's CLIPScore
        >>> reward
        ClipReward('openai/clip-vit-base-patch32', scale=2.5, is_clamped=True)
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        processor: str | PathLike[str] | None = None,
        scale: float | None = None,
        is_clamped: bool = False,
        device: str | torch.device | None = None,
        batch_size: int = 32,
        read: Callable[[str, str], ClipParts] = read_clip,
    ) -> None:
        """Say which checkpoint, and what its cosine is multiplied by; nothing is loaded yet.

        Args:
            processor: Folder or hub id of tokenizer and image processor; None for those beside the model.
            scale: Factor of the cosine: 100 or 2.5 for CLIPScore; None for the checkpoint's own, as in PickScore.
            is_clamped: Whether a negative cosine counts as 0, as in the paper of CLIPScore.
            device: Where the model lives; None for wherever the images are.
            batch_size: Images that go through the model at once; changes speed and memory only.
            read: What loads the model and the processor of those two places.
        """
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise InputError(
                f"scale is {scale:g}; expected a positive number, or None for the checkpoint's own; give 100 for "
                "CLIPScore, and a negative weight to turn a reward into a penalty"
            )
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more; 8 to 64 are usual")
        self.source = str(model)
        self.processor = str(processor) if processor is not None else self.source
        self.is_clamped = is_clamped
        self.batch_size = batch_size
        self._scale, self._device = scale, torch.device(device) if device is not None else None
        self._read = read
        self._loaded: _Loaded | None = None
        self._texts = OrderedDict[str, Tensor]()

    is_differentiable = True

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        processor = f", processor={self.processor!r}" if self.processor != self.source else ""
        clamped = ", is_clamped=True" if self.is_clamped else ""
        return f"ClipReward({self.source!r}{processor}, scale={self._scale}{clamped})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Score every image by its own prompt, with the gradient in the images.

        Args:
            prompts: One per image; what is beyond the checkpoint's length is cut off.

        Returns:
            One float32 per image, on the device of the images.
        """
        check_batch(images, prompts)
        check_range(images)
        loaded = self._on(self._device or images.device)
        with torch.autocast(loaded.model.device.type, enabled=False):
            texts = self._embed_texts(loaded, prompts)
            cosines = (self.embed_images(images) * texts).sum(-1)
        cosines = cosines.clamp(min=0) if self.is_clamped else cosines
        return (loaded.scale * cosines).to(images.device)

    def embed_images(self, images: Images) -> Tensor:
        """Unit embeddings [batch, dim], for comparing images with each other."""
        device = self._device or images.device
        loaded = self._on(device)
        with torch.autocast(device.type, enabled=False):
            batches = images.to(device).float().split(self.batch_size)
            features = [loaded.model.get_image_features(pixel_values=loaded.preprocess(one)) for one in batches]
            return torch.cat([functional.normalize(_embedding(one), dim=-1) for one in features])

    def version(self) -> str:
        """A hash of the weights and of all else that decides the score."""
        loaded = self._loaded or self._on(self._device or torch.device("cpu"))
        return version_of_weights(
            {"clip": loaded.model},
            vocabulary=sorted(loaded.tokenizer.get_vocab().items()),
            preprocess=loaded.preprocess,
            scale=loaded.scale,
            is_clamped=self.is_clamped,
            max_tokens=loaded.max_tokens,
        )

    def embed_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Unit embeddings [texts, dim] without a gradient."""
        loaded = self._on(self._device or device)
        with torch.autocast(loaded.model.device.type, enabled=False):
            return self._embed_texts(loaded, texts)

    def leave(self) -> None:
        """Have the checkpoint in the main memory until it is asked again."""
        if self._loaded is not None:
            self._loaded.model.to("cpu")

    def _on(self, device: torch.device) -> _Loaded:
        """The checkpoint on `device`, loaded if it is not there yet."""
        if self._loaded is None:
            self._loaded = _load(self._read(self.source, self.processor), self._scale, self.processor)
        if self._loaded.model.device != device:
            self._loaded.model.to(device)
            self._texts.clear()
        return self._loaded

    @torch.no_grad()
    def _embed_texts(self, loaded: _Loaded, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings [batch, dim]; of each prompt computed once, as long as it is among the latest.

        Each by itself: beside others its last bits would be those of the batch, and a resumed run would have others.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt in self._texts:
                continue
            tokens = loaded.tokenizer([prompt], truncation=True, max_length=loaded.max_tokens, return_tensors="pt").to(
                loaded.model.device
            )
            features = loaded.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
            self._texts[prompt] = functional.normalize(_embedding(features), dim=-1)[0]
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        found = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > MAX_TEXTS:
            self._texts.popitem(last=False)
        return found


def clip_score(model: str) -> ClipReward:
    """CLIPScore by the checkpoint in a folder or of a hub id: 100 cos."""
    return ClipReward(model, scale=CLIP_SCALE)


def pick_score(model: str) -> ClipReward:
    """The score of a PickScore-like checkpoint: its own scale times cos. The folder has tokenizer and processor too."""
    return ClipReward(model)


CHECKPOINTS = {"clip-score": CLIP_CHECKPOINT, "pick-score": PICK_CHECKPOINT}
"""What those rewards are made of that are named without a checkpoint."""

CLIP_SCORE = clip_score(CLIP_CHECKPOINT)
PICK_SCORE = ClipReward(PICK_CHECKPOINT, processor=PICK_PROCESSOR)


def _embedding(features: Any) -> Tensor:
    """The projected embedding, which transformers gives as a tensor or, from 5 on, within an output object."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _load(parts: ClipParts, scale: float | None, processor: str) -> _Loaded:
    tokens, rows = len(parts.tokenizer), parts.model.config.text_config.vocab_size
    if tokens < rows:  # of a folder without the files of a tokenizer transformers makes one of a few tokens
        raise InputError(
            f"the tokenizer of {processor!r} has {tokens} tokens, the model {rows}; expected as many; give the folder "
            "or hub id of the tokenizer that the model was trained with, or download it where there is a network"
        )
    factor = scale if scale is not None else parts.model.logit_scale.exp().item()
    max_tokens = min(parts.tokenizer.model_max_length, parts.model.config.text_config.max_position_embeddings)
    return _Loaded(parts.model, parts.tokenizer, parts.preprocess, factor, max_tokens)
