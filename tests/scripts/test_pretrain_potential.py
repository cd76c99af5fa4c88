"""What looks are labelled with, that luck is worth a half, how truth is measured, and a judge as a run's result."""

import json

import numpy as np
import pytest
import torch

from rpo.config.load import load_config
from rpo.shapes.potential import PotentialHeads, ShapesPotential, load_heads
from rpo.shapes.prompts import KINDS, sample_prompts
from scripts.shapes import pretrain_potential as script
from scripts.shapes.looks import GENERATORS, Looks, draw_looks
from scripts.shapes.pretrain_potential import (
    Labelled,
    PretrainPotentialConfig,
    auc,
    heads_on,
    labelled,
    loss_of,
    measure,
    pretrain_potential,
    save_heads,
    temper,
    truth_of,
)

DIMS, PER = 8, 3
"""Of an embedding; looks of a trajectory, its end among them."""


def looks(trajectories=400, *, seed=0, share=(0.2, 0.7)):
    """Of two kinds of prompt that come out right as often as `share` says; looks early in time accept nothing."""
    draw = torch.Generator().manual_seed(seed)
    kind = (torch.arange(trajectories) % 2).repeat_interleave(PER)
    right = (torch.rand(trajectories, generator=draw) < torch.tensor(share)[kind[::PER]]).repeat_interleave(PER)
    time = torch.tensor([0.9, 0.4, 0.0]).repeat(trajectories)
    says = right & (time < 0.5)
    image = torch.nn.functional.normalize(torch.randn(trajectories * PER, DIMS, generator=draw), dim=1)
    image[:, 0] = torch.where(says, 1.0, -1.0) * (time < 0.5)
    return Looks(image, image.flip(1), time, says, right, kind, torch.zeros_like(kind))


def test_luck_agrees_half_of_the_time_whatever_the_kind_of_prompt():
    data = labelled(looks(4000))
    for kind in (0, 1):
        early = (data.looks.time == 0.9) & (data.looks.kind == kind)
        weight = data.weight[early, 0]
        assert float((weight * data.truth[early, 0]).sum() / weight.sum()) == pytest.approx(0.5, abs=1e-6)
        assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5)
        late = (data.looks.time == 0.4) & (data.looks.kind == kind)
        assert data.truth[late, 0].all()


def test_every_head_is_asked_about_its_own():
    data = labelled(looks(20))
    is_end = data.looks.time == 0
    assert torch.equal(data.truth[:, 1], data.looks.is_right.float()) and torch.equal(
        data.truth[:, 1:2], data.truth[:, 2:]
    )
    assert (data.weight[is_end, 0] == 0).all() and (data.weight[~is_end, 0] > 0).all()
    assert (data.weight[:, 1] == 1).all() and torch.equal(data.weight[:, 2] == 1, is_end)
    heads = PotentialHeads(DIMS, 4)
    both = labelled(looks(20))
    blind = Labelled(both.looks, torch.where(both.weight > 0, both.truth, 1 - both.truth), both.weight)
    assert torch.equal(loss_of(heads, both), loss_of(heads, blind))


def test_truth_is_told_within_tenths():
    said = torch.tensor([0.05, 0.05, 0.05, 0.95])
    found = truth_of(said, torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 2.0]))
    assert found["said"] == pytest.approx(0.5) and found["true"] == pytest.approx(0.5)
    assert [one["share"] for one in found["tenths"]] == [0.5, 0.5]
    assert found["error"] == pytest.approx(0.05) and found["auc"] == pytest.approx((2 + 2 * 0.5) / 4)
    assert np.isnan(auc(said, torch.ones(4)))


def test_confidence_is_what_was_kept_apart_says():
    data = labelled(looks(4000))
    heads = PotentialHeads(DIMS, 4).eval().requires_grad_(False)
    last = heads.layers[-1]
    logits = heads_on(heads, data.looks)
    truth = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < (20 * logits).sigmoid()).float()
    last.weight.mul_(40)
    last.bias.mul_(40)
    temper(heads, Labelled(data.looks, truth, torch.ones_like(truth)))
    again = heads_on(heads, data.looks)
    assert torch.allclose(again / (40 * logits), torch.full_like(logits, 0.5), atol=0.15)


def test_what_is_learnt_is_measured_and_saved(tmp_path):
    torch.manual_seed(0)
    learnt, heads = labelled(looks(4000)), PotentialHeads(DIMS, 16)
    optimizer = torch.optim.Adam(heads.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(heads, learnt).backward()
        optimizer.step()
    save_heads(heads, tmp_path / "judge")
    rows = {row["from"]: row for row in measure(load_heads(tmp_path / "judge"), looks(seed=1))}
    assert rows[0.8]["looks"] == rows[0.4]["looks"] == rows[0.0]["looks"] == 400
    assert rows[0.8]["clear_share"] < 0.1 and rows[0.4]["clear_share"] > 0.9
    assert rows[0.8]["clear"]["said"] == pytest.approx(0.5, abs=0.1) and "potential" in rows[0.4]
    assert rows[0.0]["best"]["auc"] > 0.99 and rows[0.0]["best"]["error"] < 0.1
    assert "best" not in rows[0.4] and "clear" not in rows[0.0]


def test_parts_that_are_there_are_not_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setitem(GENERATORS, "shapes", (3, 2.0))
    prompts = sample_prompts("train", 4, 0)
    whole = draw_looks(tmp_path / "a", "shapes", prompts, seed=1, each=2)
    assert whole.time.view(4, 3)[:, 2].eq(0).all() and (whole.time.view(4, 3)[:, :2] > 0).all()
    assert torch.equal(whole.says_right[2::3], whole.is_right[2::3])
    assert [KINDS[kind] for kind in whole.kind[::3]] == [prompt.kind for prompt in prompts]
    monkeypatch.setattr("scripts.shapes.looks.Checkpoint", None)  # nobody to draw them
    again = draw_looks(tmp_path / "a", "shapes", prompts, seed=1, each=2)
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(whole).items())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_leaves_a_judge(tmp_path, monkeypatch):
    for name in GENERATORS:
        monkeypatch.setitem(GENERATORS, name, (3, 2.0))
    words = ["trajectories=16", "token_trajectories=8", "looks=2", "evaluate=4"]
    words += [f"loop.{word}" for word in ("updates=6", "warmup_updates=0", "checkpoint_every=2", "progress=false")]
    config = lambda folder: load_config(PretrainPotentialConfig, None, [f"output={folder}", *words])  # noqa: E731
    pretrain_potential(config(tmp_path / "whole"))
    done = []

    def killed(heads, some):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return loss_of(heads, some)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(script, "loss_of", killed)
        pretrain_potential(config(tmp_path / "killed"))
    pretrain_potential(config(tmp_path / "killed"))
    files = ["config.json", "model.safetensors", "evaluation.json"]
    whole, resumed = (tmp_path / name / "checkpoint" for name in ("whole", "killed"))
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in files)
    found = json.loads((whole / "evaluation.json").read_text())
    assert set(found["held_out"]) == set(GENERATORS)
    judge = ShapesPotential(folder=whole)
    assert judge(torch.rand(2, 3, 64, 64), ["a red circle", "two red circles"]).shape == (2,)
