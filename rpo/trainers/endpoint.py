"""Learning from whole images: what was drawn is noised afresh, and fitted by what it is worth.

It needs no path, so images may come from any solver, and a gradient at a noised moment has far less noise than that of
a path's step. What is descended is one of two things, by `objective.kind`:

score_as_action: score as action's likelihood gradient, averaged over the paths that end in an image; exact where the
policy is the reversal of the noising process, as the base model and the optimum at eta 1 are:

    loss = A(t, x_t) KL( q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t) ),        A = r(x_0) - baseline,

where the baseline is what the other images of the prompt earned, or V(t, x_t). V has the smaller variance: close to the
data x_t shows how it will end, so V takes away nearly all of what r - m says there, which is noise; and since
E[A | x_t] = 0 with the right V, images that turned out badly do not push the policy away from everything that looked
like them. On `shapes` the two trained equally well. See `rpo.trainers.rollouts.likelihood`.

All others (nft, awm, ram, rvm, par, dgpo, rebel): published objectives as points of one update, see
`rpo.objectives.endpoint.update`:

    gradient = E Jᵀ[ a (v̄ - v*) + Σ b (v - v_anchor) ] / D

whose old policy is a copy of the adapter that follows it slowly.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import final

from rpo.objectives.endpoint.bound import Bound, endpoint
from rpo.objectives.endpoint.update import Preset, Times, descend
from rpo.rewards import RewardLike
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.draw import OnImages
from rpo.trainers.rollouts.lag import OldPolicy
from rpo.trainers.rollouts.likelihood import LikelihoodWorth
from rpo.trainers.rollouts.noised import NoisedImages
from rpo.trainers.rollouts.prompts import PromptSource
from rpo.trainers.rollouts.published import PublishedWorth
from rpo.trainers.rollouts.steps import Steps, mean_loss, replayed, transition_by
from rpo.trainers.trainer import Run
from rpo.trainers.value.estimator import ValueEstimator
from rpo.training.state import Stateful
from rpo.types import StepOutput

HOLD = 0.25
"""In units of `kl_weight`: how much every image is fitted whatever it is worth. On Gaussian problems a quarter to 1
reaches the optimum, 0 drifts among policies that draw the same images, and 2 narrows what is drawn."""

PATIENCE = 10
"""Updates after which policy and old policy must differ."""


@final
class Endpoint(OnlineAlgorithm):
    """Learns from a reward by what whole images are worth.

    Attributes:
        likelihood: What moments are worth by the bound; None for the other objectives.
        published: What they are worth to one of those; None for the bound.
    """

    config: EndpointConfig
    replays = False

    def __init__(
        self,
        rewards: RewardLike,
        prompts: PromptSource,
        config: EndpointConfig | None = None,
        *,
        on_images: OnImages | None = None,
    ):
        """Keep what to learn from; see `OnlineAlgorithm`."""
        super().__init__(rewards, prompts, (config or EndpointConfig()).with_times(), on_images=on_images)

    @property
    def title(self) -> str:
        """Of the objective."""
        return self.config.objective.title

    @property
    def value(self) -> ValueEstimator | None:
        """V, or None where images are compared with their group."""
        return self.likelihood and self.likelihood.value

    @property
    def old(self) -> OldPolicy | None:
        """The slower copy, where the objective has one."""
        return self.published and self.published.old

    @property
    def preset(self) -> Preset | None:
        """The published objective, if it is one."""
        return None if isinstance(self.config.objective, Bound) else self.config.objective

    @property
    def said(self) -> frozenset[str]:
        """Those that the preset needs."""
        return frozenset(self.preset.needs) if self.preset else frozenset()

    @property
    def compares_each(self) -> bool:
        """Not by the bound, whose value is that of the sum."""
        return self.preset is not None

    @property
    def shares_steps(self) -> bool:
        """Whether the images of a prompt are learnt at the same times."""
        return self.preset is not None and self.preset.times.shared

    @property
    def skips_clean_end(self) -> bool:
        """Always: nothing is learnt at perfectly clean data."""
        return True

    @property
    def skips_last(self) -> bool:
        """Where the times are those of the rollout: of these the last is left out, wherever it leads."""
        return self.preset is not None and self.preset.times.of_rollout

    def start(self, run: Run) -> None:
        """Take the model, and make V, or the copy that follows the policy."""
        super().start(run)
        objective = self.config.objective
        self.likelihood = self.published = None
        self.noised = NoisedImages(self.collector, Times() if isinstance(objective, Bound) else objective.times)
        if isinstance(objective, Bound):
            self.likelihood = LikelihoodWorth(self.collector, self.noised, self.config, objective)
        else:
            guidance = self.config.reference_guidance
            self.published = PublishedWorth(self.collector, self.noised, objective, reference_guidance=guidance)

    def collect(self, index: int) -> Steps:
        """Draw rollout `index`, noise its images, and say what every such moment is worth."""
        if index == 0 and self.likelihood:
            self.likelihood.pretrained()
        with self.published.drawing() if self.published else nullcontext():
            rollout = self.collector.draw(index)
        steps, facts = self.noised.of(rollout, "trained"), self.collector.facts(rollout)
        facts["policy/kl"] = self.collector.measured_kl(rollout)
        if self.published is not None:
            steps, told = self.published.of(rollout, steps)
            facts |= told
        elif self.likelihood is not None:
            steps, learnt = self.likelihood.of(rollout, steps, updates=self.config.value.updates)
            facts |= learnt
        return replace(steps, facts={name: number.to(steps.x_t.device) for name, number in facts.items()})

    def loss(self, steps: Steps) -> StepOutput:
        """What has the gradients above, of a micro-batch of moments."""
        config, model = self.config, self.run.model
        prediction, transition = replayed(model, steps, self.noised.kernel, guidance_scale=config.guidance_scale)
        if self.published is not None:
            moments = self.published.moments(steps, prediction)
            per_moment, facts = descend(moments, self.published.preset.terms(moments))
            return mean_loss(per_moment, steps, {**steps.facts, **facts})
        assert isinstance(objective := config.objective, Bound)
        posterior = transition_by(model, steps["prediction"], steps, self.noised.kernel)
        kl_of_posterior = posterior.kl(transition)
        per_step = steps.weight * endpoint(
            kl_of_posterior,
            steps["advantage"] + objective.consistency + HOLD * steps["cost_weight"],
            reference_kl=steps.known.get("reference_kl"),
            clip=objective.clip or math.inf,
        )
        facts = {**steps.facts, "policy/bound": (steps.weight * kl_of_posterior.detach()).mean()}
        return mean_loss(per_step, steps, facts)

    def after(self, update: int, metrics: dict[str, float]) -> None:
        """Let the old policy follow."""
        if self.old is not None:
            self.old.follow()

    def guard(self, metrics: dict[str, float]) -> str | None:
        """What the monitor says; and stop a run that was to be held to an old policy which the policy never left."""
        if self.old is None or self.old.updates != PATIENCE or self.old.differs:
            return super().guard(metrics)
        return (
            f"after {self.old.updates} updates the policy equals its old self: nothing was learnt, or nothing holds; "
            "look at the rewards' spread, and raise learning.learning_rate or objective.old.rise"
        )

    @property
    def state(self) -> dict[str, Stateful]:
        """The rollout in use, V, and the old policy."""
        kept = {"value": self.value, "old": self.old}
        return super().state | {name: one for name, one in kept.items() if one is not None}
