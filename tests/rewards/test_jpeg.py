import io

import numpy as np
import pytest
import torch
from PIL import Image

from rpo.rewards.jpeg import COMPRESSIBILITY, INCOMPRESSIBILITY


def random_images(count=3):
    return torch.rand(count, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def test_it_is_the_size_of_the_file_in_thousands_of_bytes(tmp_path):
    images = random_images()
    sizes = []
    for image in images:
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", quality=95)
        sizes.append((tmp_path / "a.jpg").stat().st_size / 1000)
    assert INCOMPRESSIBILITY(images, [""] * 3).tolist() == pytest.approx(sizes)
    assert torch.equal(COMPRESSIBILITY(images, [""] * 3), -INCOMPRESSIBILITY(images, [""] * 3))


def test_order_of_flat_smooth_and_noisy():
    ramp = torch.linspace(0, 1, 40).expand(3, 48, 40)
    images = torch.stack([torch.zeros(3, 48, 40), ramp, random_images(1)[0]])
    flat, smooth, noisy = INCOMPRESSIBILITY(images, [""] * 3)
    assert flat < smooth < noisy


def test_rows_columns_and_channels_are_where_they_belong():
    wide = torch.zeros(1, 3, 16, 400)
    wide[:, 0] = torch.linspace(0, 1, 400)
    stream = io.BytesIO()
    red_ramp = np.zeros((16, 400, 3), np.uint8)
    red_ramp[..., 0] = (np.linspace(0, 1, 400, dtype=np.float32) * 255).round()
    Image.fromarray(red_ramp).save(stream, format="JPEG", quality=95)
    assert INCOMPRESSIBILITY(wide, [""]).item() == pytest.approx(stream.tell() / 1000)


def test_half_precision_images_and_images_with_gradient():
    images = random_images().half()
    assert INCOMPRESSIBILITY(images.requires_grad_(), [""] * 3).dtype == torch.float32
    assert torch.equal(INCOMPRESSIBILITY(images, [""] * 3), INCOMPRESSIBILITY(images.float(), [""] * 3))
