"""Small real images and records for the tests of `rpo.data`."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from rpo.data.preference import PreferencePair


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed: int, size: tuple[int, int] = (16, 16), *, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    noise(seed, size).save(stream, format=form, **options)
    return stream.getvalue()


def pair(index: int, **columns) -> PreferencePair:
    given = {"prompt": f"prompt {index}", "chosen": png(2 * index), "rejected": png(2 * index + 1)} | columns
    return PreferencePair(**given)


def write_file(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
