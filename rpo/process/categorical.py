"""Grids of tokens with masks: a masked-token generator as a diffusion, whose steps have a likelihood.

Forward, a share sigma of the tokens is masked (MaskGIT, arXiv:2202.04200; aMUSEd, arXiv:2401.01808). Backward, a step
asks the network about all M masked places at once, draws a token for each, and keeps k of them:

    tokens      x_i ~ p_θ(· | x_t)                            at every masked place i
    order       the k most confident by log p_θ(x_i) + T g_i,  g_i Gumbel noise, T the temperature

What is kept depends on the policy, too, so that the likelihood of a step is that of its tokens *and* of the order in
which they were kept, which Gumbel noise makes a Plackett-Luce draw (arXiv:1903.06059, eq. 3): with u_i = log p(x_i) / T

    log p = Σ_masked log p(x_i) + Σ_{j ≤ k} ( u_{π_j} - log Σ_{i not kept before j} exp u_i ).

Where all are kept, their order is nobody's choice. Or else the order is that of a frozen reference, by how sure it is
of each place before anything is drawn: then only the kept tokens are the policy's, log p = Σ_kept log p(x_i), which has
far less variance and costs a forward of the reference in each step that is drawn.

A state has three channels: the tokens, -1 where masked; what the last step drew at each place; and when it was kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rpo.errors import InputError
from rpo.process.prediction import Reduction, Weight
from rpo.process.schedule import check_inside
from rpo.process.transition import Kernel, Step, check_noise_level
from rpo.types import Latents, Node, Output, PerSample

TOKENS, DRAWN, RANK = range(3)
"""Channels of a state."""

CHANNELS = 3
MASK = -1

NUM_TRAIN_TIMESTEPS = 1000
"""The unit of a node's timestep, which no network is told."""

TEMPERATURE = 2.0
"""Of the order at the noise end, at noise level 1, as in diffusers' pipeline; it falls to 0 at the data end."""

NEVER = -1e9
"""Utility of a place that cannot be kept; finite, so that its gradient is no NaN."""

Masking = Literal["cosine", "linear"]
Order = Literal["policy", "reference"]


@final
@dataclass(frozen=True)
class MaskingProcess:
    """The share of masked tokens in continuous time: sin(π t / 2), or t."""

    schedule: Masking = "cosine"

    start, end = 1.0, 0.0

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Share that is seen."""
        return 1 - self.sigma(t)

    def sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Share that is masked."""
        check_inside(t, 0.0, 1.0)
        return t if self.schedule == "linear" else (t * math.pi / 2).sin()

    def drift(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rate d log(alpha) / dt at which tokens are masked."""
        slope = torch.ones_like(t) if self.schedule == "linear" else math.pi / 2 * (t * math.pi / 2).cos()
        return -slope / self.alpha(t)

    def diffusion(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Refused: masks are no Gaussian noise."""
        raise InputError("masked tokens have no Gaussian noise; expected a diffusion or flow model")

    def timestep(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """In units that no network is told."""
        return t * NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Unmasking:
    """The step of a masked-token generator; see above.

    At noise level 0 the order has no noise, hence no likelihood of its own.
    """

    eta: float = 1.0
    order: Order = "policy"
    reference: Callable[[Latents, Node], Output] | None = None
    """Logits of the reference at x_t, where steps are drawn in its order."""

    def __post_init__(self) -> None:
        """Refuse a negative noise level."""
        check_noise_level(self.eta)

    @property
    def has_density(self) -> bool:
        """True with noise, or in the reference's order."""
        return self.eta > 0 or self.order == "reference"

    def __call__(self, log_probs: Output, x_t: Latents, /, t: Node, s: Node) -> "Unmasked":
        """The transition by log-probabilities [batch, codebook, h, w] at x_t."""
        confidence = None
        if self.order == "reference" and self.reference is not None:
            confidence = self.reference(x_t, t).log_softmax(dim=1).amax(dim=1).flatten(1)
        temperature = TEMPERATURE * self.eta * _rows(s, x_t) / (1 - _rows(t, x_t) + _rows(s, x_t)).clamp_min(1e-6)
        kept = kept_count(x_t, s.sigma.flatten().expand(len(x_t)))
        return Unmasked(log_probs, x_t, kept, temperature, self.order, confidence)


def _rows(node: Node, x_t: Latents) -> Float[Tensor, "batch 1"]:
    """The time of each row, in [0, 1]."""
    return (node.timestep.flatten().expand(len(x_t)) / NUM_TRAIN_TIMESTEPS)[:, None]


def kept_count(x_t: Latents, sigma: PerSample) -> Int[Tensor, " batch"]:
    """How many tokens a step to the masked share sigma keeps; as in diffusers one stays masked until sigma is 0."""
    places, masked = x_t[0, 0].numel(), is_masked(x_t).sum(dim=1)
    left = (places * sigma).floor().long().minimum(masked - 1).clamp_min(1)
    return masked - torch.where(sigma > 0, left, 0)


def is_masked(state: Latents) -> Bool[Tensor, "batch places"]:
    """Where a state has no token."""
    return state[:, TOKENS].flatten(1) < 0


@dataclass(frozen=True)
class Unmasked:
    """The law of the next state; see above."""

    log_probs: Float[Tensor, "batch codebook h w"]
    """One channel is the tokens themselves, of who knows them."""
    x_t: Float[Tensor, "batch 3 h w"]
    kept: Int[Tensor, " batch"]
    """How many tokens are kept."""
    temperature: Float[Tensor, "batch 1"]
    order: Order = "policy"
    confidence: Float[Tensor, "batch places"] | None = None
    """The reference's, where steps are drawn in its order."""

    @property
    def num_dims(self) -> int:
        """Places of the grid."""
        return self.x_t[0, 0].numel()

    def sample(self, noise: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """The state that unit Gaussian noise selects: its first channel the tokens, its second the order."""
        masked, seen = is_masked(self.x_t), self.x_t[:, TOKENS].flatten(1)
        cumulative = self.log_probs.flatten(2).float().exp().cumsum(dim=1)
        level = _log_normal_cdf(noise[:, TOKENS].flatten(1).float()).exp() * cumulative[:, -1]
        drawn = (cumulative < level[:, None]).sum(dim=1).clamp_max(cumulative.shape[1] - 1).to(seen)
        drawn = torch.where(masked, drawn, seen)
        if self.order == "reference" and self.confidence is None:
            raise InputError("the reference that says the order is not there; expected Unmasking(reference=...)")
        sure = log_prob_of(self.log_probs, drawn) if self.confidence is None else self.confidence
        gumbel = -(-_log_normal_cdf(noise[:, DRAWN].flatten(1).float())).log()
        wanted = torch.where(masked, sure + self.temperature * gumbel, -math.inf)
        rank = wanted.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        tokens = torch.where(masked & (rank >= self.kept[:, None]), float(MASK), drawn)
        return torch.stack([tokens, drawn, rank.to(tokens)], dim=1).view_as(self.x_t)

    def log_prob(self, x_s: Float[Tensor, "batch 3 h w"]) -> PerSample:
        """Of the tokens and their order, as above; NaN where an order without noise has no likelihood."""
        masked = is_masked(self.x_t)
        if self.order == "reference":
            kept = masked & ~is_masked(x_s)
            return (log_prob_of(self.log_probs, x_s[:, TOKENS].flatten(1)) * kept).sum(dim=1)
        said = log_prob_of(self.log_probs, x_s[:, DRAWN].flatten(1))
        of_tokens = (said * masked).sum(dim=1)
        utility = torch.where(masked, said / self.temperature.clamp_min(1e-12), NEVER)
        place = torch.where(masked, x_s[:, RANK].flatten(1), math.inf).argsort(dim=1, stable=True)
        utility = utility.gather(1, place)
        remaining = utility.flip(1).logcumsumexp(dim=1).flip(1)
        is_kept = torch.arange(utility.shape[1], device=utility.device) < self.kept[:, None]
        of_order = torch.where(is_kept, utility - remaining, 0.0).sum(dim=1)
        of_order = torch.where(self.temperature[:, 0] > 0, of_order, math.nan)
        return of_tokens + torch.where(self.kept == masked.sum(dim=1), 0.0, of_order)

    def kl(self, other: "Unmasked") -> PerSample:
        """KL(self ‖ other) of the tokens; that of the order comes on top and is not counted.

        In the reference's order the kept ones count, each masked place as likely as any other to be one.
        """
        masked = is_masked(self.x_t)
        if self.log_probs.shape[1] == 1:
            per_place = -log_prob_of(other.log_probs, self.log_probs[:, 0].flatten(1))
        else:
            per_place = kl_of(self.log_probs, other.log_probs)
        count = (per_place * masked).sum(dim=1)
        return count if self.order == "policy" else count * self.kept / masked.sum(dim=1).clamp_min(1)


def kl_of(log_p: Output, log_q: Output) -> Float[Tensor, "batch places"]:
    """KL(p ‖ q) at each place, as Σ p log p/q - p + q: no part of it is negative, and its slope is 0 where p is q."""
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) - p + q).sum(dim=1).flatten(1)


def log_prob_of(log_probs: Output, tokens: Float[Tensor, "batch places"]) -> Float[Tensor, "batch places"]:
    """Log-probability of the token at each place; of masks that of some token, which is for nobody to read."""
    return log_probs.flatten(2).gather(1, tokens.clamp_min(0).long()[:, None])[:, 0]


def _wide(output: Output) -> Output:
    """In float32 or better."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _log_normal_cdf(z: Tensor) -> Tensor:
    """Log Φ(z), without loss in either tail."""
    return torch.special.log_ndtr(z)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


@dataclass(frozen=True)
class MaskedDiffusion:
    """See `rpo.process.diffusion.Diffusion`; an output is logits [batch, codebook, h, w], or of who knows x_0 tokens.

    Its error is the deviance -2 log p(x_0) at the masked places, a mean over them: what the squared error is to a
    Gaussian of unit variance. Half of its gradient is J ᵀ (p - e), with p the probabilities and e the token, as it is
    Jᵀ(v - v*) there, so that every objective which is made of the two holds for tokens as it stands.
    """

    is_gaussian = False

    @property
    def reversal(self) -> Kernel:
        """Tokens that are seen in an order which is not the policy's."""
        return Unmasking(order="reference")

    def kernel(self, solver: str, eta: float, order: Order = "policy") -> Kernel:
        """There is one way to draw, whatever solver latents would have."""
        return Unmasking(eta, order)

    def num_dims(self, shape: tuple[int, ...]) -> int:
        """Places of the grid."""
        return torch.Size(shape[1:]).numel()

    def start(self, noise: Latents) -> Latents:
        """Masks alone."""
        state = torch.zeros_like(noise)
        state[:, TOKENS] = MASK
        return state

    def noised(self, x_0: Latents, noise: Latents, node: Node) -> Latents:
        """With a share sigma masked, at least one token; noise says which, and in which order they will be seen."""
        tokens, places = x_0[:, TOKENS].flatten(1), x_0[0, 0].numel()
        sigma = node.sigma.flatten().expand(len(x_0))
        count = torch.where(sigma > 0, (places * sigma).round().clamp_min(1), 0.0)
        rank = noise[:, DRAWN].flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        masked = rank >= places - count[:, None]
        return torch.stack([torch.where(masked, float(MASK), tokens), tokens, rank.to(tokens)], dim=1).view_as(x_0)

    def target(self, x_0: Latents, noise: Latents, node: Node) -> Output:
        """The tokens."""
        return x_0[:, : TOKENS + 1]

    def x0_hat(self, output: Output, x_t: Latents, node: Node) -> Latents:
        """The likeliest token at every masked place."""
        likeliest = output[:, 0] if output.shape[1] == 1 else output.argmax(dim=1).to(x_t)
        tokens = torch.where(x_t[:, TOKENS] < 0, likeliest, x_t[:, TOKENS])
        return torch.stack([tokens, tokens, torch.zeros_like(tokens)], dim=1)

    def error(
        self, output: Output, target: Output, x_t: Latents, weight: Weight = None, *, reduction: Reduction = "mean"
    ) -> PerSample:
        """Deviance from the tokens, or twice the KL from another output."""
        said, masked = _wide(output).log_softmax(dim=1), is_masked(x_t)
        if target.shape[1] == 1:
            per_place = -2 * log_prob_of(said, target[:, 0].flatten(1))
        else:
            per_place = 2 * kl_of(_wide(target).log_softmax(dim=1), said)
        weighted = per_place * masked if weight is None else per_place * masked * weight.flatten(1)
        total = weighted.sum(dim=1)
        return total / masked.sum(dim=1).clamp_min(1) if reduction == "mean" else total

    def x0_error(self, output: Output, target: Output, x_t: Latents, node: Node) -> tuple[PerSample, PerSample]:
        """Of probabilities: squares, and the total variation 1 - p(x_0)."""
        gap = self.gap(output, target, x_t)
        return self.mean(gap.square(), x_t), self.mean(gap.abs() / 2, x_t)

    def x0_slope(self, node: Node) -> Tensor:
        """1: what is fitted is what is seen."""
        return torch.ones_like(node.sigma)

    def gap(self, output: Output, other: Output, x_t: Latents) -> Output:
        """P - e, or the difference of two p, at the masked places."""
        mine = _wide(output).softmax(dim=1)
        if other.shape[1] == 1:
            token = other.long().clamp_min(0)
            difference = mine.scatter_add(1, token, -torch.ones_like(token, dtype=mine.dtype))
        else:
            difference = mine - _wide(other).softmax(dim=1)
        return difference * (x_t[:, TOKENS : TOKENS + 1] < 0)

    def mean(self, values: Output, x_t: Latents) -> PerSample:
        """Sum over the codebook, mean over the masked places."""
        masked = is_masked(x_t)
        return (values.sum(dim=1).flatten(1) * masked).sum(dim=1) / masked.sum(dim=1).clamp_min(1)

    def transition(self, output: Output, x_t: Latents, t: Node, s: Node, kernel: Step) -> "Unmasked":
        """By the logits, or the tokens themselves."""
        known = output.shape[1] == 1
        found = kernel(output if known else _wide(output).log_softmax(dim=1), x_t, t, s)
        assert isinstance(found, Unmasked)
        return found

    def running_cost(self, output: Output, other: Output, x_t: Latents, t: Node, s: Node) -> PerSample:
        """The KL of the tokens, which needs no likelihood of their order."""
        mine, theirs = (self.transition(one, x_t, t, s, Unmasking(0.0)) for one in (output, other))
        return mine.kl(theirs)
