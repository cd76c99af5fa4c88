"""What a masked-token generator has to do: draw as its pipeline draws, and be trained by what trains every family."""

from dataclasses import replace

import pytest
import torch
from diffusers.schedulers import scheduling_amused
from peft import PeftModel

from rpo.adapters.formats.write import PEFT_FOLDER
from rpo.adapters.lora import add_lora, lora_parameters, reference, save_lora
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.objectives.preference.mapo import Mapo
from rpo.process.categorical import MASK, Unmasking
from rpo.sampling.sample import Keep, generate, image_generator, sample
from rpo.sampling.select import How, by_drafts
from rpo.sampling.stepwise import by_potential, by_pruning
from rpo.trainers.grpo import GRPO
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.types import Canvas
from tests.contracts.test_families import PROMPTS, pairs, weights
from tests.contracts.test_ratio import GUIDANCE, log_ratio
from tests.sampling.choices import OnTheWay
from tests.tiny import tiny_sd
from tests.tiny_amused import CODES, tiny_amused
from tests.trainers import pair_runs
from tests.trainers.online_runs import (
    ROLLOUT,
    UNWATCHED,
    endpoint,
    grpo,
    learning,
    lightness,
    moved,
    reward_gradient,
    score_as_action,
)
from tests.trainers.test_presets import PRESETS

pytestmark = [pytest.mark.contracts, pytest.mark.filterwarnings("ignore:the network denoises no better")]

CANVASES = [Canvas(64, 64), Canvas(32, 96)]


def dpo(folder, *, pipe=None, learning=None, objective=None, **changes):
    options = {"micro_batch": 2, "learning_rate": 1e-2}
    return pair_runs.trainer_of(
        folder,
        pipe=pipe or tiny_amused(),
        pairs=pairs(),
        objective=objective,
        updates=3 if learning is None else learning.updates,
        pairs_per_update=2,
        learning=options,
        resolution=(48, 64),
        preflight=True,
        **changes,
    )


def generators():
    return [image_generator(7, index, 0) for index in range(len(PROMPTS))]


def by_our_noise(monkeypatch, noise):
    """The pipeline draws by the noise of ours, step after step: of the tokens, and of their order."""
    of_tokens, of_order = iter(noise[1:, :, 0]), iter(noise[1:, :, 1])

    def multinomial(probabilities, count, generator):
        cumulative = probabilities.double().cumsum(dim=1)
        level = torch.special.ndtr(next(of_tokens).flatten().double()) * cumulative[:, -1]
        return (cumulative < level[:, None]).sum(dim=1, keepdim=True)

    def gumbel(like, generator):
        return -(-torch.special.ndtr(next(of_order).flatten(1).double()).log()).log().float()

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", gumbel)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_drawing_ends_where_the_pipeline_ends(schedule, guidance, canvas, monkeypatch):
    pipe, num_steps = tiny_amused(masking_schedule=schedule), 5
    model = Checkpoint(pipe)
    shape = model.latent_shape(canvas)
    noise = torch.stack([torch.randn(num_steps + 1, *shape, generator=one) for one in generators()], dim=1)
    ours = sample(
        model,
        model.encode_prompts(PROMPTS),
        model.grid(num_steps, canvas),
        Unmasking(),
        guidance_scale=guidance,
        generators=generators(),
        canvas=canvas,
    ).x_0
    by_our_noise(monkeypatch, noise)
    theirs = pipe(
        PROMPTS,
        height=canvas.height,
        width=canvas.width,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    assert torch.equal(ours[:, 0].long(), theirs)


def test_images_go_to_tokens_and_back_as_in_the_pipeline():
    pipe = tiny_amused()
    model, images = Checkpoint(pipe), torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    mean, std = model.encode_moments(images)
    codes = pipe.vqvae.quantize(pipe.vqvae.encode(images).latents)[2][2].view(2, 6, 8)
    assert mean.shape == (2, *model.latent_shape(Canvas(48, 64))) and not std.any()
    assert torch.equal(mean[:, 0].long(), codes)
    assert torch.allclose(model.decode(mean), pipe.vqvae(images).sample.clamp(0, 1), atol=1e-5)


def test_tokens_that_no_half_type_counts_reach_the_network_whole():
    """bfloat16 has eight bits: above 256 it skips numbers."""
    pipe, seen = tiny_amused(), []
    pipe.transformer.to(torch.bfloat16)
    model = Checkpoint(pipe)
    model.denoiser.embed.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x_t = torch.zeros(1, *model.latent_shape())
    model.denoiser.register_to_config(codebook_size=1000)
    x_t[:, 0] = 259
    with pytest.raises(IndexError):  # the tiny network has fewer
        model.predict(x_t, torch.tensor(500.0), model.encode_prompts(["a"]))
    assert seen[0].unique().tolist() == [259]


def test_a_dropped_caption_is_what_guidance_pushes_away_from():
    model = Checkpoint(tiny_amused())
    cond, dropped = model.encode_prompts(PROMPTS), model.embed([""])
    assert all(torch.allclose(one, dropped[name].expand_as(one), atol=1e-5) for name, one in cond.negative.items())
    x_t, timestep = torch.full((3, *model.latent_shape()), float(MASK)), torch.tensor([100.0, 400.0, 700.0])
    one, other = model.predict(x_t, timestep, cond), model.predict(x_t, timestep, cond.only_negative())
    assert one.shape == (3, CODES, 8, 8)
    assert torch.allclose(model.predict(x_t, timestep, cond, 3.0), other + 3 * (one - other), atol=1e-5)


def test_a_fresh_lora_and_the_reference_are_the_base_to_the_bit():
    model = Checkpoint(tiny_amused())
    cond, x_t = model.encode_prompts(PROMPTS), torch.full((3, *model.latent_shape()), float(MASK))
    base = model.predict(x_t, torch.tensor(500.0), cond)
    add_lora(model.denoiser, rank=4, target_modules=model.family.lora_targets)
    assert torch.equal(model.predict(x_t, torch.tensor(500.0), cond), base)
    for parameter in lora_parameters(model.denoiser):
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(model.predict(x_t, torch.tensor(500.0), cond), base)
    with reference(model.denoiser):
        assert torch.equal(model.predict(x_t, torch.tensor(500.0), cond), base)


def test_a_saved_lora_draws_the_same_in_stock_diffusers_and_peft(tmp_path):
    def drawn(pipe):
        words = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **words).images

    pipe = tiny_amused()
    model, before = Checkpoint(pipe), drawn(pipe)
    add_lora(model.denoiser, rank=4, alpha=2.0, target_modules=model.family.lora_targets)
    for parameter in lora_parameters(model.denoiser):
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model, tmp_path)
    ours, fresh = drawn(pipe), tiny_amused()
    exec("\n".join(model.family.lora_preparation), {"pipe": fresh})
    fresh.load_lora_weights(str(tmp_path))
    assert torch.equal(drawn(fresh), ours)
    assert not torch.equal(ours, before)
    fresh = tiny_amused()
    PeftModel.from_pretrained(fresh.transformer, tmp_path / PEFT_FOLDER)
    assert torch.equal(drawn(fresh), ours)


def test_a_folder_of_the_family_is_loaded(tmp_path):
    pipe = tiny_amused()
    pipe.save_pretrained(tmp_path)
    model, built = Checkpoint.load(tmp_path), Checkpoint(pipe)
    assert model.fingerprint("denoiser") == built.fingerprint("denoiser")
    assert model.fingerprint("vae") == built.fingerprint("vae")


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("order", ["policy", "reference"])
def test_a_policy_that_has_not_moved_has_log_ratio_0(order, guidance, tmp_path):
    scale, steps = GUIDANCE[guidance]
    rollout = replace(ROLLOUT, guidance_scale=scale, order=order)
    trainer = moved(grpo(tmp_path, pipe=tiny_amused(), rollout=rollout, steps=steps))
    assert log_ratio(trainer).tolist() == [0.0] * 4


TRAINERS = {
    "dpo": dpo,
    "kto": lambda folder, **given: dpo(folder, objective=Kto(), **given),
    "mapo": lambda folder, **given: dpo(folder, objective=Mapo(), **given),
    "dpo, kept winner": lambda folder, **given: dpo(folder, objective=Dpo(winner_preserving=0.5), **given),
    "grpo": grpo,
    "ddpo": lambda folder, **given: grpo(folder, baseline="prompt_history", **given),
    "grpo, reference's order": lambda folder, **given: grpo(
        folder, rollout=replace(ROLLOUT, order="reference"), **given
    ),
    "grpo, kl": lambda folder, **given: grpo(folder, kl_weight=0.1, **given),
    "bound": lambda folder, **given: endpoint(folder, baseline="group", **given),
    "bound, kl": lambda folder, **given: endpoint(folder, baseline="group", kl_weight=0.1, clip=0.2, **given),
    **{
        kind: lambda folder, kind=kind, **given: endpoint(folder, objective=PRESETS[kind], reward=lightness, **given)
        for kind in PRESETS
    },
}


DEFAULT = ("dpo", "grpo")
"""What stands for all of them in the default tests."""


@pytest.mark.parametrize(
    "algorithm", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TRAINERS]
)
def test_three_updates_move_the_adapter_and_nothing_else_and_a_killed_run_ends_in_the_same_weights(algorithm, tmp_path):
    make, pipe = TRAINERS[algorithm], tiny_amused()
    trainer, before = make(tmp_path / "whole", pipe=pipe, learning=learning(3)), weights(pipe.transformer)
    trainer.train()
    whole = weights(pipe.transformer)
    changed = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    adapter = {name for name in whole if ".lora_B." in name or ".lora_A." in name}
    assert changed and changed <= adapter and all(value.isfinite().all() for value in whole.values())
    make(tmp_path / "cut", pipe=tiny_amused(), learning=learning(2)).train()
    pipe = tiny_amused()
    make(tmp_path / "cut", pipe=pipe, learning=learning(3)).train(resume=True)
    resumed = weights(pipe.transformer)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    "make", [score_as_action, reward_gradient, lambda *a, **k: endpoint(*a, baseline="value", **k)]
)
def test_what_needs_gaussian_noise_says_so(make, tmp_path):
    with pytest.raises(InputError, match="tokens"):
        make(tmp_path, pipe=tiny_amused()).train()


@pytest.mark.parametrize("said", [{"solver": "dpm_solver", "eta": 0.0}, {"spacing": "uniform"}])
def test_what_is_said_of_latents_is_refused(said, tmp_path):
    with pytest.raises(InputError, match="tokens"):
        endpoint(tmp_path, pipe=tiny_amused(), objective=PRESETS["awm"], rollout=replace(ROLLOUT, **said)).train()


def test_an_order_is_of_tokens_alone(tmp_path):
    with pytest.raises(InputError, match="order"):
        grpo(tmp_path, rollout=replace(ROLLOUT, order="reference")).train()


@pytest.mark.parametrize("pipe", [tiny_amused, tiny_sd], ids=["tokens", "latents"])
def test_paths_come_to_differ_in_likelihood_as_in_reward(pipe, tmp_path, monkeypatch):
    """Each update of a rollout leaves less to gain, down to what its network can express."""
    left, again = [], GRPO.again
    monkeypatch.setattr(GRPO, "again", lambda self, steps: left.append(again(self, steps)) or left[-1])
    steps, small = StepsConfig(passes=4), learning(4, learning_rate=1e-3)
    alone = {"preflight": False, "monitor": UNWATCHED}
    grpo(tmp_path, pipe=pipe(), reward=lightness, regression=0.5, steps=steps, learning=small, **alone).train()
    sizes = [steps["advantage"].square().mean().item() for steps in left]
    gains = (2 * 0.5 * 2) ** 2 * left[0]["gain"].square().mean().item()  # K / (K - 1) of two images
    assert len(sizes) == 3 and sizes[0] < gains and sizes[-1] < 0.7 * gains


def test_images_are_chosen_among_many_by_drafts_and_on_the_way():
    model = Checkpoint(tiny_amused())
    how = How(num_steps=4, guidance_scale=2.0, seed=3)
    judge = lambda images, prompts: images.mean(dim=(1, 2, 3))  # noqa: E731
    images = generate(model, PROMPTS, seed=3, images_per_prompt=4, num_steps=4, guidance_scale=2.0).unflatten(0, (3, 4))
    for found in (
        by_drafts(model, PROMPTS, judge, 4, how, draft_steps=2),
        by_pruning(model, PROMPTS, judge, 4, how, stages={2: 2}),
        by_potential(model, PROMPTS, OnTheWay(), 4, how, looks=[2]),
    ):
        for row, number in enumerate(found.chosen.tolist()):
            assert torch.allclose(found.images[row], images[row, number], atol=1e-5)


def test_predictions_that_are_kept_are_those_of_every_step():
    model = Checkpoint(tiny_amused())
    trajectory = sample(
        model,
        model.encode_prompts(PROMPTS),
        model.grid(3),
        Unmasking(),
        guidance_scale=2.0,
        generators=generators(),
        keep=Keep(predictions=True, negatives=True),
    )
    assert trajectory.predictions.shape == trajectory.negatives.shape == (3, 3, CODES, 8, 8)
    assert trajectory.latents.shape == (4, 3, *model.latent_shape())
