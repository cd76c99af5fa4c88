"""Points: which moments are trained, what each counts, and that no way of cutting them up changes the gradient."""

import io
from dataclasses import replace

import pytest
import torch
from rpo.trainers.online_config import LearningConfig
from rpo.trainers.rollouts.points import choose_steps, noised_points, per_image, points_of

from rpo.trainers.grpo import loss
from rpo.trainers.rollouts.batches import PointBatches
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
    steps, stands_for = chosen(LearningConfig())
    assert steps.tolist() == [[step] * IMAGES for step in range(8)]
    assert stands_for == 8


@pytest.mark.parametrize(
    ("ends_clean", "skips_clean_end", "trained"), [(True, True, 7), (True, False, 8), (False, True, 8)]
)
def test_a_step_without_noise_is_left_out_where_asked(ends_clean, skips_clean_end, trained):
    steps, stands_for = chosen(LearningConfig(), skips_clean_end=skips_clean_end, ends_clean=ends_clean)
    assert steps.shape == (trained, IMAGES)
    assert stands_for == trained


def test_drawn_steps_are_in_order_different_and_every_image_s_own():
    steps, stands_for = chosen(LearningConfig(train_steps=3))
    assert steps.shape == (3, IMAGES)
    assert (steps.diff(dim=0) > 0).all()
    assert len(steps.unique(dim=1).T) > 1
    assert stands_for == 8
    assert torch.equal(chosen(LearningConfig(train_steps=3))[0], steps)
    assert not torch.equal(chosen(LearningConfig(train_steps=3), seed=1)[0], steps)


def test_images_whose_graph_is_kept_share_their_steps():
    steps, _ = chosen(LearningConfig(train_steps=3, keep_graph=True))
    assert len(steps.unique(dim=1).T) == 1


def test_a_window_is_a_share_of_the_trajectory():
    steps, stands_for = chosen(LearningConfig(window=(0.25, 0.75)))
    assert steps[:, 0].tolist() == [2, 3, 4, 5]
    assert stands_for == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LearningConfig(train_steps=8),
            "train_steps is 8, but a trajectory has 7 steps to train .8 in all",
        ),
        (
            LearningConfig(window=(0.9, 1.0)),
            "but a trajectory has 0 steps to train .*widen the window",
        ),
    ],
)
def test_more_than_there_are_cannot_be_trained(config, message):
    with pytest.raises(ValueError, match=message):
        chosen(config, skips_clean_end=True)


@pytest.mark.parametrize("config", [LearningConfig(train_steps=3), LearningConfig(train_steps=1, window=(0.5, 1.0))])
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


def test_points_are_the_steps_of_the_rollout(trainer):
    rollout = trainer.run.draw(0)
    steps = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 1]])
    points = points_of(rollout, steps, 5.0, is_frozen=True)
    assert len(points) == 8
    assert points.image.tolist() == [0, 1, 2, 3] * 2
    trajectory = rollout.trajectory
    for row, (step, image) in enumerate(zip(steps.flatten().tolist(), points.image.tolist(), strict=True)):
        assert torch.equal(points.x_t[row], trajectory.latents[step, image])
        assert torch.equal(points.x_s[row], trajectory.latents[step + 1, image])
        assert torch.equal(points.prediction[row], trajectory.predictions[step, image])
        assert torch.equal(points.negative[row], trajectory.negatives[step, image])
        assert points.log_prob[row] == trajectory.log_probs[step, image]
        assert points.t.timestep[row] == trajectory.grid.timestep[step]
        assert points.s.alpha[row] == trajectory.grid.alpha[step + 1]
        assert points.names[row] == rollout.names[image]
    assert points.weight.tolist() == [5.0] * 8
    assert points_of(rollout, steps, 5.0, is_frozen=False).negative is None
    assert per_image(torch.arange(8.0), points, 4).tolist() == [4, 6, 8, 10]


def test_moments_noised_afresh_share_their_noise_before_and_after_the_step(trainer):
    """x_t and x_s are of one noising: the noise of an image and step, at both of its times."""
    rollout = trainer.run.draw(0)
    steps = torch.tensor([[0, 1, 0, 2], [2, 2, 1, 1]])
    generators = [torch.Generator().manual_seed(image) for image in range(4)]
    noised = grid(3, ends_clean=False)
    points = noised_points(rollout, noised, steps, 3.0, prediction_type="epsilon", generators=generators)
    noise = torch.stack([torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(image)) for image in range(4)])
    for row, (step, image) in enumerate(zip(steps.flatten().tolist(), points.image.tolist(), strict=True)):
        x_0, eps = rollout.trajectory.x_0[image], noise[image, row // 4]
        for found, node in ((points.x_t[row], noised[step]), (points.x_s[row], noised[step + 1])):
            assert torch.allclose(found, node.alpha * x_0 + node.sigma * eps, atol=1e-5)
        assert torch.allclose(points.prediction[row], eps, atol=1e-5)


@pytest.mark.parametrize("minibatches", [2, 3])
def test_what_an_update_learns_from_does_not_depend_on_the_processes(trainer, minibatches):
    rollout = replace(ROLLOUT, prompts=4)
    learning = LearningConfig(minibatches=minibatches)

    def visited_by(process, processes):
        images = torch.arange(8 // processes)
        image, first = images.repeat(3), process * len(images)
        points = replace(
            trainer.prepare(0).select(image % 4), image=image, step=torch.arange(3).repeat_interleave(len(images))
        )
        stream = PointBatches(
            lambda _: points,
            trainer.run.live,
            learning,
            rollout=rollout,
            accumulate=1,
            seed=3,
            share=(process, processes),
        )(0)
        parts = [next(stream) for _ in range(minibatches)]
        return [{(image + first, step) for image, step in visited([part])} for part in parts]

    whole = visited_by(0, 1)
    assert sum(map(len, whole)) == 24
    halves = [visited_by(process, 2) for process in range(2)]
    assert [one | other for one, other in zip(*halves, strict=True)] == whole


def test_selected_points_are_in_the_order_asked_for(trainer):
    points = trainer.prepare(0)
    some = points.select(torch.tensor([5, 0]))
    for name in ("x_t", "advantage", "reference", "step"):
        assert torch.equal(getattr(some, name), getattr(points, name)[[5, 0]])
    assert torch.equal(some.t.sigma, points.t.sigma[[5, 0]])
    assert some.names == (points.names[5], points.names[0])


def gradient(trainer, parts):
    """The mean over micro-batches, as `fit` takes it."""
    parameters = trainer.run.policy.parameters
    settings = {"policy": trainer.run.policy, "config": trainer.config, "guidance_scale": trainer.run.guidance_scale}
    losses = [loss(part, **settings).loss for part in parts]
    found = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_any_micro_batch_gives_the_same_gradient(trainer, micro_batch):
    points = trainer.prepare(0)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    parts = [points.select(rows) for rows in order.split(micro_batch)]
    whole = gradient(trainer, [points])
    assert whole.norm() > 0
    assert torch.allclose(gradient(trainer, parts), whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)


def batches(trainer, learning, *, prepare=None, accumulate=2):
    return PointBatches(
        prepare or trainer.prepare, trainer.run.live, learning, rollout=ROLLOUT, accumulate=accumulate, seed=3
    )


def visited(parts):
    return sorted(
        (image, step) for part in parts for image, step in zip(part.image.tolist(), part.step.tolist(), strict=True)
    )


def test_every_pass_visits_every_point_once_in_another_order(trainer):
    stream = batches(trainer, LearningConfig(minibatches=2, passes=2))(0)
    first, second = [next(stream) for _ in range(4)], [next(stream) for _ in range(4)]
    everything = sorted((image, step) for image in range(4) for step in range(trainer.run.trained_steps))
    assert visited(first) == visited(second) == everything
    assert [part.names for part in first] != [part.names for part in second]


def test_killed_within_a_rollout_the_rest_is_the_same_to_the_bit(trainer):
    learning = LearningConfig(minibatches=2, passes=2)

    def moved(index):
        raise AssertionError("the policy has moved: this rollout cannot be drawn again")

    whole = batches(trainer, learning)
    stream = whole(0)
    for _ in range(2):  # one update
        next(stream)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = batches(trainer, learning, prepare=moved)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again = resumed(1)
    for _ in range(6):
        one, other = next(stream), next(again)
        assert one.names == other.names
        for name in ("x_t", "x_s", "advantage", "log_prob", "reference", "negative", "weight", "step"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.conditioning.tokens, other.conditioning.tokens)
        assert torch.equal(one.t.timestep, other.t.timestep)
        assert one.facts.keys() == other.facts.keys()
    with pytest.raises(AssertionError, match="the policy has moved"):
        next(again)


def test_a_checkpoint_holds_an_embedding_for_each_image_not_for_each_point(trainer):
    rollout, sizes = trainer.run.draw(0), []
    width = 8 * 4000  # bytes of both embeddings of an image, far above all else
    wide = Conditioning({"tokens": torch.randn(4, 1, 4000)}, {"tokens": torch.randn(4, 1, 4000)})
    rollout = replace(rollout, trajectory=replace(rollout.trajectory, conditioning=wide))
    for steps in (torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0] * 4, [1] * 4, [2] * 4])):
        points = points_of(rollout, steps, 3.0, is_frozen=False)
        source = batches(trainer, LearningConfig(passes=2), prepare=lambda _, points=points: points, accumulate=1)
        part = next(source(0))
        assert torch.equal(part.conditioning.tokens, wide.tokens[part.image])
        assert torch.equal(part.conditioning.negative["tokens"], wide.negative["tokens"][part.image])
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        sizes.append(file.tell())
    assert 4 * width < sizes[0] and sizes[1] - sizes[0] < 2 * width


def test_between_rollouts_there_is_nothing_to_keep(trainer):
    source = batches(trainer, LearningConfig(minibatches=2))
    stream = source(0)
    for _ in range(4):
        next(stream)
    assert source.state_dict() == {}
    source.load_state_dict({})
    assert next(source(2)).names[0].startswith("rollout 1, ")


def test_points_that_are_kept_are_not_copied_at_every_update(trainer):
    source = batches(trainer, LearningConfig(minibatches=2))
    next(source(0))
    parameters = trainer.run.policy.parameters
    state = TrainingState(parameters, torch.optim.SGD(parameters, lr=1.0), objects={"batches": source})
    state.mark()
    assert state._marked["objects"]["batches"]["x_t"] is source.state_dict()["x_t"]
