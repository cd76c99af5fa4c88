"""The reference's errors are those that the file keeps, so that a resumed run computes with the same bits."""

from collections import Counter

import pytest
import torch

from rpo.trainers.pairs.batches import PairBatch
from rpo.trainers.pairs.errors import ReferenceErrors
from rpo.training.log import read_metrics
from rpo.types import Conditioning
from tests.tiny import tiny_sd
from tests.trainers.pair_runs import counting, trained


def batch_of(*draws):
    latents, embeds = torch.zeros(len(draws), 4, 8, 8), torch.zeros(len(draws), 77, 32)
    timestep = torch.zeros(len(draws), dtype=torch.long)
    return PairBatch(
        torch.cat([latents, latents]),
        latents,
        timestep,
        Conditioning({"tokens": embeds}, {"tokens": embeds}),
        torch.zeros(2 * len(draws), 6),
        draws,
        draws,
    )


def answering(*values):
    return lambda batch: torch.tensor(values)


def test_a_visit_computed_anew_in_other_company_keeps_its_first_errors(tmp_path):
    errors = ReferenceErrors(tmp_path, "model")
    assert errors.of(batch_of("a", "b"), answering(1.0, 2.0, 3.0, 4.0)).tolist() == [1, 2, 3, 4]
    mixed = errors.of(batch_of("b", "c"), answering(20.0, 5.0, 40.0, 6.0))
    assert mixed.tolist() == [2, 5, 4, 6]
    assert errors.computed == 4
    resumed = ReferenceErrors(tmp_path, "model")
    assert resumed.of(batch_of("b", "c"), answering()).tolist() == mixed.tolist()
    assert resumed.of(batch_of("c", "a"), answering()).tolist() == [5, 1, 6, 3]
    assert resumed.computed == 0


def test_two_processes_that_compute_the_same_visit_agree(tmp_path):
    one, other = ReferenceErrors(tmp_path, "model"), ReferenceErrors(tmp_path, "model")
    first = batch_of("a")

    def overtaken(batch):
        other.of(batch, answering(1.0, 2.0))
        return torch.tensor([10.0, 20.0])

    assert one.of(first, overtaken).tolist() == [1, 2]


def test_another_model_is_asked_anew(tmp_path):
    ReferenceErrors(tmp_path, "model").of(batch_of("a"), answering(1.0, 2.0))
    assert ReferenceErrors(tmp_path, "other").of(batch_of("a"), answering(3.0, 4.0)).tolist() == [3, 4]


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_end": 0.02},
        pytest.param({"beta_schedule": "linear"}, marks=pytest.mark.slow),
        pytest.param({"trained_betas": [0.001 + 1e-5 * n for n in range(1000)]}, marks=pytest.mark.slow),
    ],
)
def test_under_another_noise_schedule_all_are_asked_anew(tmp_path, schedule):
    def trainer(name, **changes):
        calls, settings = Counter(), {"updates": 2, "draws_per_pair": 1, "cache_folder": str(tmp_path / "cache")}
        trainer = trained(tmp_path / name, pipe=tiny_sd(**changes), watch=counting(calls), **settings)
        return trainer, calls["forwards"]

    assert [trainer("first")[1], trainer("same")[1]] == [4, 2]
    other, forwards = trainer("other", **schedule)
    (margin, *_) = (line["dpo/margin"] for line in read_metrics(other.folder))
    assert forwards == 4 and abs(margin) < 1e-6
