"""HPSv3 (arXiv:2508.03789): Qwen2-VL-7B that reads a rubric with the prompt and marks the image, by people's choices.

score = mu,   (mu, sigma) = W3 relu(W2 relu(W1 h + b1) + b2) + b3,   h = last hidden state at the token <|Reward|>

Higher is better. Means over the authors' prompts are -0.2 (Stable Diffusion 2), 5.3 (3 Medium), 8.2 (SDXL) and 10.4
(FLUX.1 dev); only within one prompt is a difference one of quality. It was made for images from the oldest models' to
photographs, and asks for looks and for the prompt at once. sigma is how sure its training was, and is not used.

The weights are HPSv3.safetensors of MizzenAI/HPSv3 (MIT), configuration and tokenizer those of
Qwen/Qwen2-VL-7B-Instruct (Apache-2.0), which gets one more token. The model stays in the precision of the file
(bfloat16, 17 GB), the head is float32. The score is differentiable in the image. hpsv3.txt is the authors' rubric, word
for word, up to <|Reward|>: nothing before a token sees what comes after.

As in the authors' code with the transformers 4.45.2 that it pins, positions are 0, 1, 2, … for the tokens of the image
too, and not Qwen2-VL's own of three axes. An image is resized to about 200,704 pixels (448 x 448), both sides multiples
of 28. They do that by PIL, on bytes; here nothing is rounded, by which a channel differs by up to about 1/255 before it
is normalised.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.rewards.answers import RewardError
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.clip_preprocessing import IMAGE_MEAN, IMAGE_STD
from rpo.rewards.version import version_of_weights
from rpo.rewards.weights import check_fit, find_file, fitted, read_state
from rpo.types import Images, PerSample

REPOSITORY, WEIGHTS_FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
PROCESSOR = "Qwen/Qwen2-VL-7B-Instruct"
TURN = read_text(Path(__file__).with_name("hpsv3.txt"))
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"

PIXELS = 256 * 28 * 28
LONGEST = 200
"""The long side over the short one, beyond which the authors refuse an image."""
EMBEDDINGS = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Patches:
    """What Qwen2-VL reads of an image: its patches, those that become one token beside each other."""

    edge: int
    """Pixels of a side of a patch."""
    merged: int
    """Patches of a side that become one token."""
    frames: int
    """An image is a film of so many equal ones."""

    def __call__(self, images: Images) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches [batch * rows * columns, values] with their gradient, and frames, rows and columns of each image."""
        height, width = canvas(*images.shape[2:], multiple=self.edge * self.merged)
        for step in ((images.shape[2], width), (height, width)):  # in the order of PIL, which cuts off overshoots
            if images.shape[2:] != step:
                images = functional.interpolate(images, step, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        whole = ((images - mean) / std).unflatten(3, (-1, self.merged, self.edge))
        whole = whole.unflatten(2, (-1, self.merged, self.edge))  # batch, 3, rows, merged, edge, columns, merged, edge
        film = whole.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, self.frames, -1, -1)
        return film.flatten(0, 4).flatten(1), (1, height // self.edge, width // self.edge)


def canvas(height: int, width: int, *, multiple: int) -> tuple[int, int]:
    """Height and width of about the same shape, each a multiple, whose product is just below or above `PIXELS`.

    Example:
        >>> canvas(512, 512, multiple=28), canvas(720, 1280, multiple=28), canvas(16, 48, multiple=28)
        ((448, 448), (336, 588), (280, 784))
    """
    size = [max(round(side / multiple), 1) * multiple for side in (height, width)]
    if math.prod(size) > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        size = [math.floor(side / shrink / multiple) * multiple for side in (height, width)]
    elif math.prod(size) < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        size = [math.ceil(side * grow / multiple) * multiple for side in (height, width)]
    return size[0], size[1]


@dataclass(frozen=True)
class _Parts:
    model: Any
    head: nn.Sequential
    tokenizer: Any
    see: Patches


@final
class HpsV3Reward:
    """The mark that the model gives.

    Example:
        >>> HpsV3Reward("my/copy")
        HpsV3Reward('my/copy')
    """

    is_differentiable = True

    def __init__(
        self, model: str | PathLike[str], *, processor: str | PathLike[str] | None = None, batch_size: int = 4
    ) -> None:
        """Say where the weights are; nothing is loaded yet.

        Args:
            model: Folder or hub id that has HPSv3.safetensors.
            processor: Folder or hub id of Qwen2-VL's configuration and tokenizer; None for those beside the weights.
            batch_size: Images that go through the model at once; changes speed and memory only.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more; 2 to 16 are usual")
        self.source, self.batch_size = str(model), batch_size
        self.processor = str(processor) if processor is not None else self.source
        self._parts: _Parts | None = None

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        processor = f", processor={self.processor!r}" if self.processor != self.source else ""
        return f"HpsV3Reward({self.source!r}{processor})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Mark every image by its own prompt, with the gradient in the images; one float32 per image."""
        check_batch(images, prompts)
        check_range(images)
        _check_asked(images, prompts)
        parts = self._loaded()
        parts.model.to(images.device)
        parts.head.to(images.device)
        starts = range(0, len(prompts), self.batch_size)
        with torch.autocast(images.device.type, enabled=False):
            scores = [
                _score(parts, batch, prompts[start : start + self.batch_size])
                for batch, start in zip(images.float().split(self.batch_size), starts, strict=True)
            ]
        return torch.cat(scores)

    def version(self) -> str:
        """A hash of the weights, of the words and of how images are prepared."""
        parts = self._loaded()
        return version_of_weights(
            {"model": parts.model, "head": parts.head},
            vocabulary=sorted(parts.tokenizer.get_vocab().items()),
            preprocess=parts.see,
            turn=TURN,
        )

    def leave(self) -> None:
        """Have the weights in the main memory until they are asked again."""
        for model in (self._parts.model, self._parts.head) if self._parts else ():
            model.to("cpu")

    def _loaded(self) -> _Parts:
        if self._parts is None:
            self._parts = _load(self.source, self.processor)
        return self._parts


def _check_asked(images: Images, prompts: Sequence[str]) -> None:
    """Refuse shapes that the authors refuse, and prompts that would look like a part of the question."""
    height, width = images.shape[2:]
    if max(height, width) > LONGEST * min(height, width):
        raise RewardError(f"got images of {height} x {width}; expected one side at most {LONGEST} times the other")
    for row, prompt in enumerate(prompts):
        if inside := [token for token in (REWARD_TOKEN, IMAGE_TOKEN) if token in prompt]:
            raise RewardError(
                f"the prompt has {inside[0]} in it, by which the model is asked; expected words; leave it out",
                indices=[row],
                batch_size=len(prompts),
            )


def _score(parts: _Parts, images: Images, prompts: Sequence[str]) -> Tensor:
    patches, grid = parts.see(images)
    seen = IMAGE_TOKEN * (math.prod(grid) // parts.see.merged**2)
    turn = TURN.replace(IMAGE_TOKEN, seen)
    turns = [turn.replace("{prompt}", prompt) for prompt in prompts]
    tokens = parts.tokenizer(turns, padding=True, padding_side="right", return_tensors="pt").to(images.device)
    places = torch.arange(tokens.input_ids.shape[1], device=images.device).expand(3, len(prompts), -1)
    read = parts.model(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        position_ids=places,
        pixel_values=patches,
        image_grid_thw=torch.tensor([grid] * len(prompts), device=images.device),
        use_cache=False,
    ).last_hidden_state
    last = tokens.attention_mask.sum(dim=1) - 1  # where <|Reward|> is
    mu, _ = parts.head(read[torch.arange(len(prompts)), last].float()).unbind(dim=1)
    return mu


def head_of(width: int) -> nn.Sequential:
    """Three linear layers of random weights to mu and sigma; their numbers count the dropout of the published ones."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of transformers' Qwen2VLModel and of the head, by their names.

    Left out is what says the next word.
    """
    model, head = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in state.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = value
        elif name.startswith("model."):
            model[f"language_model.{name.removeprefix('model.')}"] = value
        elif name != "lm_head.weight":
            model[name] = value
    return model, head


def _load(source: str, processor: str) -> _Parts:
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

    file = find_file(source, WEIGHTS_FILE)
    try:
        config, tokenizer = AutoConfig.from_pretrained(processor), AutoTokenizer.from_pretrained(processor)
        if config.model_type != "qwen2_vl":
            raise InputError(f"its configuration says model_type {config.model_type!r}")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{processor!r} has no configuration and tokenizer of Qwen2-VL ({error}); expected those of {PROCESSOR}; "
            f"put them beside {WEIGHTS_FILE}, or download them where there is a network"
        ) from error
    state, head_state = from_published(read_state(file, dtype=None))
    if EMBEDDINGS not in state:
        raise InputError(f"{file} has no words; expected the weights of HPSv3; give {WEIGHTS_FILE} of {REPOSITORY}")
    words = state[EMBEDDINGS]
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    if len(tokenizer) != len(words):
        raise InputError(
            f"the tokenizer of {processor!r} has {len(tokenizer)} tokens with {REWARD_TOKEN}, the model of {file} "
            f"{len(words)}; expected as many; give that of {PROCESSOR}"
        )
    config.text_config.vocab_size = len(words)
    head = head_of(config.text_config.hidden_size)
    check_fit(head_state, head, file, what="a head of three linear layers, rm_head.0, .3 and .5")
    head.load_state_dict(head_state)
    model = fitted(Qwen2VLModel, config, state, file, what="the weights of HPSv3", dtype=words.dtype)
    vision = config.vision_config
    see = Patches(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    return _Parts(model, head.float().eval().requires_grad_(False), tokenizer, see)


def hps_v3(model: str) -> HpsV3Reward:
    """HPSv3 of a folder or hub id that has the weights, and Qwen2-VL's configuration and tokenizer."""
    return HpsV3Reward(model)


HPS_V3 = HpsV3Reward(REPOSITORY, processor=PROCESSOR)
