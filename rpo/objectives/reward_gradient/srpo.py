"""SRPO (Shen et al., arXiv:2509.06942): one step of a noised image, whose noise is known, judged by two wordings.

A drawn image is noised to x_t = α_t x_0 + σ_t ε. One step of the policy leads to x_s, forwards to less noise or
backwards to more, and as ε is known, the image behind it is found without any error of the network's:

    x_s = α_s x̂_0 + σ_s ε̂,        x = (x_s - σ_s ε) / α_s

so that rewards can be asked at any time, also early. They are asked about the same image with a good and a bad wording,

    R = (1 + k) r(x, good) - r(x, bad),        L = max(m - R, 0)

by which what the reward likes of every image falls out. Backwards the wordings change places: such a step moves the
image against the prediction, and what makes it better there is a penalty here.
"""

from typing import Annotated, ClassVar, Literal

from rpo.config.ranges import Finite, NotNegative, Range, Text
from rpo.config.settings import settings


@settings
class Srpo:
    """SRPO on the policy's own images, at times anywhere: two for each image, one of them backwards."""

    kind: Literal["srpo"] = "srpo"

    good: Text = "good"
    """Words before the prompt, for what is wanted, such as "realistic photo"."""

    bad: Text = "bad"
    """Words before the prompt, for what is not wanted."""

    bias: NotNegative = 0.1
    """K: how much more the wanted wording counts. The authors go from 0.1 to 0.25."""

    step: Annotated[float, Range(above=0, below=0.5)] = 0.1
    """Share of the process that the one step goes; images are noised to times that far from both ends."""

    margin: Finite | None = None
    """m, in units of the reward: images above it are left alone. 0.7 for HPSv2.1; nothing pushes every image."""

    title: ClassVar[str] = "SRPO"
    moments: ClassVar[int] = 2

    def worded(self, prompts: tuple[str, ...], *, is_good: bool) -> list[str]:
        """The prompts with one of the wordings."""
        return [f"{self.good if is_good else self.bad}. {prompt}" for prompt in prompts]
