"""What a value sees of a moment of a rollout, and how much of what it says is the reward of the predicted image."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.types import PerSample

Design = Literal["cos_sin", "cos", "linear", "none"]
"""How the weight of the reward of x0_hat falls from the data end to the noise end; see `skip_weights`."""

TIME_BINS = (
    "value/explained_variance_1",
    "value/explained_variance_2",
    "value/explained_variance_3",
    "value/explained_variance_4",
)
"""Equal parts of the process in which the quality of V is told apart, from the data end on."""


@dataclass(frozen=True)
class ValuePoints:
    """Moments of rollouts as a value sees them; every row is one."""

    x_t: Float[Tensor, "points c h w"]
    x0_hat: Float[Tensor, "points c h w"]
    """The predicted clean latents; at the data end the clean latents themselves."""
    time: Float[Tensor, " points"]
    """1 at the noise end … 0 at the data end."""
    tokens: Float[Tensor, "points tokens dim"]
    prompts: tuple[str, ...]
    x0_reward: Float[Tensor, " points"] | None = None
    """What the reward says of `x0_hat`, where it has been asked already; see `Critic.ask_reward`."""
    baseline: Float[Tensor, " points"] | None = None
    """What the other images of the prompt earned in the same rollout, where there are others."""

    def __len__(self) -> int:
        """Number of points."""
        return self.x_t.shape[0]

    def select(self, index: Int[Tensor, " picked"]) -> "ValuePoints":
        """Some of the points, in the order asked for.

        Args:
            index: Rows, on the CPU: the prompts are looked up there, and reading them off a device would wait for it.
        """
        rows = index.to(self.x_t.device)
        return ValuePoints(
            self.x_t[rows],
            self.x0_hat[rows],
            self.time[rows],
            self.tokens[rows],
            tuple(self.prompts[row] for row in index.tolist()),
            None if self.x0_reward is None else self.x0_reward[rows],
            None if self.baseline is None else self.baseline[rows],
        )


def skip_weights(design: Design, time: Float[Tensor, " points"]) -> tuple[PerSample, PerSample]:
    """(c_skip, c_out): the weights of the reward of x0_hat and of the learnt part.

    Args:
        design: "cos_sin" (what the authors chose), "cos" and "linear" go from (1, 0) at the data end to (0, 1) at the
            noise end; "none" is (0, 1) everywhere.
    """
    cos = torch.cos(0.5 * math.pi * time)
    if design == "cos_sin":
        return cos, torch.sin(0.5 * math.pi * time)
    if design == "cos":
        return cos, 1 - cos
    if design == "linear":
        return 1 - time, time
    return torch.zeros_like(time), torch.ones_like(time)
