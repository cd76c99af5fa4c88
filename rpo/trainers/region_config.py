"""The settings of region-weighted preference training: where a pair may pull, and what holds the rest."""

from rpo.settings import settings


@settings
class RegionConfig:
    """Where the two images of a pair differ, and what becomes of the rest; see `rpo.objectives.region`."""

    is_on: bool = False
    """Weight errors by where the two images of a pair differ. For pairs of an image and its edit, whose images must
    have one size."""

    floor: float = 0.1
    """Weight of places where the two images are equal, 0 up to 1; 1 is plain training. 0 to 0.3."""

    full_at: float = 0.1
    """Difference, of the range of the pixels, from which on a place counts fully, above 0 up to 1. Small finds faint
    edits and the noise of JPEG files; two unrelated images count fully nearly everywhere."""

    soften: int = 1
    """Cells of the latent grid (8 pixels each) over which the region fades beyond its edge; 0 to 3."""

    anchor: float = 1.0
    """Weight, in units of beta/2, of the squared distance of the prediction from the reference's where the images do
    not differ; 0 leaves those places free. 0.1 to 10. Needs the reference's prediction at every visit, and so cannot go
    with `draws_per_pair`."""

    def __post_init__(self) -> None:
        """Refuse what cannot be a mask.

        Raises:
            ValueError: Naming the field, its value and what it must be.
        """
        if not 0 <= self.floor <= 1:
            raise ValueError(f"region.floor is {self.floor}, but it must be between 0 and 1; 0.1 is usual")
        if not 0 < self.full_at <= 1:
            raise ValueError(f"region.full_at is {self.full_at}, but it must be above 0 and at most 1; 0.1 is usual")
        if self.soften < 0:
            raise ValueError(f"region.soften is {self.soften}, but it must be >= 0; 1 is usual")
        if not self.anchor >= 0:
            raise ValueError(f"region.anchor is {self.anchor}, but it must be >= 0; give 0 for no anchor")

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's prediction, not only its error, is needed."""
        return self.is_on and self.anchor > 0

    @property
    def key(self) -> str:
        """What decides about errors that are computed with it; empty if it is off."""
        return f"region {self.floor} {self.full_at} {self.soften}" if self.is_on else ""
