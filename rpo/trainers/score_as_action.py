"""Score as action (Zhao et al., arXiv:2502.01819): policy gradients for diffusion models in continuous time.

The denoiser's score is the action of a control problem whose state is x_t; for a prompt it is to maximise

    J = E[ r(x_0) - kl_weight ∫ ½|u|² dt ],      u = (1+η²)/(2η) g (s_θ - s_ref),

where the running cost is the KL of the path from the reference's. V(t, x) is J from (t, x) on. Per rollout:

    draw     N steps of the policy, on a grid that may be another each time
    judge    r at the end; c_k, the cost of every step; V at every node
    learn    at K of the steps: Σ_k over the path, never a mean, so that the gradient does not depend on N
    value    fit V to what came of it, after it has been used

Differs from the authors' code, which has no running cost in the runs that use V, never follows the gradient of V, and
scales the advantages of every step apart: see `estimator`, `kl_weight` and `normalize`. What V sees at the data end is
the reward itself.

Only what was learnt at η = 1 may be sampled with another solver or noise level afterwards. Below 1 the score is tuned
for its own sampler, and x_0 keeps a memory of the initial noise (a factor α_T^{η²}: 0.07 at η = 1, 0.5 at η = 0.5 for
SD 1.5), by which the result falls short of r/kl_weight's tilt of the reference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rpo.models.base import DiffusionModel
from rpo.objectives.policy import Surrogate, clipped_surrogate, plain, trust_region
from rpo.objectives.score_as_action import endpoint, pathwise
from rpo.publishing.publish import PublishPlan
from rpo.rewards import RewardLike
from rpo.trainers.online import OnlineRun
from rpo.trainers.policy import Policy
from rpo.trainers.rollouts.draw import Rollout, rollout_facts, training_kernel
from rpo.trainers.rollouts.judging import Judged, judge, make_critic, trained_points
from rpo.trainers.rollouts.moments import current_prediction, step_cost, transition_of
from rpo.trainers.rollouts.noised import NoisedJudgement, judge_noised
from rpo.trainers.rollouts.points import Points
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.trust_region import TrustRegion
from rpo.trainers.value.estimator import Critic
from rpo.training.loop import TrainResult
from rpo.training.state import Stateful
from rpo.types import PerSample, StepOutput

NOISE_WARNING = (
    "rollouts at eta {eta:g}: what is learnt is right for this sampler only; sample the result with eta {eta:g} too, "
    "or train at eta 1, whose score any sampler may use"
)
"""Said once, where the noise level of the rollouts is not 1; `endpoint` learns for level 1 from any rollouts."""

HOLD = 0.25
"""Of `endpoint`, in units of `kl_weight`: how much every image is fitted whatever it is worth. On Gaussian problems a
quarter to 1 reaches the optimum, 0 drifts among policies that draw the same images, and 2 narrows what is drawn."""


def loss(
    points: Points, *, policy: Policy, config: ScoreAsActionConfig, region: TrustRegion, guidance_scale: float
) -> StepOutput:
    """The negative policy gradient of a micro-batch of points, by the estimator that the settings name."""
    model, kernel = policy.model, config.rollout_kernel
    noise_pred = current_prediction(model, points, guidance_scale)
    transition = transition_of(model, noise_pred, points, kernel)
    old = transition_of(model, points.prediction, points, kernel)
    facts = dict(points.facts or {})
    if config.estimator == "pathwise":
        assert points.value_gradient is not None
        per_point = pathwise(transition.mean - old.mean, points.value_gradient)
    elif config.estimator == "endpoint":
        assert points.advantage is not None and points.cost_weight is not None
        kl_of_posterior = old.kl(transition)
        per_point = endpoint(
            kl_of_posterior,
            points.advantage + config.consistency + HOLD * points.cost_weight,
            reference_kl=points.reference_kl,
            clip=config.bound_clip or math.inf,
        )
        facts["policy/bound"] = (points.weight * kl_of_posterior.detach()).mean()
        if points.reference_kl is not None:
            facts["policy/kl"] = (points.weight * (points.reference_kl - kl_of_posterior.detach())).mean()
    else:
        surrogate = _surrogate(transition.log_prob(points.x_s), points, config)
        per_point = surrogate.loss
        facts |= {"policy/ratio": surrogate.ratio.mean(), "policy/clipped": surrogate.is_clipped.float().mean()}
    if points.reference is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.explicit_cost):
            cost = step_cost(model, noise_pred, points.reference, points, kernel)
        facts["policy/kl"] = (points.weight * cost.detach()).mean()
        if config.explicit_cost:
            assert points.cost_weight is not None
            per_point = per_point + points.cost_weight * cost
    per_point = points.weight * per_point
    if config.learning.updates_per_rollout > 1:
        moved = points.weight * step_cost(model, noise_pred, points.prediction, points, kernel)
        facts["policy/kl_from_rollout"] = moved.detach().mean()
        if config.update == "trust_region":
            facts["policy/trust_region"] = moved.new_full((), region.coefficient)
            per_point = per_point + trust_region(moved, region.coefficient, power=config.trust_region_power)
    return StepOutput(per_point.mean(), per_point.detach(), facts)


def _surrogate(log_prob: PerSample, points: Points, config: ScoreAsActionConfig) -> Surrogate:
    assert points.advantage is not None
    num_dims = points.x_t[0].numel()
    if config.update == "clip":
        return clipped_surrogate(log_prob, points.log_prob, points.advantage, num_dims=num_dims, clip=config.clip)
    return plain(log_prob, points.log_prob, points.advantage, num_dims=num_dims)


@final
class ScoreAsActionTrainer:
    """Aligns a pipeline with a reward by continuous-time policy gradients.

    Afterwards `pipe` itself carries the adapter, active.

    Example:
        >>> trainer = ScoreAsActionTrainer(pipe, "jpeg-compressibility", prompts)    # doctest: +SKIP
        >>> trainer.train()                                                          # doctest: +SKIP
        >>> trainer.save("runs/mine/lora")                                           # doctest: +SKIP

    Attributes:
        config: The settings.
        run: The policy, its rollouts and the folder.
        critic: V, or None where the settings use no value.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | DiffusionModel,
        rewards: RewardLike,
        prompts: Sequence[str],
        config: ScoreAsActionConfig | None = None,
        *,
        value_network: nn.Module | None = None,
    ):
        """Check everything that can be checked before the first update, and add the adapter.

        Args:
            pipe: The pipeline to train, on the device to train on.
            rewards: What images are worth: a name, a callable (images, prompts) → numbers, or weights by name.
            prompts: To draw images of.
            config: The settings.
            value_network: F of the value, from `ValuePoints` to one number each; the package's own by default.

        Raises:
            ValueError: If the pipeline, the rewards, the prompts or the settings cannot be trained with.
        """
        self.config = config or ScoreAsActionConfig()
        self.run = OnlineRun(pipe, rewards, prompts, self.config.online_settings())
        self.region = TrustRegion(self.config.trust_region_target)
        self.critic = self._critic(value_network) if self.config.uses_value else None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.settings.folder

    def train(self, *, resume: bool = False) -> TrainResult:
        """Run all updates.

        Args:
            resume: Continue a killed run in the same folder; on the CPU it ends in the same weights, bit for bit.

        Raises:
            PreflightError: The run cannot learn; said before the first update.
            RewardError: A reward fails; names the prompt, saves the image, and the last good state is kept.
            NonFiniteLossError: A loss is not finite; the last good state is kept.
            ValueError: The folder holds another run already.
        """
        config = self.config
        is_bound = config.estimator != "endpoint" and config.rollout.eta != 1
        lines = [NOISE_WARNING.format(eta=config.rollout.eta)] if is_bound else []
        state: dict[str, Stateful] = {"region": self.region}
        if self.critic is not None:
            state["critic"] = self.critic
        guidance, region = self.run.guidance_scale, self.region
        with self.run.claim(resume=resume, lines=lines):
            if self.critic is not None:  # a network of the caller's may differ between processes
                self.run.processes.broadcast(list(self.critic.network.parameters()))
            return self.run.fit(
                self.prepare,
                partial(loss, policy=self.run.policy, config=config, region=region, guidance_scale=guidance),
                resume=resume,
                state=state,
                on_update=self._after,
            )

    def plan(self) -> str:
        """What the run comes to, in a few lines."""
        return self.run.plan()

    def save(self, folder: str | PathLike[str] | None = None) -> Path:
        """Write what was trained, verified, with a model card and the settings.

        Args:
            folder: Where to; `lora` (or `pipeline`) in the run's folder by default.

        Returns:
            The folder: `pipe.load_lora_weights(folder)` reads it.
        """
        return self.run.save(folder)

    def publish(self, repo_id: str, *, push: bool = False, private: bool = True) -> PublishPlan:
        """Save and say what publishing would upload; upload it with `push=True`.

        Args:
            repo_id: "owner/name" on the Hugging Face Hub.
            push: Really upload; needs `hf auth login`.
            private: Whether a new repository is private.
        """
        return self.run.publish(repo_id, push=push, private=private)

    def prepare(self, index: int) -> Points:
        """Draw rollout `index`, from 0, and make its trained points; then fit V to it."""
        if index == 0:
            self._pretrain_value()
        rollout = self.run.draw(index)
        judged = self._judge(rollout)
        if isinstance(judged, NoisedJudgement):
            points = judged.points
        else:
            points = trained_points(judged, self.run, self.critic, self.config)
        facts = rollout_facts(rollout, self.run.processes)
        if "policy/kl" not in facts and points.reference is None and self.config.measure_kl:
            facts["policy/kl"] = self.run.measured_kl(rollout, training_kernel(self.config.rollout))
        facts |= self._learn_value(judged, self.config.value.updates)
        return replace(points, facts={name: number.to(points.x_t.device) for name, number in facts.items()})

    def _judge(self, rollout: Rollout) -> Judged | NoisedJudgement:
        run = self.run
        if self.config.estimator == "endpoint":
            return judge_noised(rollout, run, self.critic, self.config)
        return judge(
            rollout,
            run.steps,
            run.policy,
            self.critic,
            self.config,
            guidance_scale=run.guidance_scale,
            batch_size=run.batch_size,
        )

    def _learn_value(self, judged: Judged | NoisedJudgement, updates: int) -> Mapping[str, Tensor]:
        """Fit V to a rollout, after it has been used; says how good it was on it."""
        critic, value = self.critic, self.config.value
        if critic is None or judged.nodes is None:
            return {}
        if isinstance(judged, NoisedJudgement):
            returns = judged.returns.view_as(self.run.steps)
            return critic.fit(judged.nodes, returns, steps=updates, batch_size=value.batch_size)
        assert judged.values is not None
        return critic.fit_paths(
            judged.nodes,
            judged.values,
            judged.costs,
            loss=value.loss,
            trace=value.trace,
            steps=updates,
            batch_size=value.batch_size,
        )

    def _critic(self, network: nn.Module | None) -> Critic:
        return make_critic(
            self.run.model,
            self.run.rollouts.rewards,
            self.config.value,
            network,
            seed=self.config.seed,
            evidence=self.run.settings.evidence,
            processes=self.run.processes,
        )

    def _pretrain_value(self) -> None:
        """Fit V to rollouts of the policy before it moves."""
        if self.critic is None:
            return
        value = self.config.value
        for number in range(value.pretrain_rollouts):
            self._learn_value(self._judge(self.run.draw(-1 - number)), value.pretrain_updates)

    def _after(self, update: int, metrics: dict[str, float]) -> None:
        turns = self.config.learning.updates_per_rollout
        if self.config.update == "trust_region" and update % turns == 0:
            self.region.observe(metrics["policy/kl_from_rollout"])
