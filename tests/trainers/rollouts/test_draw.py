"""Rollouts: what is drawn is a function of the seed and of the visit, whoever draws it and in whatever batches."""

from dataclasses import replace

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.rewards import load_rewards
from rpo.sampling.sample import Keep
from rpo.trainers.rollouts.draw import Rollouts, rollout_facts
from rpo.trainers.rollouts.settings import RolloutConfig
from rpo.training.processes import Processes
from tests.tiny import tiny_sd

CONFIG = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, guidance_scale=2.0)
PROMPTS = ("a red circle", "two dogs", "a house")


def lightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def darkness(images, prompts):
    return 1 - images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def model():
    return Checkpoint(tiny_sd())


def rollouts(model, config=CONFIG, prompts=PROMPTS, **changes):
    return Rollouts(model, prompts, load_rewards(lightness), config, **{"seed": 0} | changes)


def drawn(source, index=0, **keep):
    return source.draw(index, lambda grid: Keep(predictions=True, **keep))


def test_layout(model):
    rollout = drawn(rollouts(model))
    assert rollout.num_images == 4
    assert rollout.group.tolist() == [0, 0, 1, 1]
    assert rollout.prompts[0] == rollout.prompts[1] != rollout.prompts[2]
    assert rollout.trajectory.latents.shape == (4, 4, 4, 8, 8)
    assert torch.allclose(rollout.rewards, lightness(model.decode(rollout.trajectory.x_0), rollout.prompts))
    assert rollout.names[3] == f"rollout 0, prompt {rollout.prompts[3]!r}, image 1"


def test_batches_change_nothing(model):
    whole, parts = (drawn(rollouts(model, replace(CONFIG, batch_size=size)), negatives=True) for size in (64, 3))
    for name in ("latents", "log_probs", "predictions", "negatives"):
        assert torch.allclose(getattr(whole.trajectory, name), getattr(parts.trajectory, name), atol=1e-3, rtol=1e-4)
    assert [chunk.latents.shape[1] for chunk in parts.chunks] == [3, 1]


def test_processes_divide_what_one_draws(model):
    whole = drawn(rollouts(model), index=3)
    shares = [drawn(rollouts(model, share=(process, 2)), index=3) for process in range(2)]
    assert shares[0].prompts + shares[1].prompts == whole.prompts
    together = torch.cat([share.trajectory.latents for share in shares], dim=1)
    assert torch.allclose(together, whole.trajectory.latents, atol=1e-5)


@pytest.mark.parametrize("share", [(0, 1), (0, 2)])
def test_a_prompt_that_is_visited_again_gives_other_images(model, share):
    """One prompt, as in the experiments of the paper: its second group in a rollout must not repeat the first."""
    source = rollouts(model, replace(CONFIG, prompts=4), prompts=PROMPTS[:1], share=share)
    noise = torch.cat([drawn(source, index).trajectory.latents[0] for index in (-1, 0, 1)])
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)


def test_every_prompt_is_visited_before_one_is_repeated(model):
    seen = [prompt for index in range(3) for prompt in drawn(rollouts(model), index).prompts[::2]]
    assert sorted(seen[:3]) == sorted(seen[3:]) == sorted(PROMPTS)


def test_grids(model):
    assert torch.equal(rollouts(model).grid(0).timestep, model.grid(3).timestep)
    config = replace(CONFIG, num_steps=4, max_steps=9, spacing="random")
    source, again, other = (
        rollouts(model, config),
        rollouts(model, config, share=(1, 2)),
        rollouts(model, config, seed=1),
    )
    grids = [source.grid(index) for index in range(20)]
    assert {grid.num_steps for grid in grids} == {4, 5, 6, 7, 8, 9}
    assert all(torch.equal(grid.alpha, again.grid(index).alpha) for index, grid in enumerate(grids))
    assert any(grid.num_steps != other.grid(index).num_steps for index, grid in enumerate(grids))
    even = rollouts(model, replace(CONFIG, num_steps=4, spacing="uniform"))
    assert torch.equal(even.grid(0).timestep, even.grid(1).timestep)


def test_every_batch_of_a_multistep_solver_steps_on_its_own_grid(model, monkeypatch):
    config = replace(CONFIG, solver="dpm_solver", eta=0.0, batch_size=2)
    whole = drawn(rollouts(model, replace(config, batch_size=64)))
    monkeypatch.setattr(
        "rpo.models.solvers._are_same", lambda node, other: node.sigma.data_ptr() == other.sigma.data_ptr()
    )
    parts = drawn(rollouts(model, config))
    assert torch.allclose(parts.trajectory.x_0, whole.trajectory.x_0, atol=1e-3)


def test_each_prompt_is_encoded_once_and_alone_and_the_least_recent_leave_first(model, monkeypatch):
    """Alone, so that a resumed run has the same bits."""
    seen, encode = [], model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: seen.append(tuple(prompts)) or encode(prompts))
    source = rollouts(model)
    first = [drawn(source, index) for index in range(3)]
    assert sorted(seen) == sorted((prompt,) for prompt in PROMPTS)
    monkeypatch.setattr("rpo.trainers.rollouts.draw.PROMPTS_KEPT", 0)
    source = rollouts(model)
    again = [drawn(source, index) for index in range(3)]
    assert len(seen) > 2 * len(PROMPTS)  # two prompts are at hand at a time
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.trajectory.latents, other.trajectory.latents)


def test_rewards_are_weighted_and_kept_apart(model):
    rewards = load_rewards({f"{__name__}:lightness": 1.0, f"{__name__}:darkness": -0.5})
    rollout = Rollouts(model, PROMPTS, rewards, CONFIG, seed=0).draw(0, lambda grid: Keep())
    light, dark = rollout.parts.values()
    assert torch.allclose(light + dark, torch.ones(4))
    assert torch.allclose(rollout.rewards, light - 0.5 * dark)
    facts = rollout_facts(rollout, Processes())
    assert facts["reward/mean"].item() == pytest.approx(rollout.rewards.mean().item())
    assert facts["reward/std"].item() == pytest.approx(rollout.rewards.std(correction=0).item())
    assert [facts[f"reward/{name}"] for name in rollout.parts] == [light.mean(), dark.mean()]


def test_wrong_prompts_are_named(model):
    with pytest.raises(ValueError, match="there are no prompts"):
        rollouts(model, prompts=())
    with pytest.raises(ValueError, match="prompt 1 is '  '"):
        rollouts(model, prompts=("a", "  "))
    with pytest.raises(ValueError, match="rollout.prompts is 2 for 3 processes.*multiple of 3"):
        rollouts(model, share=(0, 3))
