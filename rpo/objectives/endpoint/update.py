"""One update under the endpoint objectives that people publish: fit a network at noised images to what these are worth.

    gradient = E_{x_0, t, ε}  Jᵀ[ a (v̄ - v*) + Σ b (v - v_anchor) ] / D,        J = ∂v/∂θ

x_0 is a drawn image, noised afresh to x_t; v is what the network says there, in whatever it predicts (noise, velocity),
v* what a network would say that knows x_0, v̄ the policy's own v or that of the slower copy it draws with. The worth of
the image is in a, the trust region in b: the anchor is that slower copy or the reference. An objective is a choice of
these five; the factors of a and b that depend on time are its weights. D dimensions are averaged over, not summed, as
all authors do: a and b do not depend on the size of the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rpo.config.ranges import NotNegative, Range
from rpo.config.settings import settings
from rpo.objectives.advantages import Scale
from rpo.process.diffusion import Diffusion
from rpo.types import Latents, Node, Output, PerSample

Copy = Literal["old", "reference", "current"]
"""Whose prediction it is: a slower copy of the policy, the reference, the policy before this update."""

COPIES: tuple[Copy, ...] = get_args(Copy)

LEAST_DISTANCE = 1e-5
"""Below which a mean distance from x_0 weighs no more."""


@settings
class LagConfig:
    """How the old policy follows: old ← d old + (1 - d) policy after update k, with d = min(decay, rise · k)."""

    decay: Annotated[float, Range(above=0, below=1)] = 0.5
    """How much of it stays, in the long run. Close to 1 it is the start, and the policy is held there."""

    rise: Annotated[float, Range(above=0, at_most=1)] = 1e-3
    """How fast the decay gets there, per update; before that the old policy is nearly the policy itself."""

    def at(self, update: int) -> float:
        """The decay after so many updates, from 1."""
        return min(self.decay, self.rise * update)


@dataclass(frozen=True)
class Ranked:
    """How rewards become advantages."""

    scale: Scale
    """What the difference from the group's mean is divided by."""
    clip: float | None = 5.0
    factor: float = 1.0
    """By which it is multiplied afterwards."""

    def __call__(self, normalized: PerSample) -> PerSample:
        """Of rewards that are centred and scaled."""
        return self.factor * (normalized if self.clip is None else normalized.clamp(-self.clip, self.clip))


@dataclass(frozen=True)
class Times:
    """Where images are noised to."""

    count: int | None = None
    """Times for each image, drawn at random without repeating; nothing means all."""
    window: tuple[float, float] | None = None
    """Share of the way from noise (0) to data (1)."""
    of_rollout: bool = False
    """The rollout's own grid; or else one even in time, moved at random."""
    shared: bool = False
    """Whether the images of a prompt have times and noise in common."""


@dataclass(frozen=True)
class Moments:
    """Noised images and what is said there, a row each; only `prediction` has a gradient."""

    prediction: Output
    target: Output
    """v*."""
    x_t: Latents
    t: Node
    time: Float[Tensor, " batch"]
    """In [0, 1], 0 at the data."""
    worth: Float[Tensor, " batch"]
    """Of the image, as the objective's `worth` gave it."""
    diffusion: Diffusion
    said: Mapping[Copy, Output] = field(default_factory=dict[Copy, Output])
    """The predictions of those that the objective needs."""
    counts: Float[Tensor, " batch"] | float = 1.0
    """What each counts in a mean, 0 where nobody knows what the image is worth."""

    def error(self, prediction: Output) -> PerSample:
        """‖v - v*‖² / D."""
        return self.diffusion.error(prediction, self.target, self.x_t)

    def x0_error(self, prediction: Output) -> tuple[PerSample, PerSample]:
        """‖x̂_0 - x_0‖² / D, and the mean distance |x̂_0 - x_0|."""
        squared, far = self.diffusion.x0_error(prediction, self.target, self.x_t, self.t)
        return squared, far.clamp(min=LEAST_DISTANCE)

    @property
    def x0_slope(self) -> PerSample:
        """(∂x̂_0/∂v)²: what an error of v counts as one of x̂_0."""
        return self.diffusion.x0_slope(self.t).square().flatten()


@dataclass(frozen=True)
class Terms:
    """a and b of a micro-batch, each with its weights."""

    pull: Float[Tensor, " batch"]
    """a."""
    holds: Mapping[Copy, Float[Tensor, " batch"] | float] = field(default_factory=dict[Copy, PerSample | float])
    """b of each anchor."""
    from_old: bool = False
    """Whether v̄ is that of the old policy."""
    is_clipped: Bool[Tensor, " batch"] | None = None
    """Where a clip has set a to 0, if there is one."""


class Preset(Protocol):
    """A published objective."""

    @property
    def kind(self) -> str:
        """Its name in a configuration."""
        ...

    title: ClassVar[str]
    """What a person calls it."""
    ranked: ClassVar[Ranked]
    times: ClassVar[Times]

    @property
    def old_draws_after(self) -> int | None:
        """After how many updates images are drawn by the old policy; nothing means never."""
        ...

    @property
    def needs(self) -> frozenset[Copy]:
        """Whose predictions it asks for."""
        ...

    @property
    def lag(self) -> LagConfig | None:
        """How the old policy follows, if there is one."""
        ...

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """What each moment is worth, where that depends on the others of its group.

        Args:
            errors: ‖v - v*‖² / D of those that are needed.
            group: Equal for the images of one prompt at one time.
        """
        ...

    def terms(self, moments: Moments) -> Terms:
        """A and b."""
        ...


def descend(moments: Moments, terms: Terms) -> tuple[PerSample, dict[str, Tensor]]:
    """What has the gradient above, by moment, and how large its parts are: its value means nothing.

    Returns:
        The surrogate Σ v · sg[a (v̄ - v*) + Σ b (v - v_anchor)] / D; and the root mean squares of both parts, over the
        moments that count.
    """
    now = moments.prediction.detach()
    pulled = moments.said["old"] if terms.from_old else now
    diffusion, x_t = moments.diffusion, moments.x_t
    pull = _rows(terms.pull) * diffusion.gap(pulled, moments.target, x_t)
    hold = torch.zeros_like(pull)
    for anchor, weight in terms.holds.items():
        hold = hold + _rows(weight) * diffusion.gap(now, moments.said[anchor], x_t)
    surrogate = diffusion.mean((pull + hold).detach() * moments.prediction, x_t)
    counts = _rows(moments.counts)
    sizes = {"policy/pull": pull, "policy/hold": hold}
    facts = {name: (counts * part.square()).mean().sqrt() for name, part in sizes.items()}
    if terms.is_clipped is not None:
        facts["policy/clipped"] = (moments.counts * terms.is_clipped).mean()
    if "old" in moments.said:
        facts["policy/old_deviation"] = (now - moments.said["old"]).square().mean()
    return surrogate, facts


def held(weights: Mapping[Copy, float]) -> dict[Copy, float]:
    """B of each anchor by the weight of ‖v - v_anchor‖² / D in a loss; one of weight 0 is none."""
    return {name: 2 * weight for name, weight in weights.items() if weight}


def own_advantage(advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
    """The `worth` of a moment that is its image's advantage, whatever the others of its group are."""
    return advantage


def clipped_by(ratio: PerSample, worth: PerSample, clip: float) -> Bool[Tensor, " batch"]:
    """Where PPO's clip leaves no gradient: the ratio of likelihoods has left 1 ± clip in the direction of the worth."""
    return (ratio - 1) * worth.sign() > clip


def group_means(values: PerSample, group: Int[Tensor, " batch"]) -> tuple[PerSample, PerSample]:
    """For each the mean over its group, and how many are in it; labels are whole numbers of no particular order."""
    sizes = group.bincount().to(values)
    sums = values.new_zeros(len(sizes)).index_add(0, group, values)
    return (sums / sizes)[group], sizes[group]


def _rows(weight: PerSample | float) -> Tensor | float:
    return weight[:, None, None, None] if isinstance(weight, Tensor) else weight


ReferenceWeight = NotNegative
"""Weight of ‖v - v_reference‖² / D against the pull."""
