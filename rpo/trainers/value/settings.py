"""The settings of the value network."""

from rpo.config.ranges import Count, Fraction, LearningRate, WholeNumber
from rpo.config.settings import settings


@settings
class ValueConfig:
    """The value network V(t, x_t, x0_hat, prompt)."""

    uses_reward: bool = True
    """Whether the reward of the predicted clean image enters V: V = c_skip(t) r(x0_hat) + c_out(t) F, which is exact at
    the data end. It costs a decoding and a reward per step and image, and for `pathwise` needs a reward that can be
    differentiated. Off learns V alone."""

    reward_until: Fraction = 0.5
    """Time, 0 (data) to 1 (noise), up to which x0_hat is asked about. Where x0_hat is still a blur its reward says
    nothing, and costs a decoding all the same: look where `value/explained_variance` by time falls to 0."""

    sees_latents: bool = False
    """Whether F sees the noisy and the predicted clean latents and the prompt, beside the time, what the group earned
    and the reward of x0_hat. Without them it learns in one rollout how far that reward can be trusted, where latents
    take thousands of images. `pathwise` needs them."""

    trace: Fraction = 1.0
    """What V is fitted to: 1 is how it ended, 0 the value of the next node, between is the traced mixture of both."""

    learning_rate: LearningRate = 1e-3
    """Of the value network; 3e-4 to 3e-3."""

    updates: WholeNumber = 20
    """Optimiser steps on V per rollout; 5 to 50."""

    batch_size: Count = 256
    """Nodes per such step."""

    pretrain_rollouts: WholeNumber = 4
    """Rollouts from which V is learnt before the policy moves; 0 to 20. They count as cost."""
