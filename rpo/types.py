"""The vocabulary of rpo: what a batch of latents, a grid, a conditioning and a trajectory are.

Every process here is x_t = alpha_t x_0 + sigma_t eps. Time runs from noise (t = 1) to data (t = 0), so a grid starts at
its noisiest node and a step goes from node `t` to the less noisy node `s`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Latents = Float[Tensor, "batch c h w"]
"""Any point of the latent space: clean `x_0`, noisy `x_t`, noise `eps`, a network output."""

Output = Float[Tensor, "batch _ h w"]
"""What a network puts out: as many channels as latents have, or the logits of a codebook."""

Images = Float[Tensor, "batch 3 height width"]
"""RGB in [0, 1]."""

PerSample = Float[Tensor, " batch"]
"""One number per image: a reward, an error, a log-density."""

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "logits"]
"""What the network puts out; `flow` is eps - x_0 (rectified flow), `v_prediction` is alpha eps - sigma x_0,
and `logits` are those of each token of a grid."""


@dataclass(frozen=True)
class Node:
    """One moment of the process: x_t = alpha x_0 + sigma eps, with the number the network is told.

    The three tensors have one shape: `[]` for a whole batch at one moment, or `[batch, 1, 1, 1]` with one moment per
    sample. `timestep` is what the network is fed (an integer for a UNet).
    """

    alpha: Float[Tensor, "..."]
    sigma: Float[Tensor, "..."]
    timestep: Float[Tensor, "..."] | Int[Tensor, "..."]


@dataclass(frozen=True)
class Grid:
    """A discretisation of the process from noise to data: `num_steps + 1` nodes, the last one at the data end."""

    alpha: Float[Tensor, " nodes"]
    sigma: Float[Tensor, " nodes"]
    timestep: Float[Tensor, " nodes"] | Int[Tensor, " nodes"]

    @property
    def num_steps(self) -> int:
        """Number of transitions."""
        return self.alpha.shape[0] - 1

    def to(self, device: torch.device) -> "Grid":
        """The same on another device."""
        return Grid(self.alpha.to(device), self.sigma.to(device), self.timestep.to(device))

    def __getitem__(self, index: int) -> Node:
        """The node at `index`, 0 … num_steps; step k goes from node k to node k + 1."""
        return Node(self.alpha[index], self.sigma[index], self.timestep[index])


class Canvas(NamedTuple):
    """The size of an image in pixels, which need not be square."""

    height: int
    width: int

    def __str__(self) -> str:
        """As people write it: 1024x768 is 1024 high and 768 wide."""
        return f"{self.height}x{self.width}"


Embedding = Mapping[str, Tensor]
"""What text encoders say of prompts: named tensors, one row per prompt. Every family has "tokens", `[prompts, tokens,
dim]`; some have more, such as "pooled". A trainer may add "sizes", one row per image; see `Conditioning.told`."""


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about each image: its prompt, and what guidance pushes away from."""

    prompt: Embedding
    negative: Embedding

    def __len__(self) -> int:
        """Number of images it describes."""
        return len(next(iter(self.prompt.values())))

    @property
    def tokens(self) -> Float[Tensor, "batch tokens dim"]:
        """The prompt's tokens, as they are attended to."""
        return self.prompt["tokens"]

    def select(self, index: Int[Tensor, " picked"] | slice) -> "Conditioning":
        """The conditioning of some of the images, in the order asked for; an index may repeat."""
        return self._each(lambda one: one[index])

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same on another device."""
        return self._each(lambda one: one.to(device))

    def told(self, sizes: Float[Tensor, "batch 6"]) -> "Conditioning":
        """The same with "sizes": height and width of each original image, top and left of its crop, its own again.

        For families whose network is told of them; without, it is told of images that were drawn at this size.
        """
        return Conditioning({**self.prompt, "sizes": sizes}, {**self.negative, "sizes": sizes})

    def only_negative(self) -> "Conditioning":
        """The conditioning whose prompt is what guidance pushes away from."""
        return Conditioning(self.negative, self.negative)

    def both(self) -> "Conditioning":
        """All negative rows, then all rows of the prompts: what one forward needs for guidance."""
        joined = {name: torch.cat([self.negative[name], one]) for name, one in self.prompt.items()}
        return Conditioning(joined, joined)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        prompt, negative = ({name: change(one) for name, one in part.items()} for part in (self.prompt, self.negative))
        return Conditioning(prompt, negative)


def join_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of several, one after the other."""
    prompts, negatives = [part.prompt for part in parts], [part.negative for part in parts]
    return Conditioning(
        {name: torch.cat([one[name] for one in prompts]) for name in prompts[0]},
        {name: torch.cat([one[name] for one in negatives]) for name in negatives[0]},
    )


@dataclass(frozen=True)
class Trajectory:
    """A finished rollout: every point on the way, and how likely each step was under the policy that drew it."""

    latents: Float[Tensor, "nodes batch c h w"]
    log_probs: Float[Tensor, "steps batch"]
    conditioning: Conditioning
    grid: Grid
    predictions: Float[Tensor, "steps batch _ h w"] | None = None
    """The guided network output of each step, if it was kept; without gradient."""
    negatives: Float[Tensor, "steps batch _ h w"] | None = None
    """The output under the negative conditioning of each step, if it was kept; without gradient."""
    live: Mapping[int, Output] = field(default_factory=dict[int, Tensor])
    """The guided output of the steps whose graph was kept, ready to be differentiated: a forward less in training."""

    @property
    def x_0(self) -> Float[Tensor, "batch c h w"]:
        """The final latents."""
        return self.latents[-1]


@dataclass(frozen=True)
class StepOutput:
    """What a trainer's loss hands to `fit`: the scalar to descend, one loss per sample, and what to log.

    `sample_losses` lets `fit` name the record behind a loss that is not finite. Metrics are detached scalars on the
    training device; their names are those of `training/log.py`.
    """

    loss: Float[Tensor, ""]
    sample_losses: Float[Tensor, " batch"]
    metrics: dict[str, Float[Tensor, ""]]
