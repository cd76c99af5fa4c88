"""Images as inline addresses, small enough that hundreds fit into one page, and what changed between two of them.

Small images, such as those of the embedded world, stay as they are, pixel for pixel; photographs are shrunk and
compressed. The difference is taken of the original pixels, so that compression does not show in it.
"""

import base64
import io

import numpy as np
from PIL import Image

AMPLIFICATION = 4
"""Factor of the difference: a change by a quarter of the range is as bright as can be."""

EXACT_SIDE = 128
"""Images up to this side are kept as PNG, larger ones as WebP."""

_QUALITY = 80


def shown(image: Image.Image, side: int) -> str:
    """An image as a `data:` address.

    Args:
        side: Longest side that a larger image is shrunk to; at least `EXACT_SIDE`.
    """
    buffer = io.BytesIO()
    if max(image.size) <= EXACT_SIDE:
        image.save(buffer, "PNG", optimize=True)
        return _address("png", buffer)
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "WEBP", quality=_QUALITY)
    return _address("webp", buffer)


def difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """The absolute difference of two RGB images of one size, times `AMPLIFICATION`; black where nothing changed.

    Example:
        >>> difference(Image.new("RGB", (1, 1), (9, 0, 0)), Image.new("RGB", (1, 1), (4, 0, 90))).getpixel((0, 0))
        (20, 0, 255)
    """
    one, other = (np.asarray(image, np.int16) for image in (first, second))
    return Image.fromarray((np.abs(one - other) * AMPLIFICATION).clip(0, 255).astype(np.uint8))


def _address(kind: str, data: io.BytesIO) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode("ascii")
