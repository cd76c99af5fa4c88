"""What every family has to do: draw as its own pipeline draws, encode as it encodes, and be trained by every algorithm.

`pytest -m contracts` runs this for all of them; see `families.py`.
"""

import pytest
import torch

from rpo.adapters.lora import add_lora, lora_parameters, reference, save_lora
from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.models.checkpoint import Checkpoint
from rpo.models.solvers import BlackBoxSolver
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.types import Canvas
from tests.contracts.algorithms import ALGORITHMS
from tests.contracts.families import ALWAYS, FAMILIES, VARIANTS, drawn_by, encoded_by, mostly, mostly_pairs
from tests.trainers.online_runs import small_value  # noqa: F401

pytestmark = [
    pytest.mark.contracts,
    pytest.mark.filterwarnings("ignore:the network denoises no better"),
]

PROMPTS = ["a red circle", "a house", "two dogs"]
NATIVE, WIDE = Canvas(64, 64), Canvas(32, 96)

families = pytest.mark.parametrize("family", mostly(FAMILIES))
variants = pytest.mark.parametrize("variant", mostly(VARIANTS))


def generators():
    return [image_generator(7, index, 0) for index in range(len(PROMPTS))]


def drawn(model, *, canvas, guidance, num_steps=4, kernel=None):
    grid = model.grid(num_steps, canvas) if kernel is None else kernel.grid
    cond = model.encode_prompts(PROMPTS)
    return sample(
        model,
        cond,
        grid,
        kernel or Ddim(0.0),
        guidance_scale=guidance,
        generators=generators(),
        canvas=canvas,
    ).x_0


def drawn_by_the_pipeline(pipe, *, canvas, guidance, num_steps=4, **options):
    drawing = {"canvas": canvas, "guidance": guidance, "num_steps": num_steps, "generators": generators()}
    return drawn_by(pipe, PROMPTS, **drawing, **options)


@pytest.mark.parametrize(
    ("variant", "canvas", "guidance"),
    [
        pytest.param(
            variant, canvas, guidance, marks=() if is_shown and variant.startswith(ALWAYS) else pytest.mark.slow
        )
        for number, variant in enumerate(VARIANTS)
        for canvas, guidance, is_shown in [
            (NATIVE, 1.0, number % 4 == 2),
            (WIDE, 1.0, number % 4 == 1),
            (NATIVE, 4.0, number % 4 == 3),
            (WIDE, 4.0, number % 4 == 0),
        ]
    ],
    ids=str,
)
def test_drawing_ends_where_the_pipeline_ends(variant, canvas, guidance):
    pipe = VARIANTS[variant]()
    ours = drawn(Checkpoint(pipe), canvas=canvas, guidance=guidance)
    theirs = drawn_by_the_pipeline(pipe, canvas=canvas, guidance=guidance)
    assert (ours - theirs).abs().max() < 1e-4


@variants
@pytest.mark.parametrize("canvas", [NATIVE, WIDE], ids=str)
def test_the_grid_is_the_pipeline_s(variant, canvas):
    pipe = VARIANTS[variant]()
    grid = Checkpoint(pipe).grid(3, canvas)
    drawn_by_the_pipeline(pipe, canvas=canvas, guidance=1.0, num_steps=3)
    assert torch.allclose(grid.timestep[:-1].float(), pipe.scheduler.timesteps.float(), rtol=1e-6)
    if grid.timestep.is_floating_point():
        assert torch.equal(grid.sigma.float(), pipe.scheduler.sigmas.float())


@pytest.mark.parametrize("family", mostly(FAMILIES, always=("stable_diffusion",)))
def test_a_second_order_solver_ends_nearer_than_euler(family):
    """In sum over two numbers of steps: random networks are rough in time, so that a single one is a matter of luck."""
    model = Checkpoint(FAMILIES[family]())

    def by_solver(num_steps):
        return drawn(model, canvas=NATIVE, guidance=1.0, kernel=BlackBoxSolver(model, num_steps, canvas=NATIVE))

    end = by_solver(200)
    numbers = (12, 24)
    of_solver = sum((by_solver(number) - end).norm() for number in numbers)
    of_euler = sum((drawn(model, canvas=NATIVE, guidance=1.0, num_steps=number) - end).norm() for number in numbers)
    assert of_solver < 0.7 * of_euler


@variants
def test_images_go_to_latents_and_back_as_in_the_pipeline(variant):
    pipe = VARIANTS[variant]()
    model = Checkpoint(pipe)
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    mean, std = model.encode_moments(images)
    assert mean.shape == std.shape == (2, *model.latent_shape(Canvas(48, 64)))
    for ours, theirs in zip((mean, std), encoded_by(pipe, images), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    latents, pixels = (
        drawn_by_the_pipeline(pipe, canvas=NATIVE, guidance=1.0, num_steps=2, output_type=kind)
        for kind in ("latent", "pt")
    )
    assert torch.allclose(model.decode(latents), pixels, atol=1e-5)


@families
def test_images_can_be_differentiated_to_their_latents(family):
    model = Checkpoint(FAMILIES[family]())
    latents = torch.zeros(1, *model.latent_shape(), requires_grad=True)
    (gradient,) = torch.autograd.grad(model.decode(latents).mean(), latents)
    assert gradient.abs().max() > 0


@variants
def test_a_dropped_caption_is_what_guidance_pushes_away_from(variant):
    model = Checkpoint(VARIANTS[variant]())
    cond = model.encode_prompts(PROMPTS)
    dropped = model.embed([""])
    for name, negative in cond.negative.items():
        assert torch.allclose(negative, dropped[name].expand_as(negative), atol=1e-5)
        assert not torch.equal(cond.prompt[name][:1], dropped[name])
    x_t = torch.randn(3, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([100, 400, 700])
    one, other = model.predict(x_t, timestep, cond), model.predict(x_t, timestep, cond.only_negative())
    guided = model.predict(x_t, timestep, cond, 3.0)
    if model.guidance == "cfg":
        assert torch.allclose(guided, model.guided(other, one, 3.0), atol=1e-5)
    assert not torch.allclose(guided, one, atol=1e-5)


@families
def test_a_fresh_lora_and_the_reference_are_the_base_to_the_bit(family):
    pipe = FAMILIES[family]()
    model = Checkpoint(pipe)
    cond = model.encode_prompts(PROMPTS)
    x_t, timestep = torch.randn(3, *model.latent_shape()), torch.tensor([100, 400, 700])
    base = model.predict(x_t, timestep, cond)
    add_lora(model.denoiser, rank=4, target_modules=model.family.lora_targets)
    assert torch.equal(model.predict(x_t, timestep, cond), base)
    for parameter in lora_parameters(model.denoiser):
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(model.predict(x_t, timestep, cond), base)
    with reference(model.denoiser):
        assert torch.equal(model.predict(x_t, timestep, cond), base)


@families
def test_a_saved_lora_draws_the_same_in_stock_diffusers(family, tmp_path):
    pipe = FAMILIES[family]()
    model = Checkpoint(pipe)
    before = drawn_by_the_pipeline(pipe, canvas=NATIVE, guidance=3.0)
    add_lora(model.denoiser, rank=4, alpha=2.0, target_modules=model.family.lora_targets)
    for parameter in lora_parameters(model.denoiser):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(model, tmp_path)
    ours = drawn_by_the_pipeline(pipe, canvas=NATIVE, guidance=3.0)
    fresh = FAMILIES[family]()
    exec("\n".join(model.family.lora_preparation), {"pipe": fresh})
    fresh.load_lora_weights(str(tmp_path))
    assert (drawn_by_the_pipeline(fresh, canvas=NATIVE, guidance=3.0) - ours).abs().max() < 1e-5
    assert (ours - before).abs().max() > 1e-3


@families
def test_a_folder_of_the_family_is_loaded(family, tmp_path):
    pipe = FAMILIES[family]()
    pipe.save_pretrained(tmp_path)
    model, built = Checkpoint.load(tmp_path), Checkpoint(pipe)
    assert model.family.name == built.family.name
    assert [model.fingerprint(part) for part in ("denoiser", "vae")] == [
        built.fingerprint(part) for part in ("denoiser", "vae")
    ]


def pairs():
    images = torch.rand(4, 2, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    pixels = (images * 255).byte().numpy()
    return pair_set(
        [
            PreferencePair(f"prompt {index % 2}", *map(encode_png, both), name=str(index))
            for index, both in enumerate(pixels)
        ],
        origin="toy",
    )


def denoiser(pipe):
    return pipe.components["transformer" if "transformer" in pipe.components else "unet"]


def weights(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize(("family", "algorithm"), mostly_pairs(FAMILIES, ALGORITHMS))
def test_three_updates_move_the_adapter_and_nothing_else_and_a_killed_run_ends_in_the_same_weights(
    family, algorithm, tmp_path
):
    pipe = FAMILIES[family]()
    trainer = ALGORITHMS[algorithm](pipe, tmp_path / "whole", pairs=pairs(), updates=3)
    network = denoiser(pipe)
    before = weights(network)
    trainer.train()
    whole = weights(network)
    moved = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    adapter = {name for name in whole if ".lora_B." in name or ".lora_A." in name}
    assert moved <= adapter
    assert len(moved) > 0.9 * len(adapter)  # the last block of some transformers has layers that nothing reads

    ALGORITHMS[algorithm](FAMILIES[family](), tmp_path / "cut", pairs=pairs(), updates=2).train()
    pipe = FAMILIES[family]()
    ALGORITHMS[algorithm](pipe, tmp_path / "cut", pairs=pairs(), updates=3).train(resume=True)
    resumed = weights(denoiser(pipe))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
