"""ImageReward (arXiv:2304.05977): a BLIP that reads the prompt while it looks, trained on people's rankings.

score = (head(h) - 0.16717) / 1.03334,   h = BERT's first token for the prompt, with cross attention to a ViT-L/16

Higher is better; over the authors' data the mean is 0 and the deviation 1, and images get about -2.3 to 2. It was made
to rank the images of one prompt, and as a reward (ReFL): it asks more for what the prompt names than the rewards on
CLIP do. The score is differentiable in the image and float32 throughout; 1.8 GB. Since image and prompt meet in every
layer there is no embedding of a prompt that could be kept.

The weights are ImageReward.pt of THUDM/ImageReward (Apache-2.0) in the names of BLIP's authors, with med_config.json
beside it; they are read into transformers' BLIP classes. The tokenizer is google-bert/bert-base-uncased (Apache-2.0)
with BLIP's two more tokens; a prompt is cut off at 35 tokens. An image is resized to 224 at its short side and its
centre cut out, as by CLIP.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, final

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.clip_preprocessing import ClipPreprocessing, read_preprocessing
from rpo.rewards.version import version_of_weights
from rpo.rewards.weights import LinearHead, find_file, fitted, read_head, read_state
from rpo.types import Images, PerSample

REPOSITORY = "THUDM/ImageReward"
WEIGHTS_FILE, TEXT_CONFIG_FILE = "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_DIM = 64
"""Of BLIP's vision transformers, base and large."""
VISION_EPSILON = 1e-6
"""Of its layer norms; transformers' default is another."""
TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
    "pad_token_id",
)
"""What `med_config.json` has to say: transformers' defaults differ, in the number of heads for one."""

OUTSIDE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
IN_BLOCKS = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
}


@dataclass(frozen=True)
class _BlipParts:
    vision: Any
    text: Any
    head: LinearHead
    tokenizer: Any
    preprocess: ClipPreprocessing


@final
class BlipReward:
    """What ImageReward says of an image and its prompt.

    Example:
        >>> BlipReward("my/copy")
        BlipReward('my/copy')
    """

    is_differentiable = True

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        tokenizer: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
    ) -> None:
        """Say where the weights are; nothing is loaded yet.

        Args:
            model: Folder or hub id that has ImageReward.pt and med_config.json.
            tokenizer: Folder or hub id of BERT's tokenizer; None for the one beside the weights.
            device: Where the model lives; None for wherever the images are.
            batch_size: Images that go through the model at once; changes speed and memory only.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more; 8 to 64 are usual")
        self.source, self.batch_size = str(model), batch_size
        self.tokenizer = str(tokenizer) if tokenizer is not None else self.source
        self._device = torch.device(device) if device is not None else None
        self._parts: _BlipParts | None = None

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        tokenizer = f", tokenizer={self.tokenizer!r}" if self.tokenizer != self.source else ""
        return f"BlipReward({self.source!r}{tokenizer})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Score every image by its own prompt, with the gradient in the images; one float32 per image."""
        check_batch(images, prompts)
        check_range(images)
        device, parts = self._device or images.device, self._loaded()
        for model in (parts.vision, parts.text, parts.head):
            model.to(device)
        with torch.autocast(device.type, enabled=False):
            batches = images.to(device).float().split(self.batch_size)
            starts = range(0, len(prompts), self.batch_size)
            scores = [
                _score(parts, batch, prompts[start : start + self.batch_size])
                for batch, start in zip(batches, starts, strict=True)
            ]
        return torch.cat(scores).to(images.device)

    def version(self) -> str:
        """A hash of the weights, of the words and of how images are prepared."""
        parts = self._loaded()
        return version_of_weights(
            {"vision": parts.vision, "text": parts.text, "head": parts.head},
            vocabulary=sorted(parts.tokenizer.get_vocab().items()),
            preprocess=parts.preprocess,
        )

    def _loaded(self) -> _BlipParts:
        if self._parts is None:
            self._parts = _load(self.source, self.tokenizer)
        return self._parts

    def leave(self) -> None:
        """Have the weights in the main memory until they are asked again."""
        for model in (self._parts.vision, self._parts.text, self._parts.head) if self._parts else ():
            model.to("cpu")


def _score(parts: _BlipParts, images: Images, prompts: Sequence[str]) -> Tensor:
    tokens = parts.tokenizer(
        list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).to(images.device)
    seen = parts.vision(pixel_values=parts.preprocess(images)).last_hidden_state
    read = parts.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
    return (parts.head(read.last_hidden_state[:, 0]) - MEAN) / DEVIATION


def from_blip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of transformers' BlipVisionModel and BlipTextModel and of the head, by their names.

    Left out is what the score does not ask for: the projections of BLIP's pretraining and a table of positions.
    """
    vision, text, head = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            vision[_of_vision(name.removeprefix("blip.visual_encoder."))] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith(".position_ids"):
            text[name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = value
    return vision, text, head


def _of_vision(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name)
    if block:
        return f"encoder.layers.{block[1]}.{IN_BLOCKS.get(block[2], block[2])}.{block[3]}"
    if name in OUTSIDE:
        return OUTSIDE[name]
    stem, _, last = name.rpartition(".")
    return f"{OUTSIDE.get(stem, stem)}.{last}"


def _load(source: str, tokenizer: str) -> _BlipParts:
    from transformers import BertTokenizer, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    file = find_file(source, WEIGHTS_FILE)
    vision, text, head = from_blip(read_state(file))
    patches, positions = vision.get("embeddings.patch_embedding.weight"), vision.get("embeddings.position_embedding")
    if patches is None or positions is None:
        raise InputError(
            f"{file} has no blip.visual_encoder; expected the weights of ImageReward; give {WEIGHTS_FILE} of "
            f"{REPOSITORY}, or one like it"
        )
    vision_config = _vision_config(vision, patches, positions)
    text_config = _text_config(source, encoder_width=patches.shape[0])
    try:
        words = BertTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{tokenizer!r} has no tokenizer of BERT ({error}); expected that of {TOKENIZER}; put it beside "
            f"{WEIGHTS_FILE}, or download it where there is a network"
        ) from error
    words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(words) != text_config.vocab_size:  # of an empty folder transformers makes one of a few tokens
        raise InputError(
            f"the tokenizer of {tokenizer!r} has {len(words)} tokens, the model of {file} {text_config.vocab_size}; "
            f"expected as many; give that of {TOKENIZER}, or download it where there is a network"
        )
    what = "the weights of ImageReward"
    return _BlipParts(
        fitted(BlipVisionModel, vision_config, vision, file, what=what),
        fitted(BlipTextModel, text_config, text, file, what=what, add_pooling_layer=False),
        read_head(head, text_config.hidden_size, file),
        words,
        read_preprocessing({"size": vision_config.image_size, "crop_size": vision_config.image_size}),
    )


def _vision_config(state: Mapping[str, Tensor], patches: Tensor, positions: Tensor) -> Any:
    from transformers import BlipVisionConfig

    width, _, patch, _ = patches.shape
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})
    mlp = state.get("encoder.layers.0.mlp.fc1.weight", patches)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp.shape[0],
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_DIM,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=VISION_EPSILON,
    )


def _text_config(source: str, *, encoder_width: int) -> Any:
    from transformers import BlipTextConfig

    file = find_file(source, TEXT_CONFIG_FILE)
    given = json.loads(read_text(file))
    lacking = [name for name in TEXT_SETTINGS if name not in given]
    if lacking:
        raise InputError(
            f"{file} does not say {', '.join(lacking)}; expected the configuration of BLIP's text encoder; give the "
            f"one of {REPOSITORY}"
        )
    settings = {name: given[name] for name in TEXT_SETTINGS}
    return BlipTextConfig(**settings, encoder_hidden_size=encoder_width, is_decoder=True)


def image_reward(model: str) -> BlipReward:
    """ImageReward of a folder or hub id that has the weights, med_config.json and the tokenizer."""
    return BlipReward(model)


IMAGE_REWARD = BlipReward(REPOSITORY, tokenizer=TOKENIZER)
