"""The settings that every online trainer shares: how rollouts are drawn, and how their moments are learnt from."""

from typing import Literal

from rpo.errors import InputError
from rpo.ranges import Count, Fraction, GuidanceScale, Names, NotNegative, Positive
from rpo.settings import settings

Solver = Literal["ddim", "euler_maruyama", "dpm_solver"]
Spacing = Literal["checkpoint", "uniform", "random"]


@settings
class RolloutConfig:
    """How images are drawn to learn from."""

    prompts: Count = 16
    """Prompts per rollout, over all processes; 8 to 64. Each is drawn `images_per_prompt` times: its group."""

    images_per_prompt: Count = 4
    """Images of one prompt in one rollout, which are compared with each other; 2 to 24. More give a better baseline."""

    num_steps: Count = 10
    """Denoising steps of a rollout; 5 to 50. Fewer are cheaper, and what is learnt carries over to other numbers."""

    max_steps: Count | None = None
    """With it, every rollout draws its number of steps anew, from `num_steps` to this; needs `spacing` other than
    "checkpoint" and a fixed number of trained steps."""

    spacing: Spacing = "checkpoint"
    """Where the steps lie: as the checkpoint's own scheduler puts them, evenly in time, or evenly with random moves
    (redrawn for every rollout, so that training sees all times of the continuous process)."""

    solver: Solver = "ddim"
    """The reverse step: the exact DDIM kernel, Euler-Maruyama, or DPM-Solver++ (second order and deterministic, for
    trainers that need no transition density)."""

    eta: NotNegative = 1.0
    """Noise level of the rollouts: 1 is the reverse SDE, 0 the ODE. Only what is learnt at 1 may be sampled with
    another level or solver afterwards; below 1 it also stays partly tied to the initial noise. For flow models
    lambda = eta²; Flow-GRPO's a is eta = a / √2."""

    guidance_scale: GuidanceScale = 3.0
    """Classifier-free guidance while drawing; 1 is none and halves the cost. 3 for `shapes`, 5 to 7.5 for Stable
    Diffusion."""

    batch_size: Count = 64
    """Images drawn at once; lower it when memory runs out. It changes speed, not images."""

    def __post_init__(self):
        """Refuse settings that no rollout can have."""
        if self.solver == "ddim" and self.eta > 1:
            raise InputError(
                f"rollout.eta is {self.eta} with solver ddim, whose step adds at most the noise of eta 1; set it "
                "to 0 … 1, or take euler_maruyama"
            )
        if self.max_steps is not None and (self.max_steps < self.num_steps or self.spacing == "checkpoint"):
            raise InputError(
                f"rollout.max_steps is {self.max_steps} with num_steps {self.num_steps} and spacing {self.spacing!r}, "
                'but it must be at least num_steps, with spacing "uniform" or "random"; change one of them'
            )
        if self.solver == "dpm_solver" and (self.spacing != "checkpoint" or self.eta != 0):
            raise InputError(
                f"rollout.solver is dpm_solver with eta {self.eta} and spacing {self.spacing!r}, but it is an ODE "
                'solver with steps of its own; set eta: 0 and spacing: "checkpoint"'
            )

    @property
    def images(self) -> int:
        """Images of one rollout, over all processes."""
        return self.prompts * self.images_per_prompt

    @property
    def ends_without_noise(self) -> bool:
        """Whether a step to perfectly clean data adds no noise: DDIM's does not, Euler-Maruyama's does."""
        return self.solver == "ddim"

    @property
    def has_density(self) -> bool:
        """Whether a step of these rollouts has a transition density, which likelihoods and ratios need."""
        return self.eta > 0 and self.solver != "dpm_solver"


@settings
class LearningConfig:
    """How the moments of a rollout are learnt from."""

    train_steps: Count | None = None
    """Steps of each trajectory that are trained, drawn at random and weighted by 1/probability; nothing means all. A
    third to a half is the largest saving there is: the gradient stays the same in expectation."""

    window: tuple[Fraction, Fraction] | None = None
    """Share of the trajectory from which trained steps come, 0 (noise) to 1 (data), such as (0, 0.5). Nothing means
    the whole. Outside it nothing is learnt, which biases the gradient; MixGRPO and Flow-GRPO-Fast do it for speed."""

    guidance_scale: GuidanceScale | None = None
    """Guidance of the trained prediction; nothing means that of the rollout, as the likelihood of what was drawn
    needs."""

    freeze_negative: bool = True
    """Whether the negative branch of guidance has no gradient: its output is taken from the rollout, which saves half
    of the training forwards. Off is DDPO's own gradient."""

    keep_graph: bool = False
    """Whether the rollout's own forwards are differentiated, which saves every training forward (the same gradient).
    Needs memory for the activations of all trained steps, and one update per rollout."""

    minibatches: Count = 1
    """Optimiser steps per pass over a rollout."""

    passes: Count = 1
    """Passes over a rollout; more reuse what was drawn, and need a clip or a trust region."""

    micro_batch: Count = 64
    """Latents (image and time) that go through the denoiser at once in training, at most: the largest equal parts that
    fit are taken. Lower it when memory runs out. With `keep_graph` it is the rollout's `batch_size`."""

    def __post_init__(self):
        """Refuse settings that no update can have."""
        if self.keep_graph and self.minibatches * self.passes != 1:
            raise InputError(
                f"learning.keep_graph with minibatches {self.minibatches} and passes {self.passes}: the graph of the "
                "rollout is that of its weights, so it serves one update; set both to 1, or keep_graph: false"
            )
        if self.window is not None and not self.window[0] < self.window[1]:
            raise InputError(f"learning.window is {self.window}, but it must rise within 0 … 1, such as (0, 0.5)")

    @property
    def updates_per_rollout(self) -> int:
        """Optimiser steps for which one rollout serves."""
        return self.minibatches * self.passes


@settings
class AdapterConfig:
    """What is trained."""

    train: Literal["lora", "full"] = "lora"
    """A LoRA adapter, or all weights of the denoiser (which keeps a frozen copy as reference)."""

    rank: Count = 16
    """Of the LoRA; 4 to 64."""

    alpha: Positive | None = None
    """Strength of the LoRA; nothing means `rank`, the one value on which every program that loads LoRAs agrees."""

    target_modules: Names | None = None
    """Name endings of the layers that get a LoRA; nothing means the attention projections."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third slower, several times less memory."""
