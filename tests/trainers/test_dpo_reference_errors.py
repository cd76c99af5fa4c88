"""The reference's errors are those that the file keeps, so that a resumed run computes with the same bits."""

import torch

from rpo.trainers.pair_batches import PairBatch
from rpo.trainers.reference_errors import ReferenceErrors
from rpo.types import Conditioning


def batch_of(*draws):
    latents, embeds = torch.zeros(len(draws), 4, 8, 8), torch.zeros(len(draws), 77, 32)
    timestep = torch.zeros(len(draws), dtype=torch.long)
    return PairBatch(torch.cat([latents, latents]), latents, timestep, Conditioning(embeds, embeds), draws, draws)


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
