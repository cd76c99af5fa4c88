"""The settings of score-as-action, refused at once when no run can have them."""

from dataclasses import field
from pathlib import Path
from typing import Literal

from rpo.errors import InputError
from rpo.process.transition import Ddim, Kernel
from rpo.ranges import Count, Fraction, LearningRate, NotNegative, Positive, Seed, Text, WholeNumber
from rpo.settings import settings
from rpo.trainers.online_config import AdapterConfig, LearningConfig, RolloutConfig
from rpo.trainers.online_settings import OnlineSettings
from rpo.training.loop_config import LoopConfig

Estimator = Literal["pathwise", "likelihood", "likelihood_state_cost", "endpoint"]
Update = Literal["plain", "clip", "trust_region"]
AdvantageKind = Literal["value_difference", "return_minus_value", "gae", "group"]


@settings
class ValueConfig:
    """The value network V(t, x_t, x0_hat, prompt)."""

    design: Literal["cos_sin", "cos", "linear", "none"] = "cos_sin"
    """How the reward of the predicted clean image enters V: V = c_skip(t) r(x0_hat) + c_out(t) F, which is exact at the
    data end. It costs a decoding and a reward per step and image. "none" learns V alone."""

    reward_until: Fraction = 0.5
    """Time, 0 (data) to 1 (noise), up to which x0_hat is asked about. Where x0_hat is still a blur its reward says
    nothing, and costs a decoding all the same: look where `value/explained_variance` by time falls to 0."""

    branch: Literal["frozen", "differentiable"] = "frozen"
    """Whether the gradient of V flows through the reward of x0_hat too. The pathwise estimator is biased without it
    (unless the design is "none"); it needs a reward that can be differentiated."""

    inputs: Literal["x_t", "x0_hat", "both", "reward"] = "reward"
    """What F sees besides the time, what the group earned and the reward of x0_hat: the noisy latents, the predicted
    clean ones, or both, and then the prompt too. "reward" sees none of these: it learns in one rollout how far the
    reward of x0_hat can be trusted, where latents take thousands of images. `pathwise` needs latents."""

    through_denoiser: bool = True
    """Whether the gradient of V follows x0_hat back through the denoiser, as it must to be a gradient: one more forward
    and backward per trained step. Off takes x0_hat's own formula with the noise held fixed. Only `pathwise` asks."""

    loss: Literal["monte_carlo", "td0", "martingale"] = "monte_carlo"
    """What V is fitted to: how it ended, the value of the next node, or the traced mixture of both."""

    trace: Fraction = 0.9
    """Of "martingale": 0 is "td0", 1 is "monte_carlo"."""

    learning_rate: LearningRate = 1e-3
    """Of the value network; 3e-4 to 3e-3."""

    updates: WholeNumber = 20
    """Optimiser steps on V per rollout; 5 to 50."""

    batch_size: Count = 256
    """Nodes per such step."""

    channels: Count = 64
    """Width of F; 32 to 128."""

    pretrain_rollouts: WholeNumber = 4
    """Rollouts from which V is learnt before the policy moves; 0 to 20. They count as cost."""

    pretrain_updates: WholeNumber = 100
    """Optimiser steps on V for each of them."""

    @property
    def sees_x0_hat(self) -> bool:
        """Whether V depends on the predicted clean latents."""
        return self.inputs in ("x0_hat", "both") or (self.design != "none" and self.branch == "differentiable")


@settings
class ScoreAsActionConfig:
    """Settings of `ScoreAsActionTrainer`; the defaults are the method with its value network, on any checkpoint.

    What was found to learn fastest on `shapes` is in `configs/score_as_action_shapes.yaml`.
    """

    estimator: Estimator = "likelihood"
    """Which form of the policy gradient: along the slope of V (`pathwise`: any solver, no transition density), by
    likelihood with the sampled log-ratio as running cost, or by likelihood with the exact cost of each step and its
    explicit derivative. These three are the same gradient in expectation. `endpoint` is what the second is on average
    over all paths of the reverse SDE to the image that came out: it needs no path, so images may come from any solver,
    and has far less noise; exact where the policy is the reversal of the noising process, as the base model and the
    optimum at eta 1 are."""

    update: Update = "plain"
    """What is done with it: a plain step, PPO's clip on the ratio per dimension, or a penalty on the distance from the
    policy that drew the rollout, whose weight adapts. The last two are for several updates per rollout."""

    advantage: AdvantageKind = "gae"
    """What a step is worth in a likelihood estimator: how V changed over it, how it all ended minus V, the mixture
    (`trace`), or how the image compares with others of its prompt (no V is used)."""

    trace: Fraction = 0.9
    """Of "gae"; 0 is "value_difference", 1 "return_minus_value"."""

    normalize: Literal["none", "batch", "per_step"] = "batch"
    """Scale of the advantages: as they are, divided by one number per rollout, or by one number per step, which
    preconditions the gradient over time (the authors' code does; it is another objective)."""

    max_advantage: Positive | None = 5.0
    """Where a normalised advantage is cut; 3 to 10, nothing for no cut."""

    consistency: NotNegative = 0.0
    """Only for `endpoint`: weight of fitting every image as it came out, whatever its reward. For a policy that
    reverses the noising process this has no gradient on average; it holds the policy to being one. 0.1 to 0.5 where
    `bound_clip` is not to be used; more is noisier and trains the policy on its own images."""

    bound_clip: Positive | None = 0.3
    """Only for `endpoint`: how far an image may be pushed or pulled, as a share of what the reference has: where the
    bound of its likelihood has moved that far, a point says no more. 0.1 to 0.5; nothing for no limit, and then low
    rewards push without bound until the images break (watch `policy/kl` and `loop/grad_norm` rise together)."""

    kl_weight: NotNegative = 0.0
    """Weight of the running cost ∫½|u|², the KL from the reference along the path, against the reward; for `endpoint`
    of each image's log-ratio to the reference, whose mean that is and which two bounds tell. 0 leaves the reference
    out; its size depends on the reward's: start where reward gained and cost are of one size."""

    measure_kl: bool = True
    """Whether the KL is logged when its weight is 0; it is taken at every eighth of the trained points."""

    clip: Positive = 1e-4
    """Of the ratio per dimension, for update "clip". 1e-5 to 1e-3; times the latent's dimensions it is in nats."""

    trust_region_power: Literal["sqrt", "linear"] = "sqrt"
    """Penalty C √KL (the bound's own) or C KL, for update "trust_region"."""

    trust_region_target: Positive = 1.0
    """√KL per path that an update may move the policy; C grows above it and shrinks below."""

    value: ValueConfig = field(default_factory=ValueConfig)
    """The value network."""

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

    folder: Text = "runs/score_as_action"
    """The run's folder: metrics, previews, checkpoints and, after `save`, the LoRA."""

    seed: Seed = 0
    """Of the adapter's start, the rollouts and the value network."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """How long and how fast to train; see `LoopConfig`. Its `accumulate` is worked out from the rollout."""

    def __post_init__(self):
        """Refuse settings that no run can have."""
        self._check_guidance()
        if self.estimator == "pathwise":
            self._check_pathwise()
        elif self.estimator == "endpoint":
            self._check_endpoint()
        else:
            self._check_likelihood()
        if self.update == "trust_region" and self.learning.updates_per_rollout == 1:
            raise InputError(
                "update is trust_region with one update per rollout, before which the policy has not moved; set "
                "learning.minibatches or learning.passes above 1, or update: plain"
            )

    def _check_guidance(self) -> None:
        """Refuse to compare what was drawn at one guidance with what is trained at another."""
        given, drawn_at = self.learning.guidance_scale, self.rollout.guidance_scale
        if given is None or given == drawn_at:
            return
        several = self.learning.updates_per_rollout > 1
        if self.estimator == "pathwise" and (self.kl_weight > 0 or several or self.learning.keep_graph):
            raise InputError(
                f"learning.guidance_scale is {given}, but the rollout's is {drawn_at}: the path's cost, its distance "
                "from the rollout and its graph are those of the guidance it was drawn with; leave it out, or set "
                "kl_weight: 0, one update per rollout and learning.keep_graph: false"
            )

    def _check_pathwise(self) -> None:
        if self.update == "clip":
            raise InputError(
                "update is clip with the pathwise estimator, which has no ratio to clip; use plain or trust_region"
            )
        if self.value.design != "none" and self.value.branch == "frozen":
            raise InputError(
                f"estimator is pathwise with value.design {self.value.design} and a frozen reward branch, so the "
                "slope of V would lack the reward's part; set value.branch: differentiable (with a reward that can be "
                "differentiated), or value.design: none and value.inputs: both"
            )
        if self.value.inputs == "reward" and self.value.design == "none":
            raise InputError(
                "estimator is pathwise with value.inputs reward and value.design none, so V would not depend on the "
                "latents; set value.inputs: both"
            )

    def _check_endpoint(self) -> None:
        if self.update != "plain" or self.learning.keep_graph or self.learning.updates_per_rollout > 1:
            raise InputError(
                "estimator is endpoint, which learns at moments that no rollout passed through: it has no ratio and "
                "no graph of a rollout; set update: plain, learning.keep_graph: false, minibatches and passes: 1"
            )
        if self.advantage not in ("group", "return_minus_value"):
            raise InputError(
                f"estimator is endpoint with advantage {self.advantage!r}, but without a path nothing is known of the "
                'next moment; set advantage: "return_minus_value" or "group"'
            )

    def _check_likelihood(self) -> None:
        if not self.rollout.has_density:
            raise InputError(
                f"estimator is {self.estimator} with solver {self.rollout.solver} and eta {self.rollout.eta}, whose "
                "steps have no transition density; set eta above 0 with ddim or euler_maruyama, or estimator: pathwise"
            )
        trained = self.learning.guidance_scale
        if trained is not None and trained != self.rollout.guidance_scale:
            raise InputError(
                f"learning.guidance_scale is {trained}, but the rollout's is {self.rollout.guidance_scale}: the "
                f"likelihood of what was drawn is that of the policy that drew it; leave it out, or estimator: pathwise"
            )

    @property
    def explicit_cost(self) -> bool:
        """Whether the cost of a step is differentiated as such; a log-ratio is not, since its slope has mean 0."""
        return self.kl_weight > 0 and self.estimator in ("pathwise", "likelihood_state_cost")

    @property
    def rollout_kernel(self) -> Kernel:
        """The kernel in which a step is learnt: the rollout's, or for `endpoint` that of the reverse SDE."""
        from rpo.trainers.rollouts.draw import (
            training_kernel,
        )  # not at the top: settings are described without diffusers

        return Ddim(1.0) if self.estimator == "endpoint" else training_kernel(self.rollout)

    @property
    def _skips_clean_end(self) -> bool:
        """`endpoint` learns in the DDIM step, whatever draws."""
        return self.estimator == "endpoint" or (self.rollout.has_density and self.rollout.ends_without_noise)

    @property
    def uses_value(self) -> bool:
        """Whether V takes part in the gradient."""
        return self.estimator == "pathwise" or self.advantage != "group"

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
            skips_clean_end=self._skips_clean_end,
            has_ratio=self.estimator != "endpoint" and self.rollout.has_density,
            method="score as action",
            preflight=self.preflight,
        )
