"""ReFL (Xu et al., arXiv:2304.05977): the reward of the image that a late step predicts.

    L = -min(r(x̂_0(x_k)), m),        k random among the late steps

An image that is predicted to earn m or more is left alone; the authors' m is 2, for ImageReward. They weigh this by
0.001 against the pre-training loss on images of theirs; here `kl_weight` holds the policy, and needs no images.
"""

from typing import ClassVar, Literal

from rpo.config.ranges import Finite
from rpo.config.settings import settings


@settings
class Refl:
    """ReFL: one step of each image, among the last quarter unless `steps.window` says otherwise."""

    kind: Literal["refl"] = "refl"

    margin: Finite | None = None
    """m, in units of the reward; 2 for ImageReward. Nothing pushes every image."""

    title: ClassVar[str] = "ReFL"
