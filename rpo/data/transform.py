"""From two encoded images to two pixel tensors: scale to cover the canvas, cut what stands out, perhaps mirror.

The transform draws nothing itself: what chance decides is a `TransformDraw`, so that equal arguments give equal pixels.
The two images of a pair are cut and mirrored alike when they have one size, because an image and its edit must stay
aligned pixel by pixel; of two sizes, each is cut at its own centre. (The reference implementation of Diffusion-DPO
draws the mirroring for each image by itself.)
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rpo.data.preference import Picture, PreferencePair
from rpo.errors import InputError
from rpo.types import Canvas

_HALF = 0.5  # share of mirrored draws

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class TransformDraw:
    """What chance decided for one use of a pair."""

    flip: bool = False
    """Mirror left and right."""
    crop: tuple[float, float] | None = None
    """Where the window lies, from 0 (left, top) up to but without 1 (right, bottom); None is the centre."""

    def __post_init__(self) -> None:
        """Refuse a window outside the image."""
        if self.crop is not None and not all(0 <= at < 1 for at in self.crop):
            raise InputError(f"crop is {self.crop}; expected two numbers from 0 up to but without 1; give fractions")


@dataclass(frozen=True)
class Window:
    """The part of a scaled image that is used. With the image and the canvas, it determines the pixels."""

    left: int
    top: int
    flip: bool


@dataclass(frozen=True)
class PairTransform:
    """How the images of a preference set become pixel tensors of one size.

    Example:
        >>> transform = PairTransform(Canvas(512, 512), flip=True)
        >>> draw = transform.draw(seed=0, pair_index=3, draw_index=1)
    """

    canvas: Canvas
    """The size that the model is trained at."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image of another shape. "random" gives a cache as many entries an image as it has positions."""
    flip: bool = False
    """Mirror half of the draws. Off by default: mirrored, "left of" becomes "right of", and writing unreadable."""

    def __post_init__(self) -> None:
        """Refuse what cannot be a transform."""
        if min(self.canvas) < 1:
            raise InputError(f"the canvas is {self.canvas}; expected a positive number of pixels; try 512x512")
        if self.crop not in ("center", "random"):
            raise InputError(f'crop is {self.crop!r}; expected "center" or "random"; choose one')

    @property
    def key(self) -> str:
        """Everything besides image and window that determines the pixels, the decoder's version included."""
        return f"pillow {PIL.__version__}, as seen, bilinear, covering {self.canvas}"

    def draw(self, *, seed: int, pair_index: int, draw_index: int) -> TransformDraw:
        """Decide for one use of a pair; the same three numbers give the same decision."""
        flip = self.flip and _uniform(seed, "flip", pair_index, draw_index) < _HALF
        if self.crop == "center":
            return TransformDraw(flip)
        x, y = (_uniform(seed, f"crop {axis}", pair_index, draw_index) for axis in "xy")
        return TransformDraw(flip, (x, y))

    def windows(self, chosen: Size, rejected: Size, draw: TransformDraw) -> tuple[Window, Window]:
        """The windows of a pair: one and the same if the sizes are equal, each at its own centre if not."""
        if chosen == rejected:
            window = self._window(chosen, draw)
            return window, window
        centred = TransformDraw(draw.flip)
        return self._window(chosen, centred), self._window(rejected, centred)

    def pixels(self, image: Image.Image, window: Window) -> Float[Tensor, "3 height width"]:
        """The pixels of an RGB image in a window, in [0, 1]; not resampled if it fits already."""
        scaled = self._scaled(image.size)
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.BILINEAR)
        bottom, right = window.top + self.canvas.height, window.left + self.canvas.width
        values = np.asarray(image, dtype=np.uint8)[window.top : bottom, window.left : right]
        if values.shape[:2] != self.canvas:
            raise InputError(f"{window} leaves the image of {image.size}; expected one of `windows` for its size")
        if window.flip:
            values = values[:, ::-1]
        return torch.from_numpy(values.copy()).permute(2, 0, 1).contiguous().float() / 255

    def told(self, size: Size, window: Window) -> tuple[int, ...]:
        """What SDXL is told of an image of `size`: its height and width, the window's top and left, and the canvas."""
        left = self._scaled(size)[0] - self.canvas.width - window.left if window.flip else window.left
        return *size[::-1], window.top, left, *self.canvas

    def load(self, pair: PreferencePair, side: Picture, window: Window) -> Float[Tensor, "3 height width"]:
        """Read, decode and cut one image of a pair."""
        return self.pixels(pair.decode(side), window)

    def _scaled(self, size: Size) -> Size:
        (width, height), canvas = size, self.canvas
        if canvas.width * height >= canvas.height * width:  # rounds as torchvision's Resize
            return canvas.width, canvas.width * height // width
        return canvas.height * width // height, canvas.height

    def _window(self, size: Size, draw: TransformDraw) -> Window:
        width, height = self._scaled(size)
        spare = (width - self.canvas.width, height - self.canvas.height)
        if draw.crop is None:
            left, top = (round(room / 2) for room in spare)  # as torchvision's CenterCrop
        else:
            left, top = (int(at * (room + 1)) for at, room in zip(draw.crop, spare, strict=True))
        return Window(left, top, draw.flip)


def caption_dropped(*, seed: int, pair_index: int, draw_index: int, rate: float) -> bool:
    """Whether this use of a pair is trained with the caption "", which keeps classifier-free guidance usable.

    What is dropped at a low rate is dropped at every higher one.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"caption dropping rate is {rate}; expected 0 to 1; Diffusion-DPO takes 0.2")
    return _uniform(seed, "caption", pair_index, draw_index) < rate


def _uniform(seed: int, purpose: str, pair_index: int, draw_index: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments, on any machine and in any order of use."""
    text = f"{seed}/{purpose}/{pair_index}/{draw_index}".encode()
    return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 11) / 2**53
