"""The settings of region-weighted preference training: where a pair may pull, and what holds the rest."""

from typing import Annotated

from rpo.ranges import Fraction, NotNegative, Range, WholeNumber
from rpo.settings import settings


@settings
class RegionConfig:
    """Where the two images of a pair differ, and what becomes of the rest; see `rpo.objectives.region`."""

    is_on: bool = False
    """Weight errors by where the two images of a pair differ. For pairs of an image and its edit, whose images must
    have one size."""

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

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's prediction, not only its error, is needed."""
        return self.is_on and self.anchor > 0

    @property
    def key(self) -> str:
        """What decides about errors that are computed with it; empty if it is off."""
        return f"region {self.floor} {self.full_at} {self.soften}" if self.is_on else ""
