"""Steps: which moments are trained, what each counts, and that no way of cutting them up changes the gradient."""

import io
from dataclasses import replace

import pytest
import torch

from rpo.trainers.rollouts.batches import StepBatches
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.rollouts.steps import Steps, choose_steps, noised_steps, per_image, steps_of
from rpo.training.state import TrainingState
from rpo.types import Conditioning, Grid
from tests.trainers.online_runs import ROLLOUT, grpo

IMAGES = 6


def grid(num_steps, *, ends_clean=True):
    alpha = torch.linspace(0.1, 1.0 if ends_clean else 0.999, num_steps + 1)
    return Grid(alpha, (1 - alpha**2).clamp(min=0).sqrt(), torch.linspace(999, 0, num_steps + 1))


def chosen(config, *, num_steps=8, seed=0, skips_clean_end=False, **ends):
    generator = torch.Generator().manual_seed(seed)
    return choose_steps(grid(num_steps, **ends), IMAGES, config, generator, skips_clean_end=skips_clean_end)


def test_all_steps_of_all_images_are_trained_unless_told_otherwise():
    steps, stands_for = chosen(StepsConfig())
    assert steps.tolist() == [[step] * IMAGES for step in range(8)]
    assert stands_for == 8


@pytest.mark.parametrize(
    ("ends_clean", "skips_clean_end", "trained"), [(True, True, 7), (True, False, 8), (False, True, 8)]
)
def test_a_step_without_noise_is_left_out_where_asked(ends_clean, skips_clean_end, trained):
    steps, stands_for = chosen(StepsConfig(), skips_clean_end=skips_clean_end, ends_clean=ends_clean)
    assert steps.shape == (trained, IMAGES)
    assert stands_for == trained


def test_drawn_steps_are_in_order_different_and_every_image_s_own():
    steps, stands_for = chosen(StepsConfig(train_steps=3))
    assert steps.shape == (3, IMAGES)
    assert (steps.diff(dim=0) > 0).all()
    assert len(steps.unique(dim=1).T) > 1
    assert stands_for == 8
    assert torch.equal(chosen(StepsConfig(train_steps=3))[0], steps)
    assert not torch.equal(chosen(StepsConfig(train_steps=3), seed=1)[0], steps)


def test_images_whose_graph_is_kept_share_their_steps():
    steps, _ = chosen(StepsConfig(train_steps=3, keep_graph=True))
    assert len(steps.unique(dim=1).T) == 1


def test_a_window_is_a_share_of_the_trajectory():
    steps, stands_for = chosen(StepsConfig(window=(0.25, 0.75)))
    assert steps[:, 0].tolist() == [2, 3, 4, 5]
    assert stands_for == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            StepsConfig(train_steps=8),
            "train_steps is 8, but a trajectory has 7 steps to train .8 in all",
        ),
        (
            StepsConfig(window=(0.9, 1.0)),
            "but a trajectory has 0 steps to train .*widen the window",
        ),
    ],
)
def test_more_than_there_are_cannot_be_trained(config, message):
    with pytest.raises(ValueError, match=message):
        chosen(config, skips_clean_end=True)


@pytest.mark.parametrize("config", [StepsConfig(train_steps=3), StepsConfig(train_steps=1, window=(0.5, 1.0))])
def test_weights_make_the_mean_over_draws_the_sum_over_steps(config):
    """Of any quantity: a number per step and image."""
    quantity = torch.randn(8, IMAGES, generator=torch.Generator().manual_seed(1))
    eligible = quantity if config.window is None else quantity[4:]
    total = 0.0
    for seed in range(3000):
        steps, stands_for = chosen(config, seed=seed)
        total += stands_for * quantity.gather(0, steps).mean()
    assert total.item() / 3000 == pytest.approx(eligible.sum(dim=0).mean().item(), abs=0.06)


@pytest.fixture
def trainer(tmp_path):
    return grpo(tmp_path, kl_weight=0.1)


def test_steps_are_those_of_the_rollout(trainer):
    rollout = trainer.algorithm.collector.draw(0)
    which = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 1]])
    steps = steps_of(rollout, which, 5.0, is_frozen=True)
    assert len(steps) == 8
    assert steps.image.tolist() == [0, 1, 2, 3] * 2
    trajectory = rollout.trajectory
    for row, (step, image) in enumerate(zip(which.flatten().tolist(), steps.image.tolist(), strict=True)):
        assert torch.equal(steps.x_t[row], trajectory.latents[step, image])
        assert torch.equal(steps.x_s[row], trajectory.latents[step + 1, image])
        assert torch.equal(steps["prediction"][row], trajectory.predictions[step, image])
        assert torch.equal(steps["negative"][row], trajectory.negatives[step, image])
        assert steps["log_prob"][row] == trajectory.log_probs[step, image]
        assert steps.t.timestep[row] == trajectory.grid.timestep[step]
        assert steps.s.alpha[row] == trajectory.grid.alpha[step + 1]
        assert steps.names[row] == rollout.names[image]
    assert steps.weight.tolist() == [5.0] * 8
    assert steps_of(rollout, which, 5.0, is_frozen=False).known.keys() == {"prediction", "log_prob"}
    assert per_image(torch.arange(8.0), steps, 4).tolist() == [4, 6, 8, 10]


def test_moments_noised_afresh_share_their_noise_before_and_after_the_step(trainer):
    """x_t and x_s are of one noising: the noise of an image and step, at both of its times."""
    rollout = trainer.algorithm.collector.draw(0)
    which = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 1]])
    generators = [torch.Generator().manual_seed(image) for image in range(4)]
    noised = grid(3, ends_clean=False)
    steps = noised_steps(rollout, noised, which, 3.0, prediction_type="epsilon", generators=generators)
    noise = torch.stack([torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(image)) for image in range(4)])
    for row, (step, image) in enumerate(zip(which.flatten().tolist(), steps.image.tolist(), strict=True)):
        x_0, eps = rollout.trajectory.x_0[image], noise[image, row // 4]
        for found, node in ((steps.x_t[row], noised[step]), (steps.x_s[row], noised[step + 1])):
            assert torch.allclose(found, node.alpha * x_0 + node.sigma * eps, atol=1e-5)
        assert torch.allclose(steps["prediction"][row], eps, atol=1e-5)


@pytest.mark.parametrize("minibatches", [2, 3])
def test_what_an_update_learns_from_does_not_depend_on_the_processes(trainer, minibatches):
    rollout = replace(ROLLOUT, prompts=4)

    steps = trainer.algorithm.collect(0)

    def visited_by(process, processes):
        images = torch.arange(8 // processes)
        image, first = images.repeat(3), process * len(images)
        own = replace(steps.select(image % 4), image=image, step=torch.arange(3).repeat_interleave(len(images)))
        stream = batches(rollout, StepsConfig(minibatches=minibatches), lambda _: own, 1, share=(process, processes))(0)
        parts = [next(stream) for _ in range(minibatches)]
        return [{(image + first, step) for image, step in visited([part])} for part in parts]

    whole = visited_by(0, 1)
    assert sum(map(len, whole)) == 24
    halves = [visited_by(process, 2) for process in range(2)]
    assert [one | other for one, other in zip(*halves, strict=True)] == whole


def test_selected_steps_are_in_the_order_asked_for(trainer):
    steps = trainer.algorithm.collect(0)
    some = steps.select(torch.tensor([5, 0]))
    for name in ("x_t", "step"):
        assert torch.equal(getattr(some, name), getattr(steps, name)[[5, 0]])
    for name in ("advantage", "reference", "log_prob"):
        assert torch.equal(some[name], steps[name][[5, 0]])
    assert torch.equal(some.t.sigma, steps.t.sigma[[5, 0]])
    assert some.names == (steps.names[5], steps.names[0])


def test_steps_that_were_saved_come_back_on_the_device_that_trains(trainer):
    steps = trainer.algorithm.collect(0)
    same = Steps.of_state_dict(steps.state_dict(), torch.device("cpu"))
    assert torch.equal(same.x_t, steps.x_t) and torch.equal(same["advantage"], steps["advantage"])
    moved = Steps.of_state_dict(steps.state_dict(), torch.device("meta"))
    tensors = [moved.x_t, moved.t.sigma, moved.s.alpha, moved.image, moved.weight, *moved.known.values()]
    tensors += [*moved.facts.values(), moved.conditioning.tokens]
    assert {one.device.type for one in tensors} == {"meta"}


def gradient(trainer, parts):
    """The mean over micro-batches, as `fit` takes it."""
    parameters = trainer.run.policy.parameters
    losses = [trainer.algorithm.loss(part).loss for part in parts]
    found = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_any_micro_batch_gives_the_same_gradient(trainer, micro_batch):
    steps = trainer.algorithm.collect(0)
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(1))
    parts = [steps.select(rows) for rows in order.split(micro_batch)]
    whole = gradient(trainer, [steps])
    assert whole.norm() > 0
    assert torch.allclose(gradient(trainer, parts), whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)


def batches(rollout, config, prepare, accumulate=2, again=lambda steps: steps, **share):
    return StepBatches(
        prepare,
        again,
        iter,
        config,
        rollout=rollout,
        accumulate=accumulate,
        seed=3,
        device=torch.device("cpu"),
        **share,
    )


def visited(parts):
    return sorted(
        (image, step) for part in parts for image, step in zip(part.image.tolist(), part.step.tolist(), strict=True)
    )


def test_every_pass_visits_every_point_once_in_another_order(trainer):
    stream = batches(ROLLOUT, StepsConfig(minibatches=2, passes=2), trainer.algorithm.collect)(0)
    first, second = [next(stream) for _ in range(4)], [next(stream) for _ in range(4)]
    everything = sorted(
        (image, step) for image in range(4) for step in range(trainer.algorithm.collector.trained_steps)
    )
    assert visited(first) == visited(second) == everything
    assert [part.names for part in first] != [part.names for part in second]


def test_what_steps_are_worth_is_said_anew_for_every_further_update(trainer):
    asked = []

    def again(steps):
        asked.append(steps)
        return steps.knowing(advantage=steps["advantage"] + len(asked))

    stream = batches(ROLLOUT, StepsConfig(minibatches=2, passes=2), trainer.algorithm.collect, again=again)(0)
    updates = [[next(stream), next(stream)] for _ in range(4)]
    assert len(asked) == 3 and all(one is asked[0] for one in asked), "each time of what was drawn"
    worth = [torch.cat([part["advantage"] for part in parts]).mean().item() for parts in updates]
    whole = asked[0]["advantage"].mean().item()
    assert (worth[0] + worth[1]) / 2 == pytest.approx(whole + 0.5, abs=1e-5)
    assert (worth[2] + worth[3]) / 2 == pytest.approx(whole + 2.5, abs=1e-5)


def test_killed_within_a_rollout_the_rest_is_the_same_to_the_bit(trainer):
    config = StepsConfig(minibatches=2, passes=2)

    def moved(index):
        raise AssertionError("the policy has moved: this rollout cannot be drawn again")

    whole = batches(ROLLOUT, config, trainer.algorithm.collect)
    stream = whole(0)
    for _ in range(2):  # one update
        next(stream)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = batches(ROLLOUT, config, moved)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again = resumed(1)
    for _ in range(6):
        one, other = next(stream), next(again)
        assert one.names == other.names
        for name in ("x_t", "x_s", "weight", "step"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.known.keys() == other.known.keys() >= {"advantage", "log_prob", "reference", "negative"}
        assert all(torch.equal(value, other[name]) for name, value in one.known.items())
        assert torch.equal(one.conditioning.tokens, other.conditioning.tokens)
        assert torch.equal(one.t.timestep, other.t.timestep)
        assert one.facts.keys() == other.facts.keys()
    with pytest.raises(AssertionError, match="the policy has moved"):
        next(again)


def test_a_checkpoint_holds_an_embedding_for_each_image_not_for_each_point(trainer):
    rollout, sizes = trainer.algorithm.collector.draw(0), []
    width = 8 * 4000  # bytes of both embeddings of an image, far above all else
    wide = Conditioning({"tokens": torch.randn(4, 1, 4000)}, {"tokens": torch.randn(4, 1, 4000)})
    rollout = replace(rollout, trajectory=replace(rollout.trajectory, conditioning=wide))
    for which in (torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0] * 4, [1] * 4, [2] * 4])):
        steps = steps_of(rollout, which, 3.0, is_frozen=False)
        source = batches(ROLLOUT, StepsConfig(passes=2), lambda _, steps=steps: steps, 1)
        part = next(source(0))
        assert torch.equal(part.conditioning.tokens, wide.tokens[part.image])
        assert torch.equal(part.conditioning.negative["tokens"], wide.negative["tokens"][part.image])
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        sizes.append(file.tell())
    assert 4 * width < sizes[0] and sizes[1] - sizes[0] < 2 * width


def test_between_rollouts_there_is_nothing_to_keep(trainer):
    source = batches(ROLLOUT, StepsConfig(minibatches=2), trainer.algorithm.collect)
    stream = source(0)
    for _ in range(4):
        next(stream)
    assert source.state_dict() == {}
    source.load_state_dict({})
    assert next(source(2)).names[0].startswith("rollout 1, ")


def test_steps_that_are_kept_are_not_copied_at_every_update(trainer):
    source = batches(ROLLOUT, StepsConfig(minibatches=2), trainer.algorithm.collect)
    next(source(0))
    parameters = trainer.run.policy.parameters
    state = TrainingState(parameters, torch.optim.SGD(parameters, lr=1.0), objects={"batches": source})
    state.mark()
    assert state._marked["objects"]["batches"]["x_t"] is source.state_dict()["x_t"]
