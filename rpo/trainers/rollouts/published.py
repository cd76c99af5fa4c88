"""What noised moments are worth to a published objective, and whose predictions there it asks for.

All of it is found out once, when the rollout is drawn: old policy and reference do not move while it is learnt from. An
image that could not be judged is nobody's company in its group.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor

from rpo.objectives.endpoint.update import COPIES, Copy, Moments, Preset
from rpo.process.diffusion import diffusion_of
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.compared import ranked_in_groups, share_facts
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.lag import OldPolicy
from rpo.trainers.rollouts.noised import NoisedImages
from rpo.trainers.rollouts.steps import Steps
from rpo.trainers.value.inputs import node_time
from rpo.types import Output


@final
class PublishedWorth:
    """Says what moments are worth to a preset.

    Attributes:
        old: The slower copy, where the objective has one.
    """

    def __init__(
        self, collector: Collector, noised: NoisedImages, preset: Preset, *, reference_guidance: float | None = None
    ):
        """Make the copy.

        Args:
            reference_guidance: Of what the reference says; that of training by default.
        """
        self.collector, self.noised, self.preset = collector, noised, preset
        self._reference_guidance = reference_guidance
        self.old = None if preset.lag is None else OldPolicy(collector.run.policy.parameters, preset.lag)

    def drawing(self) -> AbstractContextManager[None]:
        """Around what draws images: the old policy, from when the objective has it draw."""
        after = self.preset.old_draws_after
        draws = self.old is not None and after is not None and self.old.updates >= after
        return self.old.in_place() if self.old is not None and draws else nullcontext()

    def of(self, rollout: Rollout, steps: Steps) -> tuple[Steps, Mapping[str, Tensor]]:
        """The moments with what the preset needs: who says what there, and what each is worth; and what to log."""
        preset, collector = self.preset, self.collector
        # Asked of the device first, which has little to do yet.
        judged = rollout.judged.to(steps.image.device)[steps.image].nonzero().flatten()
        said: dict[Copy, Output] = {}
        if "reference" in preset.needs:
            said["reference"] = collector.reference(steps, guidance_scale=self._reference_guidance)
        if "current" in preset.needs:
            said["current"] = self.noised.said(steps)
        if self.old is not None and "old" in preset.needs:
            with self.old.in_place():
                said["old"] = self.noised.said(steps)
        weights, group_size = collector.rollouts.rewards.weights, collector.config.rollout.images_per_prompt
        weighted = ranked_in_groups(rollout, weights, collector.run.processes, group_size, preset.ranked)
        ranked = torch.stack(list(weighted.values())).sum(dim=0)
        group = rollout.group[steps.image] * rollout.trajectory.grid.num_steps + steps.step
        advantage = ranked.to(group.device)[steps.image]
        diffusion, target = diffusion_of(collector.run.model.prediction_type), steps["prediction"]
        errors = {name: diffusion.error(one, target, steps.x_t)[judged] for name, one in said.items()}
        worth = advantage.new_zeros(len(steps))
        worth[judged] = preset.worth(advantage[judged], errors, group[judged])
        return steps.knowing(worth=worth, **said), share_facts(weighted, collector.run.processes)

    def moments(self, steps: Steps, prediction: Output) -> Moments:
        """A micro-batch as the preset takes it."""
        model = self.collector.run.model
        return Moments(
            prediction,
            steps["prediction"],
            steps.x_t,
            steps.t,
            node_time(model, steps.t.timestep.flatten()),
            steps["worth"],
            diffusion_of(model.prediction_type),
            {name: steps[name] for name in COPIES if name in steps},
            counts=steps.counts,
        )
