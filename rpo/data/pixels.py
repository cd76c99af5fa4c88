"""From an image file to the RGB pixels that a person saw: every image that rpo reads comes through here.

Viewers turn an image as its metadata says, convert its embedded colour profile to that of the screen, and lay what is
transparent on a background. So does this: upright, sRGB, on white, 8 bits. An image that needs none of it keeps its
exact pixels, and so does one whose profile is sRGB's own.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from rpo.errors import InputError

if TYPE_CHECKING:
    from rpo.types import Images

TURNED = "turned upright"
CONVERTED = "converted from a colour profile to sRGB"
UNFIT_PROFILE = "with a colour profile that cannot be used, taken as sRGB"
ON_WHITE = "transparent, laid on white"
ROUNDED = "of 16 bits, rounded to 8"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""From EXIF's orientation to what makes an image upright."""

_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_ORIENTATION_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")  # of the chunks of a PNG that may tell one
_PROGRAMS = ("EPS",)  # Pillow would have Ghostscript run whatever somebody sent
_SAME = 2  # levels by which a profile may differ from sRGB in rounding
_BITS_8, _BITS_16 = 255, 65535
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile, and the mode of the pixels that it describes


@dataclass(frozen=True)
class Seen:
    """An image as a viewer shows it."""

    image: Image.Image
    """RGB, 8 bits, loaded."""
    changes: tuple[str, ...] = ()
    """What was done to the stored pixels, in words that follow "images"; empty for plain sRGB."""


def decode_image(data: bytes, name: str) -> Seen:
    """Decode an image to its last pixel."""
    with _opened(data, name) as image:
        return as_seen(image)


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of the pixels, from the header alone wherever the header tells."""
    with _opened(data, name) as image:
        width, height = image.size
        if image.format == "TIFF" or (image.format == "PNG" and not any(mark in data for mark in _ORIENTATION_MARKS)):
            return width, height  # Pillow turns a TIFF itself; of a PNG it would decode all pixels in search of a chunk
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def rgb(image: Image.Image) -> Image.Image:
    """The pixels of an image of any mode that is open already, as a viewer shows them."""
    return as_seen(image).image


def grey(image: Image.Image) -> Image.Image:
    """How light an image is, whatever its colours: as it is seen, in one band."""
    return rgb(image).convert("L")


def to_pixels(images: "Images") -> NDArray[np.uint8]:
    """Float images [n, 3, h, w] in [0, 1] as the bytes [n, h, w, 3] that a PNG holds."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def as_seen(image: Image.Image) -> Seen:
    """Do to an open image what a viewer does, and say what that was."""
    image.load()  # the metadata of a PNG may follow its pixels
    turn = _TURNS.get(_orientation(image))
    changes = [TURNED] if turn is not None else []
    changes += [ROUNDED] if image.mode.startswith("I;16") else []
    colour, alpha = _colour_and_alpha(image)
    if profile := image.info.get("icc_profile"):
        colour, change = _to_srgb(colour, profile)
        changes += [change] if change else []
    colour = colour.convert("RGB")
    if alpha is not None and np.asarray(alpha).min() < _BITS_8:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
        changes.append(ON_WHITE)
    return Seen(colour if turn is None else colour.transpose(turn), tuple(changes))


def _orientation(image: Image.Image) -> int:
    """As its metadata says; 0 where they say nothing that can be read, for viewers show such an image as it is."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 0))
    except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError, struct.error):
        return 0


def _colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Pixels in the mode that a profile can describe, and how opaque they are; None where all are."""
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise TypeError(f"mode {image.mode} does not say which number is white")
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image if image.mode in _SPACES.values() else image.convert("L" if image.mode == "1" else "RGB"), None
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > _BITS_8:  # of a file of 16 bits, whose pixels were read as 8
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in key)
    whole = image.convert("LA" if image.mode in ("1", "L", "LA") else "RGBA")
    return whole.convert("RGB") if whole.mode == "RGBA" else whole.getchannel("L"), whole.getchannel("A")


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values = np.asarray(image).astype(np.float64)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, _BITS_8).astype(np.uint8))
    return Image.fromarray((values * (_BITS_8 / _BITS_16)).round().astype(np.uint8)), alpha


def _to_srgb(colour: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """The pixels in sRGB and what was done; a profile of other channels than the image's says nothing about it."""
    try:
        transform = _transform(profile, colour.mode)
    except (OSError, ValueError, ImageCms.PyCMSError):
        return colour, UNFIT_PROFILE
    if transform is None:
        return colour, ""
    converted = ImageCms.applyTransform(colour, transform)
    assert converted is not None
    return converted, CONVERTED


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings a profile's pixels to sRGB; None where they are sRGB already."""
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = str(cast("Any", opened.profile).xcolor_space)
    if _SPACES.get(space) != mode:
        raise InputError(f"the profile is of {space.strip()}, the pixels of {mode}")
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, _BITS_8, 16 if mode == "RGB" else 256).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    probe = Image.fromarray(cube)  # levels from all over the colour space
    after = ImageCms.applyTransform(probe, transform)
    far = np.abs(np.asarray(after, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()
    return transform if far > _SAME else None


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """An image to be read from its bytes; whatever a decoder raises becomes one error that names the image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in _PROGRAMS:
                raise TypeError(f"{image.format} is a program to be run")
            yield image
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} is too large to be decoded safely ({error}); expected an image for training; shrink it or remove "
            "the record"
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        raise InputError(
            f"{name} cannot be decoded ({type(error).__name__}: {error}); expected a whole PNG, JPEG or WebP image of "
            "8 or 16 bits; replace it or remove the record"
        ) from error
