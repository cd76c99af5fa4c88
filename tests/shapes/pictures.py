"""Pictures for the tests of the shapes world."""

import numpy as np
from scipy import ndimage

from rpo.shapes.world import Scene, SceneObject, render

BACKGROUND = 242
RED_CIRCLE, BLUE_SQUARE = ("circle", "red", 20, 16, 8), ("square", "blue", 40, 46, 8)


def picture(*objects):
    return render(Scene(tuple(SceneObject(*fields) for fields in objects)))


def degrade(image, rng, sigma=0.8, noise=0.02):
    """A stand-in for an autoencoder: blurred, resampled through 48 pixels and noisy, about 25 dB."""
    blurred = ndimage.gaussian_filter(image / 255, (sigma, sigma, 0))
    small = ndimage.zoom(blurred, (0.75, 0.75, 1), order=1)
    large = ndimage.zoom(small, (4 / 3, 4 / 3, 1), order=1)
    return np.rint((large + rng.normal(0, noise, large.shape)).clip(0, 1) * 255).astype(np.uint8)
