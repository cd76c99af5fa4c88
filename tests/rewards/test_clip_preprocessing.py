import pytest
import torch
from transformers import CLIPImageProcessorPil

from rpo.rewards.clip_preprocessing import IMAGE_MEAN, IMAGE_STD, ClipPreprocessing, read_preprocessing
from tests.rewards.clip_models import OLD_PREPROCESSOR

NEW = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 48},
    "crop_size": {"height": 40, "width": 44},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "resample": 2,
}
BYTE = 1 / 255


def pictures(height: int, width: int) -> torch.Tensor:
    """A smooth picture with hard edges and one of noise: what resizing does well and badly, in whole bytes."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    smooth = torch.stack([rows * columns, (rows + columns) / 2, (rows > columns).float()])
    noise = torch.rand(3, height, width, generator=generator)
    return (torch.stack([smooth, noise]) * 255).round() / 255


def by_transformers(config: dict, images: torch.Tensor) -> torch.Tensor:
    as_bytes = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    processor = CLIPImageProcessorPil.from_dict(dict(config))
    return processor(list(as_bytes), return_tensors="pt").pixel_values


@pytest.mark.parametrize("config", [OLD_PREPROCESSOR, NEW], ids=["old", "new"])
@pytest.mark.parametrize("size", [(64, 64), (96, 70), (51, 130), (40, 30), (33, 35)])
def test_it_is_the_processor_of_transformers_to_a_byte(config, size):
    images = pictures(*size)
    preprocess = read_preprocessing(config)
    difference = preprocess(images) - by_transformers(config, images)
    assert (difference * torch.tensor(preprocess.std).view(3, 1, 1)).abs().max() <= 1.1 * BYTE
    assert (difference * torch.tensor(preprocess.std).view(3, 1, 1)).abs().mean() <= 0.35 * BYTE


def test_without_a_resize_it_is_exact():
    images = pictures(32, 45)
    torch.testing.assert_close(
        read_preprocessing(OLD_PREPROCESSOR)(images), by_transformers(OLD_PREPROCESSOR, images), rtol=0, atol=1e-6
    )


def test_what_a_configuration_does_not_say_is_as_in_clip():
    assert read_preprocessing({}) == ClipPreprocessing(224, (224, 224), "bicubic", IMAGE_MEAN, IMAGE_STD)
    assert CLIPImageProcessorPil().to_dict()["image_mean"] == pytest.approx(IMAGE_MEAN)
    assert CLIPImageProcessorPil().to_dict()["image_std"] == pytest.approx(IMAGE_STD)


def test_overshoots_of_the_bicubic_kernel_are_cut_off():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[:, :, :, 20:40] = 1
    pixels = read_preprocessing(OLD_PREPROCESSOR)(stripes)
    back = pixels * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    assert back.min() >= -1e-6
    assert back.max() <= 1 + 1e-6


def test_the_gradient_reaches_every_pixel_that_is_not_cut_away():
    images = (0.25 + 0.5 * pictures(64, 96)).requires_grad_()
    read_preprocessing(OLD_PREPROCESSOR)(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad[:, :, :, 18:78] != 0).all()
    assert (images.grad[:, :, :, :8] == 0).all()


REFUSED = {
    "kind": ({"image_processor_type": "SiglipImageProcessor"}, "is a SiglipImageProcessor; expected CLIP's"),
    "rescale": ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.00784313725490196; expected bytes divided by 255"),
    "normalize": ({"do_normalize": False}, "do_normalize False"),
    "filter": ({"resample": 0}, "resizes with filter 0; expected 3 (bicubic) or 2 (bilinear)"),
    "square": ({"size": {"height": 224, "width": 224}}, "resizes the short side to None"),
    "crop": ({"size": 200}, "resizes the short side to 200 and cuts out (224, 224)"),
    "no crop": ({"do_center_crop": False}, "cuts out None; expected both"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clips_is_refused(case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        read_preprocessing(config)
    assert message in str(caught.value)


def test_numbers_of_filters_are_those_of_pil():
    from PIL.Image import Resampling

    from rpo.rewards.clip_preprocessing import FILTERS

    assert {int(Resampling.BILINEAR): "bilinear", int(Resampling.BICUBIC): "bicubic"} == FILTERS
