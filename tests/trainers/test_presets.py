"""The published endpoint objectives as trainers: what they draw with and ask for, that they learn, how they resume."""

from dataclasses import replace

import pytest
import torch

from rpo.errors import InputError
from rpo.objectives.endpoint.awm import Awm
from rpo.objectives.endpoint.bound import Bound
from rpo.objectives.endpoint.dgpo import Dgpo
from rpo.objectives.endpoint.nft import Nft
from rpo.objectives.endpoint.par import Par
from rpo.objectives.endpoint.ram import Ram
from rpo.objectives.endpoint.rebel import Rebel
from rpo.objectives.endpoint.rvm import Rvm
from rpo.objectives.endpoint.update import LagConfig
from rpo.publishing.methods import METHODS
from rpo.trainers.checks.preflight import PreflightError
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.rollouts.lag import OldPolicy
from rpo.trainers.rollouts.settings import OnlineLearningConfig, RolloutConfig, StepsConfig
from tests.analytic.closed_forms import PRINTED
from tests.analytic.linear_quadratic import Case
from tests.analytic.linear_quadratic import endpoint as toy_endpoint
from tests.marks import slow_but
from tests.run_state import metrics_of
from tests.trainers.online_runs import UNWATCHED, endpoint, learning, lightness, moved

PRESETS = {one.kind: one for one in (Nft(), Awm(), Ram(), Rvm(), Par(), Dgpo(), Rebel())}
ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=3, num_steps=5, solver="dpm_solver", eta=0.0, guidance_scale=1.0)
presets = pytest.mark.parametrize("kind", PRESETS)
pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")


def made(folder, kind, *, updates=3, rate=1e-2, **changes):
    given = {"objective": PRESETS[kind], "rollout": ROLLOUT, "reward": lightness}
    return endpoint(folder, learning=learning(updates, learning_rate=rate), **given | changes)


@pytest.mark.parametrize("kind", slow_but(("nft",), PRESETS))
def test_a_killed_run_goes_on_in_the_same_bits(kind, tmp_path):
    whole = made(tmp_path / "whole", kind)
    whole.train()
    made(tmp_path / "cut", kind, updates=2).train()
    resumed = made(tmp_path / "cut", kind)
    resumed.train(resume=True)
    for one, other in zip(resumed.run.policy.parameters, whole.run.policy.parameters, strict=True):
        assert torch.equal(one, other)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", slow_but(("nft", "awm", "rebel", "dgpo"), PRESETS))
def test_its_authors_times_stand_where_none_are_given(kind, tmp_path):
    preset, steps = PRESETS[kind], made(tmp_path, kind).algorithm.collect(0)
    low, high = preset.times.window or (0.0, 1.0)
    eligible = {step for step in range(5) if low <= step / 5 < high} - ({4} if preset.times.of_rollout else set())
    of_image = [set(steps.step[steps.image == image].tolist()) for image in range(6)]
    expected = min(preset.times.count, len(eligible - {4})) if preset.times.count else len(eligible)
    assert all(one <= eligible and len(one) == expected for one in of_image)
    noise = torch.stack([steps.x_t[steps.image == image][0] for image in range(3)])
    if preset.times.shared:
        assert of_image[0] == of_image[1] == of_image[2]
    one = made(tmp_path / "given", kind, steps=StepsConfig(train_steps=1, window=(0.2, 0.6))).algorithm.collect(0)
    assert len(one) == 6 and set(one.step.tolist()) <= {1, 2}
    assert not torch.equal(noise[0], noise[1])


def test_images_of_a_prompt_share_their_noise_where_they_are_compared_at_it(tmp_path):
    trainer = made(tmp_path, "rebel")
    steps = trainer.algorithm.collect(0)
    images = trainer.algorithm.collector.rollout.trajectory.x_0[steps.image]
    eps = (steps.x_t - steps.t.alpha * images) / steps.t.sigma
    by_place = eps.view(-1, 6, *eps.shape[1:])
    assert torch.allclose(by_place[:, 0], by_place[:, 2], atol=1e-4)
    assert (by_place[:, 0] - by_place[:, 3]).abs().max() > 0.1


@presets
def test_what_it_asks_for_is_there_and_no_more(kind, tmp_path):
    trainer = moved(made(tmp_path, kind))
    steps, preset = trainer.algorithm.collect(0), PRESETS[kind]
    assert {name for name in ("old", "reference", "current") if name in steps} == preset.needs
    now = trainer.algorithm.noised.said(steps)
    if "current" in steps:
        assert torch.equal(steps["current"], now)
    if "old" in steps:  # where the policy was before it was moved
        assert (steps["old"] - now).abs().max() > 1e-3
    if "reference" in steps and "old" in steps:
        assert torch.allclose(steps["old"], steps["reference"], atol=1e-6)


def test_the_old_policy_draws_where_its_authors_have_it(tmp_path):
    """Images by the adapter as it was: those of a run whose policy was not moved."""
    for kind, is_old in (("nft", True), ("awm", False)):
        still, trainer = made(tmp_path / kind, kind), moved(made(tmp_path / f"{kind} moved", kind))
        drawn = []
        for one in (still, trainer):
            one.algorithm.collect(0)
            drawn.append(one.algorithm.collector.rollout.trajectory.x_0)
        assert torch.equal(*drawn) is is_old


@pytest.mark.parametrize("kind", slow_but(("ram",), PRESETS))
def test_it_climbs_a_reward(kind, tmp_path):
    """On a toy of one pixel, drawn from a normal law, whose reward is a parabola: by five standard errors and more."""
    case = Case(PRINTED, (0.0, 0.0))
    few = OnlineLearningConfig(updates=40, learning_rate=2e-2, micro_batch=4096, progress=False)
    rollout = case.rollout(64, 10)
    toy_endpoint(case, tmp_path, objective=PRESETS[kind], kl_weight=0.0, rollout=rollout, learning=few).train()
    metrics = metrics_of(tmp_path)
    first, last = (sum(one["reward/mean"] for one in some) / 5 for some in (metrics[:5], metrics[-5:]))
    noise = metrics[0]["reward/std"] / (5 * 64) ** 0.5
    assert last - first > 5 * noise


def test_the_last_time_of_a_rollout_is_left_out_wherever_it_or_the_process_ends(tmp_path):
    """Of the tiny checkpoint the process does not end at clean data; of this solver the rollouts do, of DDIM not."""
    for solver, ends_clean in (("dpm_solver", True), ("ddim", False)):
        trainer = made(tmp_path / solver, "nft", rollout=replace(ROLLOUT, solver=solver))
        steps = trainer.algorithm.collect(0)
        assert (trainer.algorithm.collector.rollout.trajectory.grid.sigma[-1] == 0) == ends_clean
        assert set(steps.step.tolist()) == {0, 1, 2, 3}


def test_the_fast_average_of_dgpo_draws_from_when_it_is_told_and_is_asked_for_its_clip(tmp_path):
    def drawn(trainer):
        trainer.algorithm.collect(0)
        return trainer.algorithm.collector.rollout.trajectory.x_0

    still = drawn(made(tmp_path, "dgpo"))

    def is_drawn_by_policy(preset, updates):
        trainer = made(tmp_path, "dgpo", objective=preset)
        for _ in range(updates):
            trainer.algorithm.after(1, {})
        return not torch.equal(drawn(moved(trainer)), still)

    assert is_drawn_by_policy(Dgpo(), 3)
    assert is_drawn_by_policy(Dgpo(clip=0.1), 3)
    assert is_drawn_by_policy(Dgpo(old_draws_after=2), 1)
    assert not is_drawn_by_policy(Dgpo(old_draws_after=2), 2)
    kept = [
        made(tmp_path, "dgpo", objective=Dgpo(**some)).algorithm for some in ({}, {"old_draws_after": 2}, {"clip": 1})
    ]
    assert [algorithm.old is not None for algorithm in kept] == [False, True, True]
    assert ["old" in algorithm.collect(0) for algorithm in kept] == [False, False, True]


@pytest.mark.parametrize(
    "preset", [Dgpo(clip=1e-2, old_draws_after=1), pytest.param(Awm(clip=1e-5), marks=pytest.mark.slow)], ids=str
)
def test_a_killed_run_with_options_goes_on_in_the_same_bits(preset, tmp_path):
    whole, cut, resumed = (
        made(tmp_path / folder, preset.kind, objective=preset, updates=updates, reference_guidance=4.5)
        for folder, updates in (("whole", 3), ("cut", 2), ("cut", 3))
    )
    whole.train()
    cut.train()
    resumed.train(resume=True)
    for one, other in zip(resumed.run.policy.parameters, whole.run.policy.parameters, strict=True):
        assert torch.equal(one, other)


def test_the_reference_may_be_guided_where_the_policy_is_not(tmp_path):
    trainer, usual = made(tmp_path, "dgpo", reference_guidance=4.5), made(tmp_path / "usual", "dgpo")
    steps = trainer.algorithm.collect(0)
    with trainer.run.policy.reference():
        guided, plain = (
            trainer.run.model.predict(steps.x_t, steps.t.timestep.flatten(), steps.conditioning, scale)
            for scale in (4.5, 1.0)
        )
    assert (guided - plain).abs().max() > 1e-3
    assert torch.allclose(steps["reference"], guided, atol=1e-4)
    assert torch.allclose(usual.algorithm.collect(0)["reference"], plain, atol=1e-4)


def test_a_reward_that_is_the_same_for_all_images_is_told_before_the_first_update(tmp_path):
    trainer = made(tmp_path, "nft", reward=lambda images, prompts: images.new_ones(len(images)))
    with pytest.raises(PreflightError, match="rewards vary within prompts"):
        trainer.train()


@pytest.mark.parametrize("window", [(0.85, 1.0), (0.01, 0.1)])
def test_a_window_without_times_is_refused(window, tmp_path):
    with pytest.raises(InputError, match="a trajectory has 0 steps to train .*widen the window"):
        made(tmp_path, "dgpo", steps=StepsConfig(window=window))


@presets
def test_a_model_card_has_a_formula_for_it(kind):
    assert "arxiv.org" in METHODS[PRESETS[kind].title][1]


def test_an_old_policy_changes_places_and_follows():
    weights = [torch.nn.Parameter(torch.tensor([0.0])), torch.nn.Parameter(torch.tensor([1.0]))]
    old = OldPolicy(weights, LagConfig(decay=0.5, rise=0.5))
    with torch.no_grad():
        weights[0] += 4
    with pytest.raises(KeyError), old.in_place():
        assert weights[0].item() == 0 and not torch.is_grad_enabled()
        raise KeyError
    assert weights[0].item() == 4
    old.follow()
    with old.in_place():
        assert weights[0].item() == 2
    other = OldPolicy(weights, LagConfig(decay=0.5, rise=0.5))
    other.load_state_dict(old.state_dict())
    other.follow()
    with other.in_place():
        assert (weights[0].item(), weights[1].item()) == (3, 1)


def test_a_run_whose_old_policy_never_differs_is_ended(tmp_path):
    small = {"rollout": replace(ROLLOUT, prompts=1, images_per_prompt=2, num_steps=2), "monitor": UNWATCHED}
    ended = made(tmp_path, "nft", updates=12, objective=Nft(old=LagConfig(rise=1e-12)), **small).train()
    assert ended.updates == 10 and "equals its old self" in ended.stopped_because


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rollout": replace(ROLLOUT, images_per_prompt=1)}, "images_per_prompt"),
        ({"kl_weight": 0.1}, "kl_weight"),
        ({"reference_guidance": 4.5, "objective": Rvm()}, "rvm asks no reference as it is set"),
        ({"reference_guidance": 4.5, "objective": Par(reference_weight=0)}, "par asks no reference as it is set"),
        ({"reference_guidance": 4.5, "objective": Bound()}, "reference that is guided as the policy is"),
    ],
)
def test_what_no_run_can_have_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        EndpointConfig(**{"objective": Nft(), "rollout": ROLLOUT} | words)


@pytest.mark.parametrize("decay", [1.0, 0.0, float("nan")])
def test_an_old_policy_that_never_moves_or_is_the_policy_is_refused(decay):
    with pytest.raises(InputError, match="decay"):
        LagConfig(decay=decay)
