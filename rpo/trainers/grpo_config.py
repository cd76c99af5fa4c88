"""The settings of GRPO and DDPO, refused at once when no run can have them."""

from typing import Literal

from rpo.config.ranges import Count, Positive
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.advantages import Scale
from rpo.trainers.rollouts.settings import OnlineConfig


@settings
class GRPOConfig(OnlineConfig):
    """Settings of `GRPO`. The defaults are the method as it is usually run; see `configs/grpo_shapes.yaml`."""

    baseline: Literal["group", "prompt_history"] = "group"
    """What an image's reward is compared with: the other images of its prompt in the same rollout (GRPO), or what its
    prompt has earned in recent rollouts (DDPO)."""

    scale: Scale = "batch"
    """What the difference is divided by: the spread of its group (counts every prompt alike and blows up small
    differences), that of the whole rollout, or nothing. With "prompt_history" it is the prompt's own spread."""

    history: Count = 32
    """Rewards that are remembered per prompt, for "prompt_history"; 16 to 64."""

    clip: Positive = 1e-4
    """Of the ratio per dimension. 1e-5 to 1e-3; times the latent's dimensions it is in nats, so raise it in proportion
    for small latents."""

    regression: Positive | None = None
    """η of REBEL on whole paths (arXiv:2404.16767), in place of the clip: how many of its standard deviations a
    reward is worth per nat of a path's likelihood, 0.1 to 10. Larger stays closer to the policy that drew. It
    pays with `steps.passes` above 1: the first pass over a rollout is a plain policy gradient."""

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        self.require_density("train by score-as-action with estimator: pathwise")
        self.require_same_guidance("the likelihood of what was drawn is that of the policy that drew it")
        if self.baseline == "group":
            self.require_group("baseline: prompt_history")
        if self.regression is not None and (self.baseline != "group" or self.steps.keep_graph):
            fault = "steps.keep_graph" if self.steps.keep_graph else f"baseline: {self.baseline}"
            raise InputError(
                f"regression is {self.regression:g} with {fault}, but it compares the images of a group and reads "
                "their steps anew in each pass; give baseline: group and steps.keep_graph: false"
            )
