"""HPSv2 and HPSv2.1 (arXiv:2306.09341): a CLIP ViT-H-14 trained on people's choices among generated images.

score = cos(image embedding, text embedding)

Higher is better. Images of one prompt differ by a few hundredths: about 0.24 to 0.28 for v2 and 0.22 to 0.32 for v2.1
(tables show a hundred times that), and only within one prompt is a difference one of quality. v2.1 is the same network
on more and better data. It was made to rank text-to-image models by taste and by the prompt; as a reward it drives
towards saturated, detailed images. The score is differentiable in the image and float32 throughout; 3.9 GB.

The weights are HPS_v2_compressed.pt and HPS_v2.1_compressed.pt of xswu/HPSv2 (Apache-2.0), in the names of open_clip.
Here they are read into transformers' CLIPModel of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT), whose configuration and
tokenizer they go with; the text is cut off at 77 tokens. open_clip pads a text with 0 and transformers with the end
token: neither is looked at, since the embedding is that of the first end token, which sees what is before it only.

An image is not cut: its long side is resized to 224 and the rest is black. As in the authors' code this happens to
floats, so that the overshoots of the bicubic kernel stay.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rpo.errors import InputError
from rpo.rewards.clip import ClipParts, ClipReward
from rpo.rewards.clip_preprocessing import IMAGE_MEAN, IMAGE_STD
from rpo.rewards.weights import find_file, fitted, read_state
from rpo.types import Images

HPS_REPOSITORY = "xswu/HPSv2"
HPS_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
V2_FILE, V2_1_FILE = "HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"

SIDES = (("visual.transformer.", "vision_model.encoder."), ("transformer.", "text_model.encoder."))
IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""open_clip multiplies by these from the right."""


@dataclass(frozen=True)
class Letterbox:
    """The whole image, its long side resized to `edge`, in the middle of a black square."""

    edge: int

    def __call__(self, images: Images) -> Images:
        """The pixel values that the network reads, with their gradient."""
        longest = max(images.shape[2:])
        if longest != self.edge:
            size = [round(side * self.edge / longest) for side in images.shape[2:]]
            images = functional.interpolate(images, size, mode="bicubic", antialias=True)
        spare = [self.edge - side for side in images.shape[2:]]
        (top, left), (bottom, right) = [side // 2 for side in spare], [side - side // 2 for side in spare]
        images = functional.pad(images, (left, right, top, bottom))
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        return (images - mean) / std


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's CLIP by the names of transformers' CLIPModel; what has no name there keeps its own."""
    found = dict[str, Tensor]()
    for name, value in state.items():
        if name in TRANSPOSED:
            found[TRANSPOSED[name]] = value.T.contiguous()
            continue
        renamed = _in_block(name)
        joined = re.fullmatch(r"(.*)attn\.in_proj_(weight|bias)", renamed)
        if joined:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{joined[1]}self_attn.{letter}_proj.{joined[2]}"] = part.clone()
        else:
            found[OUTSIDE.get(renamed, renamed)] = value
    return found


def _in_block(name: str) -> str:
    for theirs, ours in SIDES:
        block = re.fullmatch(rf"{re.escape(theirs)}resblocks\.(\d+)\.(.+)\.(\w+)", name)
        if block:
            return f"{ours}layers.{block[1]}.{IN_BLOCKS.get(block[2], block[2])}.{block[3]}"
    return name


def read_hps(file: str, processor: str) -> ClipParts:
    """The model of a file in the names of open_clip, with the configuration and tokenizer of `processor`."""
    from transformers import AutoConfig, CLIPModel, CLIPTokenizer

    source, _, name = file.rpartition("/")
    path = find_file(source, name)
    try:
        config, tokenizer = AutoConfig.from_pretrained(processor), CLIPTokenizer.from_pretrained(processor)
        if config.model_type != "clip":
            raise InputError(f"its configuration says model_type {config.model_type!r}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{processor!r} has no configuration and tokenizer of a CLIP model ({error}); expected those of "
            f"{HPS_PROCESSOR}; put them beside {name}, or download them where there is a network"
        ) from error
    state = from_open_clip(read_state(path))
    model = fitted(CLIPModel, config, state, path, what=f"open_clip's weights of the model of {processor}/config.json")
    return ClipParts(model, tokenizer, Letterbox(config.vision_config.image_size))


def hps(file: str, source: str, *, processor: str | None = None) -> ClipReward:
    """The cosine of the model in `file` of a folder or hub id, which has configuration and tokenizer too."""
    return ClipReward(f"{source}/{file}", processor=processor or source, scale=1.0, read=read_hps)


hps_v2, hps_v2_1 = partial(hps, V2_FILE), partial(hps, V2_1_FILE)
HPS_V2, HPS_V2_1 = hps_v2(HPS_REPOSITORY, processor=HPS_PROCESSOR), hps_v2_1(HPS_REPOSITORY, processor=HPS_PROCESSOR)
