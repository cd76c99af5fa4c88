"""The reward-gradient objectives: what is followed back, and the settings of each."""

from typing import Annotated

from pydantic import Field

from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.objectives.reward_gradient.alignprop import AlignProp
from rpo.objectives.reward_gradient.draft import Draft
from rpo.objectives.reward_gradient.refl import Refl
from rpo.objectives.reward_gradient.srpo import Srpo

RewardGradientObjective = Annotated[
    Draft | AlignProp | Refl | Srpo | AdjointMatching,
    Field(discriminator="kind"),
]
"""One of them, by its `kind`."""

AlongPath = Draft | AlignProp | AdjointMatching
"""Those that follow the slope back along the steps that were drawn."""
