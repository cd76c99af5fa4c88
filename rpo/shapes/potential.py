"""A judge of images on their way (PARM, arXiv:2501.13926): can it be told yet, will it be right, which is the best.

Three heads on what `shapes-clip` sees of image and prompt, and the time t in [0, 1], 1 at the noise end, answer of an
image that a generator is about to draw (x̂₀, or a half-filled grid with its likeliest tokens):

    clear      P(the verifier says of it what it will say of the finished image), from a half to 1
    potential  P(the finished image will be right)

and of a finished image, t = 0:

    best       P(it is right)

Where an image tells nothing, the verifier accepts none, and would agree as often as images of such a prompt come out
wrong: a matter of luck. So the first is that of a world in which every kind of prompt comes out right half of the time:
there luck is worth ½, and a look is clear from ¾ on, half way from luck to certainty. `scripts/shapes` trains the heads
on trajectories of `shapes` and `shapes-tokens`, and they are told whose image it is: the same sight promises more of a
generator that spoils less on the way.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rpo import shapes
from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.clip import ClipReward
from rpo.rewards.version import version_of_weights
from rpo.sampling.stepwise import Assessment
from rpo.shapes.proxy import REWARD
from rpo.types import Images, PerSample

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WAVES = 4
"""Frequencies at which the heads are told the time."""

SOURCES = ("shapes", "shapes-tokens")
"""The generators that the heads know."""

LOUD = 3.0
"""What the heads are told of the generator, in units of their other inputs."""


@final
class PotentialHeads(nn.Module):
    """Logits of clear, potential and best, [batch, 3]."""

    def __init__(self, dims: int, width: int, dropout: float = 0.0) -> None:
        """Make them untrained.

        Args:
            dims: Of the embeddings.
            width: Of the two hidden layers.
            dropout: Share of inputs and hidden units that training leaves out.
        """
        super().__init__()
        self.dims, self.width = dims, width
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(3 * dims + 2 + 2 * WAVES + len(SOURCES), width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, 3),
        )

    def forward(self, image: Tensor, text: Tensor, time: Tensor, source: Tensor) -> Tensor:
        """By unit embeddings [batch, dims], times [batch], and places in `SOURCES` [batch]."""
        waves = math.pi * time[:, None] * torch.arange(1, WAVES + 1, device=time.device)
        cosine, scale = (image * text).sum(dim=1, keepdim=True), math.sqrt(self.dims)
        seen = [scale * image, scale * text, self.dims * image * text, 10 * cosine, time[:, None]]
        whose = LOUD * nn.functional.one_hot(source, len(SOURCES))
        return self.layers(torch.cat([*seen, waves.sin(), waves.cos(), whose], dim=1))


def load_heads(folder: Path) -> PotentialHeads:
    """Those of a folder that `scripts/shapes/pretrain_potential.py` wrote, in float32."""
    try:
        heads = PotentialHeads(**json.loads(read_text(folder / CONFIG)))
        heads.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder} holds no judge of potential ({error}); expected {CONFIG} and {WEIGHTS}; install rpo again, or "
            "train it with `python -m scripts.shapes.pretrain_potential` of rpo's repository"
        ) from error
    return heads.float().eval().requires_grad_(False)


@final
class ShapesPotential:
    """As a reward, how likely a finished image is right; as a judge on the way, what is above.

    Example:
        >>> ShapesPotential().assess(torch.rand(1, 3, 64, 64), ["a red circle"], 0.9).clear > 0.75
        tensor([False])
    """

    is_differentiable = True

    def __init__(self, source: str = "shapes", *, folder: Path = shapes.POTENTIAL, clip: ClipReward = REWARD) -> None:
        """Say whose images are judged, and where the heads are; nothing is loaded yet.

        Args:
            source: One of `SOURCES`.
            clip: What sees images and prompts: the one that the heads were trained on.
        """
        if source not in SOURCES:
            raise InputError(f"source is {source!r}; expected one of {', '.join(SOURCES)}; name the one that draws")
        self.source = source
        self._folder, self._clip = folder, clip
        self._heads: PotentialHeads | None = None

    def __repr__(self) -> str:
        """Whose images it judges."""
        return f"ShapesPotential({self.source!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """How likely each finished image is right, in [0, 1], with the gradient in the images."""
        return self._said(images, prompts, 0.0)[:, 2]

    @torch.no_grad()
    def assess(self, images: Images, prompts: Sequence[str], time: float) -> Assessment:
        """What can be told of images on their way.

        Args:
            images: What each is about to become.
            time: In [0, 1], 1 at the noise end.
        """
        said = self._said(images, prompts, time)
        return Assessment(said[:, 0], said[:, 1])

    def version(self) -> str:
        """A hash of the heads' weights, and of all that their embeddings are made by."""
        return version_of_weights({"heads": self._on(torch.device("cpu"))}, clip=self._clip.version(), of=self.source)

    def leave(self) -> None:
        """Have the networks in the main memory until they are asked again."""
        self._clip.leave()
        if self._heads is not None:
            self._heads.to("cpu")

    def _said(self, images: Images, prompts: Sequence[str], time: float) -> Tensor:
        check_batch(images, prompts)
        check_range(images)
        heads = self._on(images.device)
        with torch.autocast(images.device.type, enabled=False):
            seen, told = self._clip.embed_images(images), self._clip.embed_texts(prompts, images.device)
            source = torch.full((len(seen),), SOURCES.index(self.source), device=seen.device)
            return heads(seen, told, seen.new_full((len(seen),), time), source).sigmoid()

    def _on(self, device: torch.device) -> PotentialHeads:
        if self._heads is None:
            self._heads = load_heads(self._folder)
        return self._heads.to(device)


POTENTIAL = ShapesPotential("shapes")
POTENTIAL_OF_TOKENS = ShapesPotential("shapes-tokens")
