"""Runs over pairs of many sizes: each micro-batch is of one, and everything that depends on the size goes with it."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.region import RegionConfig
from rpo.trainers import dpo
from rpo.trainers.pairs.batches import UpdateShare, pair_batches
from rpo.training.log import read_metrics
from tests.tiny import tiny_sd, tiny_sdxl
from tests.trainers.pair_runs import toy_pairs, trained, trainer_of, weights

SIZES = [(64, 64), (96, 48), (48, 96), (128, 64), (64, 64), (32, 48), (64, 64), (128, 128)]
"""(height, width), in buckets of 16 px: (64, 64) four times, (80, 48), (48, 80), (80, 48), (32, 48)."""


def mixed(sizes=SIZES):
    generator, pairs = np.random.default_rng(5), []
    for index, (height, width) in enumerate(sizes):
        chosen = generator.integers(0, 200, (height, width, 3), dtype=np.uint8)
        rejected = chosen.copy()
        rejected[:16, :16] += 50
        pairs.append(
            PreferencePair(f"prompt {index % 3}", encode_png(chosen), encode_png(rejected), name=f"pair {index}")
        )
    return pair_set(pairs)


def of(folder, **changes):
    return trainer_of(folder, pairs=changes.pop("pairs", mixed()), bucket_step=16, **changes)


FOUR = {"updates": 4, "pairs_per_update": 4, "learning": {"micro_batch": 2}}


def test_buckets_of_one_size_train_as_one_canvas_does(tmp_path):
    runs = [trained(tmp_path / f"{step}", bucket_step=step, flip=True) for step in (None, 16)]
    assert torch.equal(*map(weights, runs))


def test_a_micro_batch_is_of_one_size_and_all_is_encoded_once(tmp_path):
    trainer, encoded = of(tmp_path, **FOUR, encode_batch=3), Counter()
    trainer.run.model.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.update(images=len(args[0])))
    trainer.train()
    assert encoded["images"] == 2 * len(SIZES)
    assert len(read_metrics(trainer.folder)) == 4
    seen = Counter()
    for batch in islice(trainer.algorithm.data(0), 40):
        heights = {(trainer.algorithm.sizes.buckets.of_pair[pair]) for pair in batch.pairs}
        assert len(heights) == 1 and batch.x_0.shape[1:] == batch.eps.shape[1:]
        seen[tuple(batch.eps.shape[2:])] += 1
    assert seen == {(8, 8): 20, (10, 6): 10, (6, 10): 5, (4, 6): 5}
    assert encoded["images"] == 2 * len(SIZES)


def test_a_run_resumed_in_the_middle_is_the_undisturbed_one(tmp_path):
    whole = of(tmp_path / "whole", **FOUR)
    whole.train()
    learning = {**FOUR["learning"], "checkpoint_every": 1}
    of(tmp_path / "parts", **{**FOUR, "updates": 2, "learning": learning}).train()
    parts = of(tmp_path / "parts", **{**FOUR, "learning": learning})
    parts.train(resume=True)
    assert torch.equal(weights(whole), weights(parts))


def test_two_processes_slice_the_order_of_one(tmp_path):
    algorithm = of(tmp_path, **FOUR).algorithm

    def draws(*share):
        share = UpdateShare(*share)
        made = pair_batches(
            algorithm.model, algorithm.pairs, algorithm.config, share, algorithm.sizes.buckets, folder=tmp_path
        )
        return [batch.draws for batch in islice(made(1), 12)]

    one, first, second = draws(2, 2), draws(1, 2, 0, 2), draws(1, 2, 1, 2)
    assert one == [(*left, *right) for left, right in zip(first, second, strict=True)]


def test_beta_goes_with_the_dimensions_and_a_region_with_the_grid(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(dpo, "Comparison", lambda *args, **told: compared.append(told) or COMPARISON(*args, **told))
    trainer = of(tmp_path, pairs=mixed(), region=RegionConfig(), objective=Dpo(beta=64.0), **FOUR)
    for batch in islice(trainer.algorithm.data(0), 8):
        assert batch.difference.shape == (2, *batch.eps.shape[2:])
        assert batch.difference[:, 0, 0].min() > 0.09 and batch.difference[:, 3:, 3:].max() == 0  # where the edit is
        trainer.algorithm.loss(batch)
        assert compared[-1]["num_dims"] == batch.eps[0].numel()
    assert {told["num_dims"]: told["beta"] for told in compared} == {256: 64.0, 240: 60.0, 96: 24.0}


COMPARISON = dpo.Comparison


def test_what_is_kept_of_the_reference_serves_later_epochs_of_every_size(tmp_path):
    trainer = of(tmp_path, **FOUR, draws_per_pair=1)
    trainer.train()
    assert 0 < trainer.algorithm.reference.kept.computed <= 2 * len(SIZES)
    again = of(tmp_path / "again", pipe=tiny_sd(), cache_folder=str(tmp_path / "cache"), draws_per_pair=1, **FOUR)
    again.train()
    assert again.algorithm.reference.kept.computed == 0
    assert torch.equal(weights(trainer), weights(again))


def test_the_doubt_of_a_prompt_is_measured_at_every_size(tmp_path):
    algorithm = of(tmp_path, **FOUR).algorithm
    errors = algorithm.reference.mid_time(algorithm.data)
    alone = of(tmp_path / "alone", **{**FOUR, "learning": {"micro_batch": 1}}).algorithm
    torch.testing.assert_close(errors, alone.reference.mid_time(alone.data), rtol=1e-4, atol=1e-5)


def test_the_plan_says_the_buckets(tmp_path):
    plan = of(tmp_path, **FOUR).plan()
    assert "4 buckets (height x width): 64x64 has most pairs (4), 32x48 fewest (1)" in plan
    assert "2 of them have fewer pairs than the 2 that are trained together" in plan
    assert "buckets" not in trainer_of(tmp_path / "one").plan()


@pytest.mark.parametrize("step", [12, 20, 128])
def test_a_step_that_the_checkpoint_cannot_take_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match=f"bucket_step is {step}, but .* multiples of 8 .* at most 64"):
        trainer_of(tmp_path, bucket_step=step)


@pytest.mark.parametrize("step", [None, 16])
def test_sdxl_is_told_what_was_done_to_each_image(tmp_path, step):
    """By the pipeline's own function, of the image's size, the window in the scaled image and the canvas."""
    pipe = tiny_sdxl()
    pairs = mixed([(64, 64), (96, 48), (100, 200), (128, 128)])
    trainer = trainer_of(tmp_path, pipe=pipe, pairs=pairs, bucket_step=step, learning={"micro_batch": 1})
    told = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    windows = {
        None: [(64, 64, 0, 0), (64, 64, 32, 0), (64, 64, 0, 32), (64, 64, 0, 0)],
        16: [(64, 64, 0, 0), (80, 48, 8, 0), (48, 80, 0, 8), (64, 64, 0, 0)],
    }[step]
    for batch in islice(trainer.algorithm.data(0), 8):
        with torch.no_grad():
            trainer.algorithm.loss(batch)
        (pair,) = batch.pairs
        size = [(64, 64), (96, 48), (100, 200), (128, 128)][pair]
        height, width, top, left = windows[pair]
        expected = pipe._get_add_time_ids(size, (top, left), (height, width), torch.float32, 32)
        assert torch.equal(told[-1], expected.expand(2, -1))


def test_sdxl_is_told_of_two_sides_apart_and_of_a_mirrored_window_as_it_is_seen(tmp_path):
    first, second = mixed([(64, 96)])[0], mixed([(128, 64)])[0]
    pair = PreferencePair("p", first.chosen, second.rejected, name="pair")
    pairs = pair_set([pair], allow_size_mismatch=True)
    trainer = trainer_of(tmp_path, pipe=tiny_sdxl(), pairs=pairs, learning={"micro_batch": 1}, pairs_per_update=1)
    assert trainer.algorithm.data.at([0]).sizes.tolist() == [[64, 96, 0, 16, 64, 64], [128, 64, 32, 0, 64, 64]]
    cut = trainer_of(tmp_path, pairs=mixed([(64, 96)] * 4), crop="random", flip=True)
    for batch in islice(cut.algorithm.data(0), 3):
        for sizes, draw in zip(batch.sizes[: len(batch.pairs)].tolist(), batch.draws, strict=True):
            left, flip = _window(draw)
            assert sizes == [64, 96, 0, 32 - left if flip else left, 64, 64]


def _window(draw):
    text = draw.partition("Window(left=")[2]
    return int(text.partition(",")[0]), text.partition("flip=")[2].startswith("True")


def test_toy_pairs_are_told_as_they_are_drawn(tmp_path):
    """Of an image of the canvas's size, what the pipeline is told when it draws."""
    sizes = trainer_of(tmp_path, pairs=toy_pairs()).algorithm.data.at(range(4)).sizes
    assert sizes.tolist() == [[64, 64, 0, 0, 64, 64]] * 8
