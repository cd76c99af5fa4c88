"""Images that look alike: the difference hash of an image, and which of many are near-duplicates of an earlier one.

The hash has 64 bits: the image is shrunk to 9 × 8 grey pixels, and each bit says whether a pixel is darker than its
right neighbour. The same picture in another size or compression differs in 0 to 4 bits, another picture in about 32.

Hashes that differ in at most d bits agree in at least one of d + 1 bands of bits, so only those that share a band are
compared.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from rpo.data.pixels import grey
from rpo.errors import InputError

MAX_BITS = 15
"""Most bits that near-duplicates may differ in: with more, bands are too short to tell images apart."""

_SIDE = 8
_BITS = _SIDE * _SIDE


def look_of(image: Image.Image) -> str:
    """The difference hash of an image, as 16 hexadecimal digits.

    Example:
        >>> look_of(Image.new("RGB", (32, 32), "red"))
        '0000000000000000'
    """
    shrunk = np.asarray(grey(image).resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.int16)
    return np.packbits(shrunk[:, :-1] < shrunk[:, 1:]).tobytes().hex()


def are_first(looks: np.ndarray, groups: np.ndarray, bits: int) -> np.ndarray:
    """Which images are no near-duplicate of one that came before and is kept.

    Args:
        looks: Hashes, uint64, in their order.
        groups: Of each image a number; images of one group belong together and are no duplicates of each other.
        bits: That near-duplicates differ in at most; 0 to 4 find the same picture.

    Returns:
        True for each image that is kept.
    """
    if not 0 <= bits <= MAX_BITS:
        raise InputError(f"near-duplicates shall differ in at most {bits} bits; expected 0 to {MAX_BITS}; give 4")
    unique, first, inverse = np.unique(looks, return_index=True, return_inverse=True)
    order = np.argsort(first)
    kept = np.ones(len(unique), bool)
    # The same hash again is as its first one, which drops it or belongs with it.
    for one, other in _alike(unique[order], groups[first[order]], bits):
        if kept[one]:
            kept[other] = False
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return kept[place[inverse]] & (groups == groups[first[inverse]])


def _alike(looks: np.ndarray, groups: np.ndarray, bits: int) -> Iterator[tuple[int, int]]:
    """Places of two images that look alike, the earlier one first; in the order of the later ones."""
    found = [np.empty((2, 0), np.int64)]
    edges = np.linspace(0, _BITS, bits + 2).astype(int)
    for low, high in zip(edges, edges[1:], strict=False):
        band = looks >> np.uint64(low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, at, step = band[order], np.arange(len(looks)), 1
        while len(at := at[at + step < len(looks)]):  # each with the one so many places further in its band
            at = at[band[at] == band[at + step]]
            one, other = order[at], order[at + step]
            alike = (np.bitwise_count(looks[one] ^ looks[other]) <= bits) & (groups[one] != groups[other])
            found.append(np.stack([one[alike], other[alike]]))
            step += 1
    first, second = np.concatenate(found, axis=1)
    order = np.lexsort((first, second))
    return zip(first[order].tolist(), second[order].tolist(), strict=True)
