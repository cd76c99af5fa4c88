"""What a CLIP checkpoint does to an image before it looks: short side resized, centre cut out, channels normalised.

The checkpoint's own image processor works on PIL images and bytes, so nothing can be differentiated through it. This
is the same on float tensors: PIL's antialiased bicubic kernel (a = -1/2), its cut-off of overshoots at [0, 1], and the
sizes and offsets of transformers. PIL rounds to bytes after each of its two passes and here nothing is rounded, so
where an image is resized a channel differs by up to about 1/255 before it is normalised, and elsewhere not at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from rpo.errors import InputError
from rpo.types import Images

FILTERS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers for the filters that torch has with antialiasing too."""

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, for a configuration that does not say."""

DEFAULT_SIZE = 224
BYTE = 1 / 255


@dataclass(frozen=True)
class ClipPreprocessing:
    """The steps of one checkpoint."""

    shortest_edge: int
    """The short side is resized to this many pixels and the long side in proportion, rounded down."""
    crop: tuple[int, int]
    """Height and width of the centre that is cut out; not larger than `shortest_edge`."""
    filter: str
    """`bicubic` or `bilinear`, antialiased."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Images) -> Images:
        """The pixel values that the checkpoint reads, with their gradient."""
        images = self._resized(images)
        (height, width), (crop_height, crop_width) = images.shape[2:], self.crop
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        images = images[:, :, top : top + crop_height, left : left + crop_width]
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, images: Images) -> Images:
        height, width = images.shape[2:]
        short, long = min(height, width), max(height, width)
        if short == self.shortest_edge:
            return images
        new_long = int(self.shortest_edge * long / short)
        size = (new_long, self.shortest_edge) if width <= height else (self.shortest_edge, new_long)
        for step in ((height, size[1]), size):  # PIL resizes rows first, and cuts off the overshoots of either pass
            images = functional.interpolate(images, step, mode=self.filter, antialias=True).clamp(0, 1)
        return images


def read_preprocessing(config: Mapping[str, Any]) -> ClipPreprocessing:
    """Read a `preprocessor_config.json`, in its old spelling (a size is a number) or its new one; else as CLIP's."""
    kind = config.get("image_processor_type", config.get("feature_extractor_type", "CLIPImageProcessor"))
    if not str(kind).startswith("CLIP"):
        raise InputError(
            f"the image processor is a {kind}; expected CLIP's, which resizes the short side and cuts out the centre; "
            "give the folder or hub id of a CLIP checkpoint"
        )
    is_byte = math.isclose(config.get("rescale_factor", BYTE), BYTE, rel_tol=1e-6)
    if not (config.get("do_rescale", True) and config.get("do_normalize", True) and is_byte):
        raise InputError(
            f"the image processor has do_rescale {config.get('do_rescale')}, do_normalize "
            f"{config.get('do_normalize')}, rescale_factor {config.get('rescale_factor')}; expected bytes divided by "
            "255 and normalised; give a CLIP checkpoint"
        )
    number = config.get("resample", 3)
    if number not in FILTERS:
        raise InputError(
            f"the image processor resizes with filter {number}; expected 3 (bicubic) or 2 (bilinear); give a CLIP "
            "checkpoint that uses one of them"
        )
    size, cut = config.get("size", DEFAULT_SIZE), config.get("crop_size", DEFAULT_SIZE)
    edge = (size if isinstance(size, int) else size.get("shortest_edge")) if config.get("do_resize", True) else None
    crop = (cut, cut) if isinstance(cut, int) else (cut["height"], cut["width"])
    crop = crop if config.get("do_center_crop", True) else None
    if edge is None or crop is None or max(crop) > edge:
        raise InputError(
            f"the image processor resizes the short side to {edge} and cuts out {crop}; expected both, and the cut not "
            "to be larger; give a CLIP checkpoint"
        )
    mean, std = config.get("image_mean", IMAGE_MEAN), config.get("image_std", IMAGE_STD)
    return ClipPreprocessing(edge, crop, FILTERS[number], tuple(mean), tuple(std))
