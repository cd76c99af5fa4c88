"""One step under `sample` and trainers, one image per generator, and no waiting for the device in the loop."""

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.process.continuous import grid_at, uniform_times
from rpo.process.transition import Ddim, Gaussian
from rpo.randomness import keyed_generator
from rpo.sampling.sample import Keep, generate, image_generator, sample
from rpo.sampling.step import predict, transition
from tests.tiny import tiny_sd

PROMPTS = ["a red circle", "two blue squares", "", "a green triangle", "x", "y"]
ANCESTRAL = Ddim(eta=1.0)


@pytest.fixture(scope="module")
def model():
    return Checkpoint(tiny_sd())


def rollout(model, prompts, images, *, kernel=ANCESTRAL, guidance_scale=3.0, num_steps=5):
    return sample(
        model,
        model.encode_prompts(prompts),
        model.grid(num_steps),
        kernel,
        guidance_scale=guidance_scale,
        generators=[image_generator(0, image, 0) for image in images],
    )


def replayed(model, trajectory, step, guidance_scale=3.0):
    """The log-density of a step under the model as it is now."""
    x_t, t, s = trajectory.latents[step], trajectory.grid[step], trajectory.grid[step + 1]
    noise_pred = predict(model, x_t, t, trajectory.conditioning, guidance_scale=guidance_scale)
    return transition(model, noise_pred, x_t, t, s, ANCESTRAL).log_prob(trajectory.latents[step + 1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_log_ratio_on_replay_is_exactly_zero_with_the_same_batch(prediction_type, guidance_scale):
    model = Checkpoint(tiny_sd(prediction_type))
    model.denoiser.requires_grad_(True)
    trajectory = rollout(model, PROMPTS, range(6), guidance_scale=guidance_scale)
    for step in range(5):
        log_ratio = replayed(model, trajectory, step, guidance_scale) - trajectory.log_probs[step]
        assert log_ratio.tolist() == [0.0] * 6
        assert log_ratio.requires_grad


def test_replay_carries_the_gradient_of_the_log_prob(model):
    trajectory = rollout(model, PROMPTS[:2], range(2))
    weight = model.denoiser.conv_out.weight
    weight.requires_grad_(True)
    log_prob = replayed(model, trajectory, 2).sum()
    (gradient,) = torch.autograd.grad(log_prob, weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-3 * direction
            values.append(replayed(model, trajectory, 2).double().sum())
            weight -= sign * 1e-3 * direction
    weight.requires_grad_(False)
    assert (values[0] - values[1]).item() / 2e-3 == pytest.approx((gradient * direction).sum().item(), rel=0.02)


def test_an_image_is_the_same_whatever_its_batch(model):
    whole = rollout(model, PROMPTS, range(6))
    alone = rollout(model, PROMPTS[4:5], [4])
    assert torch.equal(whole.latents[0, 4], alone.latents[0, 0])
    assert (whole.x_0[4] - alone.x_0[0]).abs().max() < 1e-4
    per_dim = (whole.log_probs[:, 4] - alone.log_probs[:, 0]).abs() / alone.x_0[0].numel()
    assert per_dim.max() < 1e-6


def test_images_of_a_generator_do_not_depend_on_the_number_of_steps_at_the_start(model):
    assert torch.equal(
        rollout(model, PROMPTS[:1], [0], num_steps=3).latents[0],
        rollout(model, PROMPTS[:1], [0], num_steps=9).latents[0],
    )


def test_generators_differ_by_each_part_of_their_key():
    draws = {
        torch.randn(4, generator=image_generator(*key)).numpy().tobytes()
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    }
    assert len(draws) == 5
    assert torch.equal(
        torch.randn(3, generator=keyed_generator("a", 1)), torch.randn(3, generator=keyed_generator("a", 1))
    )


def test_log_probs_are_those_of_the_kernel_and_nan_where_there_is_none(model):
    trajectory = rollout(model, PROMPTS[:2], range(2))
    assert trajectory.log_probs.isfinite().all()
    assert rollout(model, PROMPTS[:2], range(2), kernel=Ddim(eta=0.0)).log_probs.isnan().all()


def test_the_sampler_leaves_the_global_random_state_alone(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rollout(model, PROMPTS, range(6))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_is_any_function_of_prediction_and_nodes(model):
    def stay(x0_hat, eps_hat, t, s):
        return Gaussian(t.alpha * x0_hat + t.sigma * eps_hat, torch.zeros(()))

    trajectory = rollout(model, PROMPTS[:2], range(2), kernel=stay)
    assert torch.allclose(trajectory.x_0, trajectory.latents[0], atol=1e-3)


def test_nothing_in_the_loop_waits_for_the_device(model, monkeypatch):
    def synchronise(self, *args, **kwargs):
        raise AssertionError("a value was read on the host inside the sampling loop")

    cond, grid = model.encode_prompts(PROMPTS), model.grid(3)
    generators = [image_generator(0, image, 0) for image in range(6)]
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, synchronise)
    sample(model, cond, grid, ANCESTRAL, guidance_scale=2.0, generators=generators)


def test_generate_orders_images_by_prompt_and_ignores_the_batch_size(model):
    arguments = {"seed": 3, "images_per_prompt": 2, "num_steps": 3, "guidance_scale": 2.0}
    images = generate(model, PROMPTS[:3], batch_size=4, **arguments)
    assert images.shape == (6, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.allclose(images, generate(model, PROMPTS[:3], batch_size=1, **arguments), atol=1e-4)
    third = generate(model, PROMPTS, batch_size=12, **arguments)[2:4]
    assert torch.allclose(images[2:4], third, atol=1e-4)


def test_what_generate_draws_is_a_sample_of_each_image_s_own_generator_and_of_the_kernel_asked_for(model):
    images = generate(
        model, PROMPTS[:2], seed=3, images_per_prompt=2, num_steps=3, guidance_scale=2.0, eta=1.0, spacing="uniform"
    )
    drawn = sample(
        model,
        model.encode_prompts([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]),
        grid_at(model.process, uniform_times(model.process, 3)),
        Ddim(1.0),
        guidance_scale=2.0,
        generators=[image_generator(3, prompt, image) for prompt in range(2) for image in range(2)],
    )
    assert torch.allclose(images, model.decode(drawn.x_0), atol=1e-4)


@pytest.mark.parametrize("negatives", [True, False])
def test_what_is_kept_changes_no_path_and_is_what_the_network_said(model, negatives):
    cond, grid = model.encode_prompts(PROMPTS[:2]), model.grid(3)
    plain, kept = (
        sample(
            model,
            cond,
            grid,
            ANCESTRAL,
            guidance_scale=3.0,
            generators=[image_generator(0, image, 0) for image in range(2)],
            keep=keep,
        )
        for keep in (None, Keep(predictions=True, live_steps=frozenset({0, 2}), negatives=negatives))
    )
    assert torch.allclose(kept.latents, plain.latents, atol=1e-3)
    for step in range(3):
        x_t, timestep = kept.latents[step], grid[step].timestep
        guided = model.predict(x_t, timestep, cond, 3.0)
        assert torch.allclose(kept.predictions[step], guided, atol=1e-4)
        if negatives:
            alone = model.predict(x_t, timestep, cond.only_negative(), 1.0)
            assert torch.allclose(kept.negatives[step], alone, atol=1e-4)
    assert (kept.negatives is not None) == negatives


def test_each_image_needs_its_generator(model):
    with pytest.raises(ValueError, match="1 generators were given for 6 images; give one generator per row of cond"):
        sample(
            model,
            model.encode_prompts(PROMPTS),
            model.grid(2),
            ANCESTRAL,
            guidance_scale=1.0,
            generators=[image_generator(0, 0, 0)],
        )


def test_a_kept_graph_survives_what_the_sampler_writes_after_it(model):
    model.denoiser.conv_in.requires_grad_(True)  # a trained first layer keeps x_t for its backward
    cond, grid, kernel = model.encode_prompts(["a", "b"]), model.grid(3), Ddim(1.0)
    keep = Keep(live_steps=frozenset({0, 2}))
    generators = [image_generator(0, 0, k) for k in range(2)]
    drawn = sample(model, cond, grid, kernel, guidance_scale=1.0, generators=generators, keep=keep)
    weight = model.denoiser.conv_in.weight
    for step, noise_pred in drawn.live.items():
        again = model.predict(drawn.latents[step], grid[step].timestep, cond)
        (kept,), (expected,) = (torch.autograd.grad(each.square().sum(), weight) for each in (noise_pred, again))
        assert kept.abs().max() > 0
        torch.testing.assert_close(kept, expected)
    model.denoiser.conv_in.requires_grad_(False)
