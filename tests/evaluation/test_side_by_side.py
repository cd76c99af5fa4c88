"""Columns from the same noise: an image is that of its prompt and seed alone, and distances are what they say."""

import numpy as np
import pytest
import torch

from rpo.adapters.lora import add_lora, load_lora
from rpo.data.pixels import to_pixels
from rpo.evaluation.side_by_side import Column, Row, draw_side_by_side
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from tests.adapters.test_strength import files  # noqa: F401 - a fixture
from tests.tiny import tiny_sd

DRAWN = {"num_steps": 3, "guidance_scale": 2.0}
ROWS = [Row("a", 7), Row("a", 8), Row("b", 7)]
COLUMNS = [Column(f"{one}", {"lora-0": one}) for one in (0.0, 0.5, 1.0)]


@pytest.fixture
def model(files):  # noqa: F811
    found = Checkpoint(tiny_sd())
    load_lora(found, files / "first", name="lora-0")
    return found


def lightness(images, prompts):
    return images.mean((1, 2, 3))


def test_an_image_is_that_of_its_prompt_and_seed_whatever_the_batch(model):
    alone = {row: to_pixels(generate(model, [row.prompt], seed=row.seed, **DRAWN))[0].astype(int) for row in ROWS}
    for size in (1, 2, 3):
        cells = list(draw_side_by_side(model, ROWS, COLUMNS[-1:], batch_size=size, **DRAWN))
        assert [cell.row for cell in cells] == [0, 1, 2]
        assert all(np.abs(cell.pixels - alone[ROWS[cell.row]]).max() <= (0 if size == 1 else 1) for cell in cells)


def test_columns_differ_by_strength_alone_and_distances_are_from_the_one_that_is_named(model):
    cells = list(
        draw_side_by_side(model, ROWS, COLUMNS, measured_from=Column("base", {"lora-0": 0.0}), batch_size=2, **DRAWN)
    )
    assert [(cell.row, cell.column) for cell in cells] == [
        (r, c) for rs in ((0, 1), (2,)) for c in range(3) for r in rs
    ]
    by_place = {(cell.row, cell.column): cell for cell in cells}
    for (row, column), cell in by_place.items():
        apart = np.abs(cell.pixels.astype(float) - by_place[row, 0].pixels).mean() / 255
        assert cell.pixel_distance == pytest.approx(apart)
        assert (cell.latent_distance == 0) == (column == 0)
    assert by_place[0, 0].pixel_distance == 0
    assert by_place[0, 1].latent_distance < by_place[0, 2].latent_distance


def test_a_base_that_is_no_column_is_measured_from_all_the_same(model):
    base = Column("base", {"lora-0": 0.0})
    all_of_them = list(draw_side_by_side(model, ROWS, COLUMNS, measured_from=base, **DRAWN))
    last = list(draw_side_by_side(model, ROWS, COLUMNS[-1:], measured_from=base, **DRAWN))
    assert [one.latent_distance for one in last] == [one.latent_distance for one in all_of_them if one.column == 2]


def test_rewards_are_of_the_images_before_they_are_rounded(model):
    cells = list(draw_side_by_side(model, ROWS[:1], COLUMNS, rewards={"light": lightness}, **DRAWN))
    images = generate(model, ["a"], seed=7, **DRAWN)
    assert cells[-1].rewards == {"light": pytest.approx(lightness(images, ["a"]).item())}
    assert cells[0].pixel_distance is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("adapts_text", [False, True])
def test_prompts_are_read_once_for_all_columns_that_read_alike(adapts_text, model, monkeypatch):
    columns = COLUMNS
    if not adapts_text:
        model = Checkpoint(tiny_sd())
        add_lora(model.denoiser, rank=2)
        columns = [Column(f"{one}", {"default": one}) for one in (0.0, 0.5, 1.0)]
    read, encode = [], model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: read.append(list(prompts)) or encode(prompts))
    list(draw_side_by_side(model, ROWS, columns, batch_size=2, **DRAWN))
    assert read == ([["a", "a"]] * 3 + [["b"]] * 3 if adapts_text else [["a", "a"], ["b"]])
