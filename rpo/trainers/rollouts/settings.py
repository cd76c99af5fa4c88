"""The settings of every algorithm that draws what it learns from: how rollouts are drawn, how steps are learnt."""

from collections.abc import Mapping
from dataclasses import field, replace
from typing import ClassVar, Literal

from rpo.config.ranges import BelowOne, Count, Fraction, GuidanceScale, NotNegative, Side, Text
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.evaluation.watch import WatchConfig
from rpo.process.categorical import Order
from rpo.trainers.settings import LearningConfig, TrainingConfig

Solver = Literal["ddim", "euler_maruyama", "dpm_solver"]
Spacing = Literal["checkpoint", "uniform", "random"]

LOOK = 2
"""How often each watched prompt is drawn at a look; once where rollouts do so."""

MOST_OF_FEW = 0.5
"""Share of a few images, drawn to look at, that may fail: if more of them do, a rollout hardly fares better."""


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

    resolution: Side | tuple[Side, Side] | None = None
    """Size of the images in pixels: a side, or [height, width]; nothing means the checkpoint's own."""

    solver: Solver = "ddim"
    """The reverse step: the exact DDIM kernel, Euler-Maruyama, or DPM-Solver++ (second order and deterministic, for
    trainers that need no transition density)."""

    eta: NotNegative = 1.0
    """Noise level of the rollouts: 1 is the reverse SDE, 0 the ODE. Only what is learnt at 1 may be sampled with
    another level or solver afterwards; below 1 it also stays partly tied to the initial noise. For flow models
    lambda = eta²; Flow-GRPO's a is eta = a / √2."""

    guidance_scale: GuidanceScale = 3.0
    """Classifier-free guidance while drawing; 1 is none and halves the cost. 3 for `shapes`, 5 to 7.5 for Stable
    Diffusion; 3.5 for FLUX.1 [dev], whose network is told it and which costs no less at 1."""

    order: Order = "policy"
    """Of a model of tokens: who says which are kept in a step, so that the likelihood of their order is trained with
    theirs; or the reference, for a forward more in each step that is drawn, so that only kept tokens are learnt."""

    batch_size: Count = 64
    """Images drawn at once; lower it when memory runs out. It changes speed, not images."""

    reward_batch_size: Count | None = None
    """Images that a reward is asked about at once; nothing means all of a rollout, which most rewards divide further.
    Lower it when a reward of your own runs out of memory."""

    rewards_leave: bool = False
    """Whether reward models leave the accelerator between rollouts, for the memory; they come back in a second or so
    for each of a few GB. Those that come with rpo do."""

    max_failed: BelowOne = 0.1
    """Share of a rollout's images, over all processes, that a reward may answer NaN for, because it could not judge
    them. They are left out, as if they had not been drawn, and counted (`reward/failed`). With more of them the run
    stops and names the reward; at 0 the first one stops it."""

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

    def of_few(self, prompts: int, images_per_prompt: int) -> "RolloutConfig":
        """The same with fewer images to look at, of which as many may fail as of a whole rollout, up to a half."""
        may_fail = min(self.max_failed * self.images / (prompts * images_per_prompt), MOST_OF_FEW)
        return replace(self, prompts=prompts, images_per_prompt=images_per_prompt, max_failed=may_fail)

    @property
    def ends_without_noise(self) -> bool:
        """Whether a step to perfectly clean data adds no noise: DDIM's does not, Euler-Maruyama's does."""
        return self.solver == "ddim"

    @property
    def has_density(self) -> bool:
        """Whether a step of these rollouts has a transition density, which likelihoods and ratios need."""
        return self.eta > 0 and self.solver != "dpm_solver"


@settings
class StepsConfig:
    """Which steps of a rollout are learnt from, and how."""

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

    def __post_init__(self):
        """Refuse settings that no update can have."""
        if self.keep_graph and self.minibatches * self.passes != 1:
            raise InputError(
                f"steps.keep_graph with minibatches {self.minibatches} and passes {self.passes}: the graph of the "
                "rollout is that of its weights, so it serves one update; set both to 1, or keep_graph: false"
            )
        if self.window is not None and not self.window[0] < self.window[1]:
            raise InputError(f"steps.window is {self.window}, but it must rise within 0 … 1, such as (0, 0.5)")

    @property
    def updates_per_rollout(self) -> int:
        """Optimiser steps for which one rollout serves."""
        return self.minibatches * self.passes


@settings
class MonitorConfig(WatchConfig):
    """What is watched of a run that draws: an alarm is a fall while the trained reward rises."""

    prompts: Count = 32
    """Prompts that are looked at, each drawn twice; 32 to 128. More see a smaller fall."""

    every: Count | None = 8
    """Rollouts from one look to the next; 2 to 16. Nothing means never."""

    canaries: bool = True
    """Whether rewards are tried on noise before the first update, which none that reads prompts may prefer to the
    images of the model."""


@settings
class OnlineLearningConfig(LearningConfig):
    """How long and how fast it learns."""

    micro_batch: Count = 64
    """Latents (image and time) that go through the denoiser at once in training, at most: the largest equal parts that
    fit are taken. Lower it when memory runs out. With `steps.keep_graph` it is the rollout's `batch_size`."""


@settings
class OnlineConfig(TrainingConfig):
    """What the settings of every algorithm begin with that draws what it learns from."""

    renamed: ClassVar[dict[str, str]] = {
        **TrainingConfig.renamed,
        **{f"learning.{name}": f"it is steps.{name} now" for name in vars(StepsConfig)["__annotations__"]},
        "measure_kl": "the KL is always measured; leave it out",
    }

    learning: OnlineLearningConfig = field(default_factory=OnlineLearningConfig)
    """How it learns."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How images are drawn."""

    steps: StepsConfig = field(default_factory=StepsConfig)
    """Which of their steps are learnt from, and how."""

    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is watched beside the reward."""

    gates: Mapping[str, Text] = field(default_factory=dict[str, str])
    """When a reward counts: {aesthetic: "ocr > 0.9"} lets it count only for images for which another reward is above a
    number. GRPO, and the objectives of endpoint other than bound."""

    kl_weight: NotNegative = 0.0
    """Weight of the distance from the reference against the reward, in nats of the whole path. 0 leaves the reference
    out; its size depends on the reward's: start where reward gained and cost are of one size."""

    @property
    def watched_images(self) -> int:
        """Images of one look at the watched prompts, over all processes."""
        return 0 if self.monitor.every is None else self.monitor.prompts * min(LOOK, self.rollout.images_per_prompt)

    @property
    def guidance_scale(self) -> float:
        """Guidance of the trained prediction."""
        given = self.steps.guidance_scale
        return self.rollout.guidance_scale if given is None else given

    @property
    def freezes_negative(self) -> bool:
        """Whether the negative branch of the trained prediction comes from the rollout."""
        return self.steps.freeze_negative and self.guidance_scale > 1

    def require_same_guidance(self, why: str) -> None:
        """Refuse to train at another guidance than the rollouts'."""
        if self.guidance_scale != self.rollout.guidance_scale:
            raise InputError(
                f"steps.guidance_scale is {self.guidance_scale:g}, but the rollout's is "
                f"{self.rollout.guidance_scale:g}: {why}; leave it out"
            )

    def require_group(self, instead: str) -> None:
        """Refuse groups of one image."""
        if self.rollout.images_per_prompt == 1:
            raise InputError(
                f"rollout.images_per_prompt is 1, but a group is the images of one prompt; give 2 or more, or {instead}"
            )

    def require_density(self, instead: str) -> None:
        """Refuse rollouts whose steps have no likelihood."""
        if not self.rollout.has_density:
            raise InputError(
                f"rollout.solver is {self.rollout.solver} with eta {self.rollout.eta}, whose steps have no transition "
                f"density, but this algorithm needs likelihoods; set eta above 0 with ddim or euler_maruyama, or "
                f"{instead}"
            )
