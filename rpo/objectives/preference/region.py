"""Region weighting: learn from the places where the two images of a pair differ, and stay put elsewhere.

An image and its edit share most of their content. There the pair says nothing, and whatever gradient it has is noise,
or drift. With d the absolute difference of the two images on the latents' grid, a mask m in [floor, 1]:

    m = floor + (1 - floor) soften(min(1, d / full_at))
    e = mean over all dimensions of m (pred - target)²                     in place of the plain error
    anchor = mean over all dimensions of (1 - m) (pred - reference pred)²  what else may not move

The mean runs over all dimensions, not over the mask: beta keeps its meaning per dimension, and m = 1 everywhere is
plain DPO to the bit (which two unrelated images come near).
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rpo.config.ranges import Fraction, NotNegative, Range, WholeNumber
from rpo.config.settings import settings
from rpo.types import StepOutput


@settings
class RegionConfig:
    """Where the two images of a pair differ, and what becomes of the rest. For pairs of an image and its edit."""

    floor: Fraction = 0.1
    """Weight of places where the two images are equal, 0 up to 1; 1 is plain training. 0 to 0.3."""

    full_at: Annotated[float, Range(above=0, at_most=1)] = 0.1
    """Difference, of the range of the pixels, from which on a place counts fully, above 0 up to 1. Small finds faint
    edits and the noise of JPEG files; two unrelated images count fully nearly everywhere."""

    soften: WholeNumber = 1
    """Cells of the latent grid (8 pixels each) over which the region fades beyond its edge; 0 to 3."""

    anchor: NotNegative = 1.0
    """Weight, in units of beta/2, of the squared distance of the prediction from the reference's where the images do
    not differ; 0 leaves those places free. 0.1 to 10. Needs the reference's prediction at every visit, and so cannot go
    with `draws_per_pair`."""

    def mask(self, difference: Float[Tensor, "pairs h w"]) -> Float[Tensor, "pairs 1 h w"]:
        """The mask of each pair."""
        return region_mask(difference, floor=self.floor, full_at=self.full_at, soften=self.soften)

    def anchored(self, output: StepOutput, distance: Float[Tensor, " twice_batch"], beta: float) -> StepOutput:
        """A loss with what holds the places where the images do not differ.

        Args:
            output: The preference loss of N pairs.
            distance: Squared distance from the reference's prediction outside the region, of both sides of each pair.
            beta: As it counts in the loss.
        """
        anchor = distance.view(2, -1).sum(dim=0)
        added = self.anchor * 0.5 * beta * anchor
        metrics = {**output.metrics, "dpo/anchor": anchor.mean().detach()}
        return StepOutput(output.loss + added.mean(), output.sample_losses + added.detach(), metrics)


def region_mask(
    difference: Float[Tensor, "batch h w"], *, floor: float, full_at: float, soften: int
) -> Float[Tensor, "batch 1 h w"]:
    """The mask of each pair, in [floor, 1].

    Args:
        difference: From `grid_difference`.
        floor: Weight where the images are equal, 0 to 1; 1 is no mask.
        full_at: Difference, of the range of the pixels, from which on a place counts fully, > 0.
        soften: Cells by which the region fades beyond its edge, >= 0. A latent sees more pixels than those of its own
            cell.
    """
    region = (difference[:, None] / full_at).clamp(max=1.0)
    if soften:
        width = 2 * soften + 1
        around = F.avg_pool2d(F.pad(region, (soften,) * 4, mode="replicate"), width, stride=1)
        region = torch.maximum(region, around)  # the region itself keeps its weight
    return 1 - (1 - floor) * (1 - region)  # exactly 1 in the region
