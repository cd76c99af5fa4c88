"""What every editing model has to do beside what families do: draw as its pipeline edits, learn from pairs of edits.

`pytest -m contracts` runs this for all of them.
"""

from dataclasses import replace
from inspect import signature

import pytest
import torch
from PIL import Image

from rpo.adapters.lora import add_lora, lora_parameters, save_lora
from rpo.cli.main import main
from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.types import Canvas
from tests.contracts.families import drawn_by
from tests.tiny_editors import tiny_kontext, tiny_pix2pix, tiny_qwen_edit, tiny_qwen_edit_plus
from tests.tiny_flux2_klein import tiny_flux2_klein
from tests.trainers import online_runs, pair_runs

pytestmark = [
    pytest.mark.contracts,
    pytest.mark.filterwarnings("ignore:the network denoises no better"),
]

EDITORS = {
    "instruct_pix2pix": (tiny_pix2pix, Canvas(64, 64)),
    "flux1_kontext": (tiny_kontext, Canvas(64, 96)),
    "flux2_klein": (tiny_flux2_klein, Canvas(64, 96)),
    "qwen_image_edit": (tiny_qwen_edit, Canvas(1024, 1024)),
    "qwen_image_edit_plus": (tiny_qwen_edit_plus, Canvas(1024, 1024)),
}
"""Each with a size at which its pipeline leaves the image as it is; Qwen-Image-Edit brings all to one megapixel."""

ALWAYS = ("instruct_pix2pix", "flux1_kontext", "flux2_klein")


def mostly(names, always=ALWAYS):
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]


editors = pytest.mark.parametrize("editor", mostly(EDITORS))

INSTRUCTION = "add a red circle"


def original(canvas, seed=0):
    """Pixels that an 8-bit file can hold."""
    pixels = torch.randint(256, (1, 3, *canvas), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255


def picture(image):
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


def edited_by_the_pipeline(pipe, canvas, *, guidance, **options):
    known, image = signature(type(pipe).__call__).parameters, picture(original(canvas))
    words = {"image_guidance_scale": 1.0} if "image_guidance_scale" in known else {}
    words |= {"_auto_resize": False, "max_area": canvas.height * canvas.width} if "max_area" in known else {}
    return drawn_by(
        pipe,
        [INSTRUCTION],
        canvas=canvas,
        guidance=guidance,
        num_steps=2,
        generators=[image_generator(7, 0, 0)],
        image=image,
        **words,
        **options,
    )


@editors
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_editing_ends_where_the_pipeline_ends(editor, guidance):
    make, canvas = EDITORS[editor]
    pipe = make()
    model = Checkpoint(pipe)
    cond = model.encode_prompts([INSTRUCTION], originals=original(canvas))
    generators = [image_generator(7, 0, 0)]
    grid = model.grid(2, canvas)
    ours = sample(model, cond, grid, Ddim(0.0), guidance_scale=guidance, generators=generators, canvas=canvas).x_0
    assert (ours - edited_by_the_pipeline(pipe, canvas, guidance=guidance)).abs().max() < 1e-4


@editors
def test_what_is_edited_counts(editor):
    make, canvas = EDITORS[editor]
    model = Checkpoint(make())
    x_t = torch.randn(1, *model.latent_shape(canvas), generator=torch.Generator().manual_seed(0))
    one, other = (
        model.predict(x_t, torch.tensor(500), model.encode_prompts([INSTRUCTION], originals=original(canvas, seed)))
        for seed in (0, 1)
    )
    assert one.shape == x_t.shape
    assert (one - other).abs().max() > 1e-4


@editors
def test_a_saved_lora_edits_the_same_in_stock_diffusers(editor, tmp_path):
    make, canvas = EDITORS[editor]
    pipe = make()
    model = Checkpoint(pipe)
    before = edited_by_the_pipeline(pipe, canvas, guidance=3.0)
    add_lora(model.denoiser, rank=4, alpha=2.0, target_modules=model.family.lora_targets)
    for parameter in lora_parameters(model.denoiser):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(model, tmp_path)
    ours, fresh = edited_by_the_pipeline(pipe, canvas, guidance=3.0), make()
    fresh.load_lora_weights(str(tmp_path))
    assert (edited_by_the_pipeline(fresh, canvas, guidance=3.0) - ours).abs().max() < 1e-5
    assert (ours - before).abs().max() > 1e-3


def edits(count=4, side=(64, 64)):
    images = torch.randint(256, (count, 3, *side, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    return pair_set(
        [
            PreferencePair(
                f"edit {index % 2}",
                *map(encode_png, (chosen, rejected)),
                original=encode_png(source),
                name=str(index),
            )
            for index, (chosen, rejected, source) in enumerate(images)
        ]
    )


def trained(make, folder, *, updates, resume=False, pairs=None, **changes):
    trainer = pair_runs.trainer_of(
        folder,
        pipe=make(),
        pairs=pairs or edits(),
        updates=updates,
        pairs_per_update=2,
        learning={"micro_batch": 2, "checkpoint_every": 1},
        resolution=64,
        preflight=True,
        **changes,
    )
    trainer.train(resume=resume)
    return trainer


@pytest.mark.parametrize("editor", mostly(EDITORS, ("instruct_pix2pix",)))
def test_it_learns_from_pairs_of_edits_and_a_killed_run_ends_in_the_same_weights(editor, tmp_path):
    make, _ = EDITORS[editor]
    whole = trained(make, tmp_path / "whole", updates=3)
    assert any(parameter.abs().max() > 0 for parameter in whole.run.policy.parameters[1::2])
    trained(make, tmp_path / "killed", updates=2)
    resumed = trained(make, tmp_path / "killed", updates=3, resume=True)
    assert torch.equal(pair_runs.weights(whole), pair_runs.weights(resumed))


def test_the_first_images_that_are_edited_are_shown_beside_the_previews(tmp_path):
    trained(tiny_pix2pix, tmp_path, updates=1, preview_every=1)
    with Image.open(tmp_path / "previews" / "update-000001.png") as grid:
        assert grid.size == (5 * 64, 2 * 64)
        left = grid.crop((0, 0, 64, 64))
    assert left.tobytes() == edits()[0].decode("original").tobytes()


def test_previews_of_edits_in_buckets_are_drawn_at_the_canvas(tmp_path):
    wide = [replace(pair, prompt="edit 2") for pair in edits(side=(48, 96))]
    trained(tiny_pix2pix, tmp_path, updates=1, preview_every=1, bucket_step=16, pairs=pair_set([*edits(), *wide]))
    with Image.open(tmp_path / "previews" / "update-000001.png") as grid:
        assert grid.size == (5 * 64, 3 * 64)
        left = grid.crop((0, 128, 64, 192))
    scaled = wide[0].decode("original").resize((128, 64), Image.Resampling.BILINEAR)
    assert left.tobytes() == scaled.crop((32, 0, 96, 64)).tobytes()


def test_pairs_that_are_no_edits_are_refused_by_an_editor_and_the_reverse(tmp_path):
    with pytest.raises(InputError, match=r"pair 0 .* no original, but InstructPix2Pix edits images"):
        pair_runs.trainer_of(tmp_path, pipe=tiny_pix2pix())
    with pytest.raises(InputError, match=r"^0 .* original .* Stable Diffusion .* edits nothing"):
        pair_runs.trainer_of(tmp_path, pairs=edits())
    with pytest.raises(InputError, match=r"pair 0 .* no original, but others have"):
        pair_runs.trainer_of(tmp_path, pipe=tiny_flux2_klein(), pairs=pair_set([*edits(), *pair_runs.toy_pairs()]))


@pytest.mark.parametrize("algorithm", online_runs.TRAINERS)
def test_what_draws_from_prompts_alone_refuses_an_editor(algorithm, tmp_path):
    with pytest.raises(InputError, match="InstructPix2Pix edits images, but what is drawn in training has prompts"):
        online_runs.TRAINERS[algorithm](tmp_path, pipe=tiny_pix2pix())


@pytest.mark.parametrize("command", ["align", "curate"])
def test_what_is_drawn_for_pairs_has_prompts_alone_too(command, tmp_path, capsys):
    model = f"{'curate.' if command == 'align' else ''}source.model.source=shapes-editor"
    words = [command, f"configs/{command}_shapes.yaml", "--output", str(tmp_path / "out"), model]
    assert main(words) == 2
    assert "edits images, but what is drawn" in capsys.readouterr().err


def test_originals_go_with_editors_alone():
    with pytest.raises(InputError, match="edits images, but none was given"):
        Checkpoint(tiny_pix2pix()).encode_prompts([INSTRUCTION])
    with pytest.raises(InputError, match="edits no images, but some were given"):
        Checkpoint(pair_runs.tiny_sd()).encode_prompts([INSTRUCTION], originals=original(Canvas(64, 64)))
