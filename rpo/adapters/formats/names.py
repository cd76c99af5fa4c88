"""Names of a family's layers elsewhere: those of the network as its authors wrote it, which other programs kept.

What is one layer there may be several in diffusers, as q, k and v. Of their LoRAs one is made, and split again:

    [Bq Aq; Bk Ak; Bv Av] = diag(Bq, Bk, Bv) [Aq; Ak; Av]          the ranks add up, and nothing is lost
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rpo.adapters.formats.layers import Layers, Sizes, refuse_unknown
from rpo.errors import InputError

MANY = 100
"""More blocks of a kind than any network has."""


@dataclass(frozen=True)
class Names:
    """How one family's layers are called elsewhere."""

    originals: Mapping[str, tuple[str, ...]]
    """The denoiser's: from an original name to those of diffusers."""
    swapped: frozenset[str] = frozenset()
    """Originals that put out scale and shift, in the other order, where they put out no more."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """CLIP text encoders: from the part's name to kohya's prefix."""
    flat: frozenset[str] = frozenset({"text_encoder"})
    """Text encoders that have no level `text_model` in transformers 5."""
    kohya_keeps: bool = False
    """Whether kohya's names of the denoiser's layers are made of diffusers' own."""


def expanded(rules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Names of all blocks: "#" stands for a number, which is the same on both sides; several names are of one layer."""
    found: dict[str, tuple[str, ...]] = {}
    for theirs, ours in rules.items():
        for number in range(MANY if "#" in theirs else 1):
            found[theirs.replace("#", str(number))] = tuple(ours.replace("#", str(number)).split())
    return found


def to_originals(layers: Layers, names: Names, sizes: Sizes, where: object) -> Layers:
    """The layers of a denoiser by their original names."""
    places = {ours: theirs for theirs, several in names.originals.items() for ours in several}
    refuse_unknown([name for name in layers if name not in places], where)
    found: Layers = {}
    for theirs, several in {places[name]: names.originals[places[name]] for name in layers}.items():
        one = layers[several[0]] if len(several) == 1 else _joined(several, layers, sizes)
        found[theirs] = _swapped(*one) if theirs in names.swapped else one
    return found


def from_originals(layers: Layers, names: Names, where: object) -> Layers:
    """The way back."""
    refuse_unknown([name for name in layers if name not in names.originals], where)
    found: Layers = {}
    for theirs, (down, up) in layers.items():
        several = names.originals[theirs]
        rows = _split_rows(down, up, len(several))
        for ours, part in zip(several, up.split(rows), strict=True):
            if len(several) == 1:
                found[ours] = _swapped(down, part) if theirs in names.swapped else (down, part)
            elif part.any():  # a layer that was not adapted was filled up with zeros
                found[ours] = _without_idle(down, part)
    return found


def _joined(several: tuple[str, ...], layers: Layers, sizes: Sizes) -> tuple[Tensor, Tensor]:
    given = [name for name in several if name in layers]
    downs, ups = zip(*(layers[name] for name in given), strict=True)
    rows = {name: len(up) for name, up in zip(given, ups, strict=True)}
    missing = [name for name in several if name not in rows]
    width = downs[0].shape[1]
    rows |= {name: sizes[name][0] if name in sizes else _guessed(name, several, rows, width) for name in missing}
    ends = torch.tensor([0, *(rows[name] for name in several)]).cumsum(0).tolist()
    starts = dict(zip(several, ends[:-1], strict=True))
    shares = all(torch.equal(downs[0], down) for down in downs)
    rank = len(downs[0]) if shares else sum(map(len, downs))
    joined, column = torch.zeros(ends[-1], rank, dtype=ups[0].dtype, device=ups[0].device), 0
    for name, up in zip(given, ups, strict=True):
        joined[starts[name] : starts[name] + len(up), column : column + up.shape[1]] = up
        column += 0 if shares else up.shape[1]
    return (downs[0] if shares else torch.cat(downs)), joined


def _guessed(name: str, several: tuple[str, ...], rows: Mapping[str, int], width: int) -> int:
    """The size of a layer that is not adapted: k and v have the same, q is as wide as what goes in, FLUX's MLP four."""
    *first, k, v = several[:3]
    if name not in (k, v):
        return width if name in first else 4 * width
    if (twin := v if name == k else k) in rows:
        return rows[twin]
    raise InputError(
        f"only {' and '.join(rows)} of {', '.join(several)} is adapted, which other programs have as one layer, and "
        f"how many numbers {name} puts out is not in the file; expected the base, which says so: give --base MODEL"
    )


def _split_rows(down: Tensor, up: Tensor, parts: int) -> list[int]:
    """As wide as what goes in is q; what is left is k and v, or k and v of that width and a layer beside."""
    total, width = len(up), down.shape[1]
    if parts <= 2:  # noqa: PLR2004 - one layer, or k and v
        return [total // parts] * parts
    other = (total - width) // 2 if parts == 3 else width  # noqa: PLR2004 - q, k and v
    rows = [width, other, other]
    return rows if parts == len(rows) else [*rows, total - sum(rows)]


def _without_idle(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The factors without the directions that this layer has no part in."""
    used = up.any(0)
    return (down, up) if used.all() else (down[used], up[:, used].contiguous())


def _swapped(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (down, torch.cat(up.chunk(2)[::-1])) if len(up) == 2 * down.shape[1] else (down, up)
