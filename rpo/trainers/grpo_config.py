"""The settings of GRPO and DDPO, refused at once when no run can have them."""

from dataclasses import field
from pathlib import Path
from typing import Literal

from rpo.errors import InputError
from rpo.objectives.advantages import Scale
from rpo.ranges import Count, NotNegative, Positive, Seed, Text, WholeNumber
from rpo.settings import settings
from rpo.trainers.online_config import AdapterConfig, LearningConfig, RolloutConfig
from rpo.trainers.online_settings import OnlineSettings
from rpo.training.loop_config import LoopConfig


@settings
class GRPOConfig:
    """Settings of `GRPOTrainer`. The defaults are the method as it is usually run; see `configs/grpo_shapes.yaml`."""

    baseline: Literal["group", "prompt_history"] = "group"
    """What an image's reward is compared with: the other images of its prompt in the same rollout (GRPO), or what its
    prompt has earned in recent rollouts (DDPO)."""

    scale: Scale = "batch"
    """What the difference is divided by: the spread of its group (counts every prompt alike and blows up small
    differences), that of the whole rollout, or nothing. With "prompt_history" it is the prompt's own spread."""

    history: Count = 32
    """Rewards that are remembered per prompt, for "prompt_history"; 16 to 64."""

    min_history: Count = 16
    """Rewards that a prompt needs before its own statistics count; the whole rollout's do until then."""

    max_advantage: Positive = 5.0
    """Where an advantage is cut; 3 to 10."""

    clip: Positive = 1e-4
    """Of the ratio per dimension. 1e-5 to 1e-3; times the latent's dimensions it is in nats, so raise it in proportion
    for small latents."""

    kl_weight: NotNegative = 0.0
    """Weight of the KL from the reference, summed over the path; its gradient goes through the policy. 0 leaves the
    reference out."""

    measure_kl: bool = True
    """Whether the KL is logged when its weight is 0; it is taken at every eighth of the trained points."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How images are drawn."""

    learning: LearningConfig = field(default_factory=LearningConfig)
    """How they are learnt from."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained."""

    preview_every: WholeNumber = 20
    """Updates between image grids of fixed prompts and seeds in `previews/`; 0 for none."""

    preflight: bool = True
    """Whether rewards, likelihoods, gradients and memory are checked before the first update, on a small rollout."""

    folder: Text = "runs/grpo"
    """The run's folder: metrics, previews, checkpoints and, after `save`, the LoRA."""

    seed: Seed = 0
    """Of the adapter's start and the rollouts."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """How long and how fast to train; see `LoopConfig`. Its `accumulate` is worked out from the rollout."""

    def __post_init__(self):
        """Refuse settings that no run can have."""
        if not self.rollout.has_density:
            raise InputError(
                f"rollout.solver is {self.rollout.solver} with eta {self.rollout.eta}, whose steps have no transition "
                "density, but GRPO needs likelihoods; set eta above 0 with ddim or euler_maruyama, or train by "
                "score-as-action with estimator: pathwise"
            )
        trained = self.learning.guidance_scale
        if trained is not None and trained != self.rollout.guidance_scale:
            raise InputError(
                f"learning.guidance_scale is {trained}, but the rollout's is {self.rollout.guidance_scale}: the "
                "likelihood of what was drawn is that of the policy that drew it; leave it out"
            )
        if self.baseline == "group" and self.rollout.images_per_prompt == 1:
            raise InputError(
                "rollout.images_per_prompt is 1, but a group is the images of one prompt; give 2 or more, or "
                "baseline: prompt_history"
            )
        if not 1 < self.min_history <= self.history:
            raise InputError(
                f"min_history is {self.min_history} and history {self.history}, but 2 <= min_history <= history is "
                "needed; 16 and 32 are usual"
            )

    def online_settings(self) -> OnlineSettings:
        """What this has in common with every online trainer."""
        return OnlineSettings(
            rollout=self.rollout,
            learning=self.learning,
            adapter=self.adapter,
            loop=self.loop,
            preview_every=self.preview_every,
            folder=Path(self.folder),
            seed=self.seed,
            whole=self,
            skips_clean_end=self.rollout.ends_without_noise,
            has_ratio=True,
            method="GRPO" if self.baseline == "group" else "DDPO",
            preflight=self.preflight,
        )
