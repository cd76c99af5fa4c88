"""What a noised moment of a whole image is worth by the bound on the image's likelihood, against its group or V.

With a KL weight the reward of an image loses kl_weight log p(x_0) / p_reference(x_0). Of both only bounds are known,
which miss the same where policy and reference reverse the noising process: their difference is the log-ratio.

    log p(x_0) / p_reference(x_0) = Σ_k KL(q ‖ p_reference) - KL(q ‖ p),    q = q(x_s | x_t, x_0)

The mean of this over the policy's images is the KL of the path. The KL of the steps at noised moments has that mean,
too, and is no function of x_0 alone: to weigh the gradient of an image with it optimises something else. The moments
that tell the log-ratio are not the trained ones, whose noise would be in both factors of that product.
"""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from rpo.objectives.endpoint.bound import Bound
from rpo.process.diffusion import require_gaussian
from rpo.process.prediction import to_x0_eps
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.noised import NoisedImages
from rpo.trainers.rollouts.steps import Steps, per_image, transition_by
from rpo.trainers.value import returns as returns_of
from rpo.trainers.value.inputs import ValuePoints, compared_with_others, node_time, others_mean
from rpo.trainers.value.returns import make_value, scaled
from rpo.types import Output, PerSample


@final
class LikelihoodWorth:
    """Says what moments are worth, and fits V to what came of them.

    Attributes:
        value: V, or None where images are compared with their group.
    """

    def __init__(self, collector: Collector, noised: NoisedImages, config: EndpointConfig, objective: Bound):
        """Make V if images are compared with it."""
        self.collector, self.noised, self.config, self.objective = collector, noised, config, objective
        uses_value = objective.baseline == "value"
        if uses_value:
            what = "a value of noised images (objective.baseline: value)"
            require_gaussian(collector.run.model, what, "give objective.baseline: group, or another objective.kind")
        self.value = make_value(collector, config.value, is_differentiable=False) if uses_value else None

    def pretrained(self) -> None:
        """Fit V to rollouts of the start, where the settings ask for them."""
        for number in range(self.config.value.pretrain_rollouts if self.value else 0):
            rollout = self.collector.draw(-1 - number)
            self.of(rollout, self.noised.of(rollout, "trained"), updates=returns_of.PRETRAIN_UPDATES)

    def of(self, rollout: Rollout, steps: Steps, *, updates: int) -> tuple[Steps, Mapping[str, Tensor]]:
        """The moments with their advantage; then V is fitted to them, and how good it was is told."""
        steps, returns, nodes = self._worth(rollout, steps)
        if self.value is None or nodes is None:
            return steps, {}
        targets = returns.view_as(self.collector.chosen)
        size = self.config.value.batch_size
        return steps, self.value.fit(nodes, targets, judged=rollout.judged, steps=updates, batch_size=size)

    def _worth(self, rollout: Rollout, steps: Steps) -> tuple[Steps, PerSample, ValuePoints | None]:
        """The moments, what came of each (its image's reward, less what its path costs), and V's inputs."""
        config, objective = self.config, self.objective
        has_moved = rollout.index >= 0  # in the rollouts before training the policy is the reference
        if objective.clip is not None and has_moved:
            steps = steps.knowing(reference_kl=self._kl(self.collector.reference(steps), steps))
        rewards = rollout.rewards
        if config.kl_weight > 0 and has_moved:
            rewards = rewards - config.kl_weight * self._log_ratio(rollout)
        returns, nodes = rewards[steps.image], None
        if self.value is None:
            baseline = compared_with_others(rewards, rollout.group)[steps.image]
        else:
            size = self.collector.batch_size
            nodes = self.value.ask_reward(self._seen(steps, rollout), batch_size=size)
            baseline = self.value.evaluate(nodes, batch_size=size)
        processes, is_judged = self.collector.run.processes, rollout.judged[steps.image]
        advantage, scale = scaled((returns - baseline)[None], objective.scale, processes, is_judged)
        return steps.knowing(advantage=advantage[0], cost_weight=config.kl_weight / scale[0]), returns, nodes

    def _kl(self, prediction: Output, steps: Steps) -> PerSample:
        """KL of what x_0 says of the step from what a prediction says: a term of the bound on -log p(x_0)."""
        model, kernel = self.collector.run.model, self.noised.kernel
        posterior = transition_by(model, steps["prediction"], steps, kernel)
        return posterior.kl(transition_by(model, prediction, steps, kernel))

    def _log_ratio(self, rollout: Rollout) -> PerSample:
        """The log-ratio of every image: by how much the policy's bound is the better one."""
        steps = self.noised.of(rollout, "log-ratio")
        gap = self._kl(self.collector.reference(steps), steps) - self._kl(self.noised.said(steps), steps)
        return per_image(steps.weight * gap / len(self.collector.chosen), steps, rollout.num_images)

    def _seen(self, steps: Steps, rollout: Rollout) -> ValuePoints:
        model = self.collector.run.model
        x0_hat, _ = to_x0_eps(self.noised.said(steps), steps.x_t, steps.t, model.prediction_type)
        others = others_mean(rollout.rewards, rollout.group)
        time = node_time(model, steps.t.timestep.flatten())
        baseline = None if others is None else others[steps.image]
        return ValuePoints(steps.x_t, x0_hat, time, steps.conditioning.tokens, steps.prompts, baseline=baseline)
