"""The optimizer by its name: what is not installed is refused, and 8-bit moments survive a kill."""

import dataclasses

import pytest
import torch

from rpo.errors import InputError
from rpo.trainers.checks.prepared import prepared_model
from rpo.trainers.settings import LearningConfig
from rpo.training import optimizer
from rpo.training.checkpoint import read_part
from rpo.training.optimizer import MOMENTS, make_optimizer
from rpo.training.state import TrainingState
from tests.training.toy import LOOP, run

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def large():
    """Enough numbers for 8 bits."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(64, 128))]


def test_what_is_not_installed_is_refused_before_a_pipeline_is_looked_at(monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"adamw8bit, but bitsandbytes is not installed; pip install 'rpo\[lowbit\]'"):
        prepared_model(object(), LearningConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_moments_take_the_bytes_that_are_planned_and_come_back_as_they_were(name, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit moments need bitsandbytes")

    def step(state):
        state.params[0].grad = state.params[0].detach().cos()
        state.commit(learning_rate=1e-2, is_finite=True, samples=1, metrics={}, seconds=0)

    whole = (params := large(), TrainingState(params, make_optimizer(params, name, **OPTIONS)))[1]
    step(whole)
    torch.save(whole.shared_parts()["optimizer.pt"], tmp_path / "optimizer.pt")
    again = (params := large(), TrainingState(params, make_optimizer(params, name, **OPTIONS)))[1]
    again.params[0].data.copy_(whole.params[0])
    again.optimizer.load_state_dict(read_part(tmp_path, "optimizer.pt"))
    for _ in range(3):
        step(whole)
        step(again)
    assert torch.equal(whole.params[0], again.params[0])
    moments = [one for one in whole.optimizer.state[whole.params[0]].values() if getattr(one, "ndim", 0) == 2]
    assert sum(one.nbytes for one in moments) == MOMENTS[name] * whole.params[0].numel()


def test_a_run_is_not_resumed_with_another_optimizer(tmp_path):
    pytest.importorskip("bitsandbytes", reason="8-bit moments need bitsandbytes")
    eight = dataclasses.replace(LOOP, optimizer="adamw8bit")
    run(tmp_path / "a", loop=eight)
    longer = dataclasses.replace(eight, updates=9)
    resumed, _ = run(tmp_path / "a", loop=longer, resume=True)
    undisturbed, _ = run(tmp_path / "b", loop=longer)
    assert all(map(torch.equal, resumed.parameters(), undisturbed.parameters()))
    with pytest.raises(InputError, match="optimizer from adamw8bit to adamw"):
        run(tmp_path / "a", loop=dataclasses.replace(LOOP, updates=20), resume=True)
