"""Reward gradients as a trainer: slopes are those of the published losses; what cannot be followed is refused."""

from dataclasses import replace

import pytest
import torch

from rpo.errors import InputError
from rpo.models.latents import images_per_slope
from rpo.objectives.reward_gradient.adjoint_matching import AdjointMatching
from rpo.objectives.reward_gradient.alignprop import AlignProp
from rpo.objectives.reward_gradient.draft import Draft
from rpo.objectives.reward_gradient.refl import Refl
from rpo.objectives.reward_gradient.srpo import Srpo
from rpo.process.prediction import to_x0_eps
from rpo.rewards import REWARDS, RewardError, WeightedRewards, adapt, load_reward, load_rewards
from rpo.rewards.differentiable import is_differentiable, require_differentiable, with_gradient
from rpo.sampling.step import predict, transition
from rpo.trainers.checks.preflight import PreflightError
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.settings import AdapterConfig
from tests.marks import slow_but
from tests.run_state import metrics_of
from tests.trainers.online_runs import PROMPTS, ROLLOUT, learning, lightness, moved, reward_gradient

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")

WHOLE = StepsConfig(freeze_negative=False)
KINDS = {
    "draft": {"objective": Draft(last_steps=2)},
    "alignprop": {"objective": AlignProp()},
    "refl": {"objective": Refl()},
    "srpo": {"objective": Srpo()},
    "adjoint_matching": {"objective": AdjointMatching(), "kl_weight": 0.1},
    "along the ode": {
        "objective": AdjointMatching(last_steps=2),
        "kl_weight": 0.1,
        "rollout": replace(ROLLOUT, eta=0.0),
    },
}
BYTES = adapt(lambda images, prompts: [0.0] * len(images), images="uint8")
"""A reward that takes bytes."""

kinds = pytest.mark.parametrize("kind", KINDS)


def worded(images, prompts):
    """A reward that reads: each prompt asks for another mixture of the channels."""
    mixtures = torch.tensor([[len(one), one.count("o"), one.count("a")] for one in prompts]).float()
    return (images.mean(dim=(2, 3)) * mixtures).sum(dim=1) + images.square().mean(dim=(1, 2, 3))


def found(trainer):
    """What the trainer's own loss says of its first rollout, flat."""
    steps = trainer.algorithm.collect(0)
    gradients = torch.autograd.grad(trainer.algorithm.loss(steps).loss, trainer.run.policy.parameters)
    return torch.cat([one.flatten() for one in gradients]), steps


def of(loss, trainer):
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, trainer.run.policy.parameters)])


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def unrolled(trainer, last):
    """The images of the rollout in use, drawn again from before the last steps with the noise that they had."""
    model, collector = trainer.run.model, trainer.algorithm.collector
    trajectory, guidance = collector.rollout.trajectory, trainer.run.config.guidance_scale
    grid, first = trajectory.grid, trajectory.grid.num_steps - last
    x_t = trajectory.latents[first]
    for step in range(first, grid.num_steps):
        t, s = grid[step], grid[step + 1]
        with torch.no_grad():
            drawn = transition(model, trajectory.predictions[step], trajectory.latents[step], t, s, collector.kernel)
            noise = trajectory.latents[step + 1] - drawn.mean
        said = predict(model, x_t, t, trajectory.conditioning, guidance_scale=guidance)
        x_t = transition(model, said, x_t, t, s, collector.kernel).mean + noise
    return model.decode(x_t)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_draft_differentiates_the_sampler(last, tmp_path):
    trainer = moved(reward_gradient(tmp_path, objective=Draft(last_steps=last), steps=WHOLE, reward=worded))
    gradient, _ = found(trainer)
    rollout = trainer.algorithm.collector.rollout
    loss = -worded(unrolled(trainer, last), rollout.prompts).mean()
    assert apart(gradient, of(loss, trainer)) < 1e-3


def test_refl_differentiates_the_image_that_a_step_predicts(tmp_path):
    chosen = {"steps": replace(WHOLE, window=(0.3, 1.0), train_steps=2), "reward": worded}
    margin = 5.4
    trainer = moved(reward_gradient(tmp_path, objective=Refl(margin=margin), **chosen))
    gradient, steps = found(trainer)
    model = trainer.run.model
    said = predict(model, steps.x_t, steps.t, steps.conditioning, guidance_scale=ROLLOUT.guidance_scale)
    x0_hat, _ = to_x0_eps(said, steps.x_t, steps.t, model.prediction_type)
    earned = worded(model.decode(x0_hat), steps.prompts)
    assert 0 < (earned < margin).float().mean() < 1
    loss = torch.relu(margin - earned).sum() / trainer.algorithm.collector.rollout.num_images
    assert apart(gradient, of(loss, trainer)) < 1e-3


def test_srpo_differentiates_the_image_behind_one_step_by_both_wordings(tmp_path):
    chosen = Srpo(good="a good", bad="bad", bias=0.2, step=0.15)
    rollout = replace(ROLLOUT, guidance_scale=1.0, num_steps=6)
    trainer = moved(reward_gradient(tmp_path, objective=chosen, steps=WHOLE, reward=worded, rollout=rollout))
    gradient, steps = found(trainer)
    model, process = trainer.run.model, trainer.run.model.process
    x_0, eps = to_x0_eps(steps["prediction"], steps.x_t, steps.t, model.prediction_type)
    drawn = trainer.algorithm.collector.rollout.trajectory.x_0[steps.image]
    assert (x_0 - drawn).abs().max() < 1e-3 * drawn.abs().max()
    said = predict(model, steps.x_t, steps.t, steps.conditioning, guidance_scale=1.0)
    x0_hat, eps_hat = to_x0_eps(said, steps.x_t, steps.t, model.prediction_type)
    loss, directions = 0.0, set()
    for row in range(len(steps)):
        time = (steps.t.timestep[row].double().item() + 1) / model.num_train_timesteps
        is_back = (row // 4 + int(steps.image[row])) % 2 == 1
        directions.add((int(steps.image[row]), is_back))
        later = torch.tensor(time + (0.15 if is_back else -0.15) * (process.start - process.end))
        alpha, sigma = process.alpha(later).float(), process.sigma(later).float()
        image = model.decode(((alpha * x0_hat + sigma * eps_hat - sigma * eps) / alpha)[row : row + 1])
        good, bad = (worded(image, [f"{word}. {steps.prompts[row]}"]) for word in ("a good", "bad"))
        wanted, unwanted = (bad, good) if is_back else (good, bad)
        loss = loss - (1.2 * wanted - unwanted).sum() * steps.weight[row] / len(steps)
    assert len(directions) == 8  # both ways for each of four images
    assert apart(gradient, of(loss, trainer)) < 2e-3


@pytest.mark.parametrize("kind", slow_but(("adjoint_matching",), ("adjoint_matching", "along the ode", "draft")))
def test_networks_that_compute_again_are_those_that_computed(kind, tmp_path):
    """With checkpointing a backward calls the network once more: the reference's must find the reference."""

    def gradient(checkpoints):
        chosen = KINDS[kind] | {"kl_weight": 0.1, "adapter": AdapterConfig(rank=4, gradient_checkpointing=checkpoints)}
        trainer = moved(reward_gradient(tmp_path / str(checkpoints), reward=worded, **chosen))
        trainer.run.model.denoiser.train(checkpoints)
        return found(trainer)

    (plain, steps), (again, steps_again) = gradient(False), gradient(True)
    assert apart(steps_again["slope"], steps["slope"]) < 1e-4
    assert apart(again, plain) < 1e-4


@pytest.mark.parametrize("kind", slow_but(("along the ode",), KINDS))
def test_a_killed_run_goes_on_in_the_same_bits(kind, tmp_path):
    def made(folder, updates):
        return reward_gradient(tmp_path / folder, reward=worded, learning=learning(updates), **KINDS[kind])

    whole = made("whole", 3)
    whole.train()
    made("cut", 2).train()
    resumed = made("cut", 3)
    resumed.train(resume=True)
    for one, other in zip(resumed.run.policy.parameters, whole.run.policy.parameters, strict=True):
        assert torch.equal(one, other)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", slow_but(("draft",), KINDS))
def test_it_learns(kind, tmp_path):
    """The reward that the slopes are of rises; SRPO's is that by its good wording against its bad."""

    def reward(images, prompts):
        signs = torch.tensor([-1.0 if one.startswith("bad") else 1.0 for one in prompts])
        return signs * 100 * images[:, 0].mean(dim=(1, 2))

    chosen = KINDS[kind] | ({"kl_weight": 1e-3} if "kl_weight" in KINDS[kind] else {})
    trainer = reward_gradient(tmp_path, reward=reward, learning=learning(12, learning_rate=3e-2), **chosen)
    trainer.train()
    earned = [line["reward/mean"] for line in metrics_of(tmp_path)]
    assert sum(earned[-3:]) / 3 > earned[0]


def test_adjoint_matching_serves_several_updates_by_one_rollout(tmp_path):
    trainer = reward_gradient(tmp_path, steps=StepsConfig(passes=2), learning=learning(4), **KINDS["adjoint_matching"])
    assert trainer.train().updates == 4


def test_the_negative_branch_may_be_left_where_it_was(tmp_path):
    """The slope goes through both branches of guidance; what learns is the prompt's."""
    whole, _ = found(moved(reward_gradient(tmp_path / "whole", steps=WHOLE)))
    frozen, steps = found(moved(reward_gradient(tmp_path / "frozen")))
    assert "negative" in steps
    cosine = torch.nn.functional.cosine_similarity(whole, frozen, dim=0).item()
    assert 0.5 < cosine < 0.9999


def test_every_named_reward_says_whether_it_has_a_gradient():
    assert all(is_differentiable(load_reward(name)) is not None for name in REWARDS)


def test_rewards_without_a_gradient_are_refused_with_those_that_have_one():
    having = with_gradient()
    assert "clip-score" in having
    for name in REWARDS.keys() - set(having):
        with pytest.raises(InputError) as caught:
            require_differentiable(load_rewards(name))
        assert all(one in str(caught.value) for one in (name, *having))


def test_a_run_refuses_a_reward_without_a_gradient(tmp_path):
    with pytest.raises(InputError, match="'shapes' has no gradient in the image"):
        reward_gradient(tmp_path, reward="shapes")


def test_so_is_a_function_that_shows_it_only_when_asked(tmp_path):
    with pytest.raises(InputError, match="no gradient in the image"):
        reward_gradient(tmp_path, reward=lambda images, prompts: [0.1 * row for row in range(len(images))]).train()
    both = WeightedRewards({"light": (lightness, 1.0), "listed": (lambda images, prompts: [0.1] * len(images), 1.0)})
    with pytest.raises(InputError, match="reward 'listed' has no gradient"):
        reward_gradient(tmp_path / "both", reward=both).train()
    from_bytes = load_rewards({"tests.trainers.test_reward_gradient:BYTES": 1.0})
    with pytest.raises(InputError, match="no gradient in the image"):
        require_differentiable(from_bytes)


def test_a_reward_that_is_flat_is_found_before_the_first_update(tmp_path):
    def flat(images, prompts):
        return images.round().mean(dim=(1, 2, 3))

    with pytest.raises(PreflightError, match="has a slope"):
        reward_gradient(tmp_path, reward=flat).train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_slope_that_is_not_finite_names_its_image(tmp_path):
    def cliff(images, prompts):
        values = images.mean(dim=(1, 2, 3))
        return torch.cat([values[:1], (values - values.detach())[1:2].sqrt(), values[2:]])

    with pytest.raises(RewardError, match="image 1") as caught:
        reward_gradient(tmp_path, reward=cliff, preflight=False).train()
    assert any(prompt in str(caught.value) for prompt in PROMPTS)


@pytest.mark.parametrize("kind", slow_but(("draft",), ("draft", "refl", "srpo")))
def test_an_image_that_cannot_be_judged_has_no_part_in_the_gradient(kind, tmp_path):
    """With three of four judged the others count four thirds."""
    rollout = replace(ROLLOUT, max_failed=0.5)

    def blind(images, prompts):
        values = worded(images, prompts)
        return torch.cat([values[:1], values[1:2] * torch.nan, values[2:]])

    def made(folder, reward, **changes):
        chosen = {"objective": KINDS[kind]["objective"], "rollout": rollout, "steps": WHOLE} | changes
        return moved(reward_gradient(tmp_path / folder, reward=reward, **chosen))

    trainer = made("blind", blind)
    gradient, steps = found(trainer)
    assert steps.counts[steps.image == 1].eq(0).all() and steps.counts[steps.image != 1].allclose(torch.tensor(4 / 3))
    seeing = made("seeing", worded)
    rows = seeing.algorithm.collect(0)
    unjudged = trainer.algorithm.collect(0)["slope"].flatten(1).abs().sum(dim=1) == 0
    assert torch.isfinite(gradient).all()
    assert apart(gradient, of(kept_loss(seeing, rows, steps.counts, unjudged), seeing)) < 1e-3


def kept_loss(trainer, rows, counts, is_left_out):
    """The loss without some of the rows' slopes."""
    slope = rows["slope"].masked_fill(is_left_out[:, None, None, None], 0.0)
    return trainer.algorithm.loss(replace(rows.knowing(slope=slope), counts=counts)).loss


def test_too_many_that_cannot_be_judged_end_the_run(tmp_path):
    trainer = reward_gradient(tmp_path, reward=lambda images, prompts: worded(images, prompts) * torch.nan)
    with pytest.raises(RewardError, match="max_failed"):
        trainer.train()


def test_memory_does_not_grow_with_how_far_the_slope_is_followed(tmp_path):
    """The denoiser sees one step at a time, and the autoencoder a few images."""
    seen = []

    def watched(images, prompts):
        seen.append(len(images))
        return lightness(images, prompts)

    trainer = reward_gradient(tmp_path, objective=Draft(last_steps=3), reward=watched)
    most = []
    network = trainer.run.model.denoiser
    network.register_forward_hook(lambda module, args, output: most.append(len(args[0])))
    trainer.algorithm.collect(0)
    assert max(most) <= 2 * trainer.run.config.learning.micro_batch
    assert images_per_slope(512 * 512) == 1 and images_per_slope(1024 * 1024) == 1 and images_per_slope(64 * 64) == 32
    assert max(seen) <= 32
