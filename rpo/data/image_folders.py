"""Two folders of images, the better and the worse ones, matched by name; the caption is a .txt file beside an image."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from rpo.data.own_files import is_hidden, own_file
from rpo.errors import InputError
from rpo.files.text import read_text

_FOLDERS = (
    ("chosen", "rejected"),
    ("win", "lose"),
    ("winner", "loser"),
    ("winners", "losers"),
    ("preferred", "rejected"),
    ("good", "bad"),
)
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}


def sides_in(folder: Path) -> tuple[str, str] | None:
    """The names of the two folders, the better first, if a folder has such."""
    inside = {child.name.lower(): child.name for child in folder.iterdir() if child.is_dir()}
    found = [(inside[one], inside[other]) for one, other in _FOLDERS if one in inside and other in inside]
    if len(found) > 1:
        raise InputError(
            f"{folder}: has {' and '.join(f'{one}/ with {other}/' for one, other in found)}; expected one of them; "
            "move the others away"
        )
    return found[0] if found else None


def paired_images(folder: Path, sides: tuple[str, str]) -> Iterator[tuple[str, Callable[[], Mapping[str, object]]]]:
    """Name and reader of each pair, by the names of their images without suffix."""
    chosen, rejected = (_by_name(folder / side) for side in sides)
    for key in sorted(chosen.keys() | rejected.keys()):
        name = f"{sides[key not in chosen]}/{key}"
        yield name, partial(_row, folder, sides, key, (chosen.get(key, []), rejected.get(key, [])), name)


def _by_name(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix.lower() in _IMAGES and not is_hidden(name.as_posix()):
            found.setdefault(name.with_suffix("").as_posix(), []).append(path)
    return found


def _row(
    folder: Path, sides: tuple[str, str], key: str, images: tuple[list[Path], list[Path]], name: str
) -> Mapping[str, object]:
    for side, found in zip(sides, images, strict=True):
        if len(found) != 1:
            what = "no image" if not found else f"{len(found)} images"
            raise InputError(f"{name}: {side}/ has {what} of this name; expected one on each side; add or remove one")
    captions = [folder / side / f"{key}.txt" for side in sides]
    texts = {read_text(own_file(folder, str(path.relative_to(folder)))).strip() for path in captions if path.is_file()}
    if len(texts) != 1:
        what = "different captions on the two sides" if texts else f"no caption {captions[0].relative_to(folder)}"
        raise InputError(f"{name}: has {what}; expected one prompt for both images; write it into that file")
    both = (own_file(folder, str(found[0].relative_to(folder))) for found in images)
    return dict(zip(("prompt", "chosen", "rejected"), (*texts, *both), strict=True))
