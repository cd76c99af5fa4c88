"""Each fault that people make is named by the right line, and a sound run passes all of them."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import rpo.shapes
from rpo.adapters import lora
from rpo.adapters.lora import load_lora
from rpo.data.buckets import one_bucket
from rpo.data.preference import PairSet, PreferencePair, encode_png, pair_set
from rpo.models.checkpoint import Checkpoint
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.objectives.preference.mapo import Mapo
from rpo.objectives.preference.region import RegionConfig
from rpo.shapes.world import draw_scene, render, sample_prompts
from rpo.trainers.checks.examine import examine
from rpo.trainers.checks.parts import steps_agree
from rpo.trainers.checks.records import record_checks
from rpo.trainers.pairs.sizes import Sizes
from rpo.types import Canvas
from tests.contracts.families import FAMILIES
from tests.contracts.test_editors import EDITORS
from tests.contracts.test_editors import edits as edited_pairs
from tests.marks import slow_but
from tests.tiny import tiny_sd, tiny_sd3
from tests.trainers.online_runs import TRAINERS, digest, grpo, learning, score_as_action, small_value  # noqa: F401
from tests.trainers.pair_runs import SCORED, edits, toy_pairs, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better", "ignore:No LoRA keys")

UNTRAINED = {"VAE round trip", "denoiser denoises"}
"""What the tiny pipelines cannot pass, whose weights are random."""


def shapes():
    return StableDiffusionPipeline.from_pretrained(rpo.shapes.path(), safety_checker=None)


def scenes(count=8):
    import numpy as np

    prompts = sample_prompts("train", count, seed=0)
    images = [encode_png(render(draw_scene(one, np.random.default_rng(row)))) for row, one in enumerate(prompts)]
    return pair_set(
        PreferencePair(prompt.text, images[row], images[row - 1], name=f"{row}") for row, prompt in enumerate(prompts)
    )


def failed(trainer):
    return {check.name for check in examine(trainer) if not check.passed}


def dpo(folder, **changes):
    return trainer_of(folder, **{"learning": {"learning_rate": 1e-3}} | changes)


def test_a_sound_run_on_pairs_passes_all(tmp_path):
    trainer = dpo(tmp_path, pipe=shapes(), pairs=scenes(), objective=Dpo(sft_weight=0.1))
    found = examine(trainer)
    assert [str(check) for check in found if not check.passed] == []
    assert {"loss at the start", "chosen is favoured", "share of objective.sft_weight"} < {one.name for one in found}


@pytest.mark.parametrize("name", slow_but(("endpoint", "reward_gradient"), TRAINERS))
def test_a_sound_run_on_a_reward_passes_all(name, tmp_path):
    trainer = TRAINERS[name](tmp_path, learning=learning(learning_rate=1e-3))
    before = digest(trainer)
    assert failed(trainer) == UNTRAINED
    assert digest(trainer) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family", [name if name == "sd3" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_can_be_looked_at(family, tmp_path):
    assert failed(dpo(tmp_path, pipe=FAMILIES[family]())) - UNTRAINED == set()


def freeze(trainer):
    for parameter in trainer.run.policy.parameters:
        parameter.requires_grad_(False)


def begin_elsewhere(trainer, far=0.1):
    for index, parameter in enumerate(trainer.run.policy.parameters):
        parameter.data += far * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))


def exchange_the_scheduler(trainer):
    pipe = trainer.run.model.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")


SWAPPED = pair_set(
    dataclasses.replace(one, chosen_score=one.rejected_score, rejected_score=one.chosen_score) for one in SCORED
)
WORDLESS = pair_set((dataclasses.replace(one, prompt="") for one in toy_pairs()), allow_empty_prompts=True)


@pytest.mark.parametrize(
    ("changes", "alter", "expected"),
    [
        pytest.param({"pairs": SCORED}, None, set(), marks=pytest.mark.slow),
        ({}, freeze, {"adapter receives a gradient", "KL has its gradient", "a step lowers the loss"}),
        ({}, begin_elsewhere, {"reference equals start", "loss at the start", "KL has its gradient"}),
        ({}, exchange_the_scheduler, {"noise levels of the steps", "adapter file draws the same"}),
        ({"pairs": SWAPPED}, None, {"labels"}),
        ({"pairs": WORDLESS}, None, {"captions"}),
        pytest.param({"pairs": toy_pairs(side=32)}, None, {"sizes"}, marks=pytest.mark.slow),
        pytest.param(
            {"learning": {"learning_rate": 1.0}}, None, {"a step moves the policy a little"}, marks=pytest.mark.slow
        ),
    ],
    ids=["sound", "frozen", "not the reference", "scheduler", "swapped", "empty", "small", "too fast"],
)
def test_a_fault_of_a_run_on_pairs_is_named(changes, alter, expected, tmp_path):
    trainer = dpo(tmp_path, **changes)
    if alter is not None:
        alter(trainer)
    assert failed(trainer) - UNTRAINED == expected


@pytest.mark.parametrize("reference", slow_but(("base",), ("start", "base")))
def test_going_on_from_a_lora_is_no_fault(reference, tmp_path):
    first = dpo(tmp_path / "first")
    begin_elsewhere(first, 0.01)
    model = Checkpoint(tiny_sd())
    load_lora(model, first.save(tmp_path / "lora"))
    trainer = dpo(tmp_path / "second", pipe=model, adapter={"rank": 4, "reference": reference})
    found = {check.name: check for check in examine(trainer)}
    assert {name for name, check in found.items() if not check.passed} == UNTRAINED
    assert ("goes on from a LoRA" in found["reference equals start"].detail) == (reference == "base")


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"train": "full"}, "learning": {"learning_rate": 1e-5}},
        pytest.param({"learning": {"learning_rate": 1e-3, "mixed_precision": "bf16"}}, marks=pytest.mark.slow),
        pytest.param(
            {"objective": Dpo(reference_weight=0, sft_weight=0.2, winner_preserving=0.9)}, marks=pytest.mark.slow
        ),
        {"objective": Dpo(sft_weight=0.5, context="reference"), "draws_per_pair": 4},
        pytest.param({"objective": Kto()}, marks=pytest.mark.slow),
        pytest.param({"objective": Mapo()}, marks=pytest.mark.slow),
        pytest.param({"pairs": edits(), "region": RegionConfig()}, marks=pytest.mark.slow),
    ],
    ids=["full", "bf16", "no reference", "kept errors", "kto", "mapo", "region"],
)
def test_whatever_is_trained_passes(changes, tmp_path):
    assert failed(dpo(tmp_path, **changes)) == UNTRAINED


def test_a_loss_against_its_labels_is_named(tmp_path, monkeypatch):
    right = Dpo.__call__

    def swapped(self, pairs, statistics):
        reference = pairs.reference and pairs.reference[::-1]
        other = dataclasses.replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen, reference=reference)
        return right(self, other, statistics)

    monkeypatch.setattr(Dpo, "__call__", swapped)
    assert failed(dpo(tmp_path)) - UNTRAINED == {"chosen is favoured"}


@pytest.mark.parametrize("alpha", slow_but((8.0,), (4.0, 8.0)))
def test_a_file_that_lost_alpha_is_named_and_harmless_where_it_is_the_rank(alpha, tmp_path, monkeypatch):
    read = lora.layers_of
    monkeypatch.setattr(
        lora, "layers_of", lambda model: {name: (down, up * 4.0 / alpha) for name, (down, up) in read(model).items()}
    )
    trainer = dpo(tmp_path, adapter={"rank": 4, "alpha": alpha})
    assert failed(trainer) - UNTRAINED == ({"adapter"} if alpha == 8.0 else set())


def test_a_loss_whose_gradient_has_the_wrong_sign_is_named(tmp_path):
    trainer = grpo(tmp_path, learning=learning(learning_rate=1e-3))
    right = type(trainer.algorithm).loss

    def turned(self, steps):
        output = right(self, steps)
        return dataclasses.replace(output, loss=2 * output.loss.detach() - output.loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.algorithm), "loss", turned)
        assert failed(trainer) - UNTRAINED == {"a step lowers the loss"}


def test_a_text_encoder_of_another_type_is_named(tmp_path):
    pipe = tiny_sd()
    pipe.text_encoder.to(torch.bfloat16)
    assert failed(dpo(tmp_path, pipe=pipe)) - UNTRAINED == {"types"}


@torch.no_grad()
def halve_the_range(pipe):
    """Images in [0, 1], where the autoencoder should give [-1, 1]."""
    last = pipe.vae.decoder.conv_out
    last.weight *= 0.5
    last.bias.copy_(0.5 * last.bias + 0.5)


def lose_the_scale(pipe):
    pipe.vae.register_to_config(scaling_factor=6 * pipe.vae.config.scaling_factor)


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        pytest.param(halve_the_range, {"VAE round trip"}, marks=pytest.mark.slow),
        (lose_the_scale, {"VAE round trip", "denoiser denoises"}),
    ],
)
def test_an_autoencoder_of_another_range_or_scale_is_named(alter, expected, tmp_path):
    pipe = shapes()
    alter(pipe)
    assert failed(dpo(tmp_path, pipe=pipe, pairs=scenes())) == expected


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (lambda images, prompts: torch.ones(len(images)), {"rewards vary within prompts", "a step lowers the loss"}),
        (lambda images, prompts: images.mean(), {"preflight", "first step"}),
    ],
    ids=["constant", "one number for all"],
)
def test_a_reward_that_teaches_nothing_is_named(reward, expected, tmp_path):
    found = failed(grpo(tmp_path, reward=reward, learning=learning(learning_rate=1e-3)))
    assert found - UNTRAINED == expected


def test_a_reward_that_others_drown_is_named(tmp_path):
    """By the spread of what its weight makes of it; GRPO brings all rewards to one spread first."""
    names, few = ("jpeg-compressibility", "tests.trainers.online_runs:lightness"), learning(learning_rate=1e-3)
    for make, weight, expected in ((score_as_action, 1e-6, {f"reward {names[1]}"}), (grpo, 1.0, set())):
        trainer = make(tmp_path, reward=dict(zip(names, (1.0, weight), strict=True)), learning=few)
        assert failed(trainer) - UNTRAINED == expected


def test_statistics_of_a_run_are_left_alone(tmp_path):
    trainer = dpo(tmp_path, objective=Dpo(normalization="time"))
    statistics = trainer.algorithm.statistics
    examine(trainer)
    assert trainer.algorithm.statistics is statistics and not statistics._pending.any()


@pytest.mark.parametrize("steps", [4, 15])
def test_the_steps_of_a_flow_are_compared_at_the_size_that_is_drawn(steps):
    model = Checkpoint(tiny_sd3(use_dynamic_shifting=True))
    canvas = model.canvas_of(96)
    assert steps_agree(model, steps, canvas).passed
    model.pipe.scheduler = type(model.pipe.scheduler).from_config(model.pipe.scheduler.config, base_shift=0.8)
    assert not steps_agree(model, steps, canvas).passed


def test_a_pair_that_is_alone_in_its_bucket_is_named(tmp_path):
    wide = [dataclasses.replace(one, name=f"wide {row}") for row, one in enumerate(of_size(96, 48, 4))]
    alone = dpo(tmp_path / "alone", pairs=pair_set([*wide, *of_size(48, 96, 1)]), bucket_step=16, resolution=64)
    found = {check.name: check for check in examine(alone)}
    assert not found["buckets"].passed and "80x48" in found["buckets"].advice
    some = dpo(tmp_path / "some", pairs=pair_set([*wide, *of_size(48, 96, 2)]), bucket_step=16, resolution=64)
    assert failed(some) <= UNTRAINED


def test_an_image_that_is_edited_is_decoded_too():
    *whole, last = edited_pairs()
    pairs = PairSet((dataclasses.replace(last, original=last.original[:-4000]), *whole))
    sizes = Sizes(Canvas(64, 64), 256, one_bucket(4, Canvas(64, 64)), [])
    with pytest.raises(ValueError, match="^3: the original image .* cannot be decoded"):
        list(record_checks(pairs, sizes, 1))


def of_size(width, height, count):
    noise = torch.randint(256, (count, 2, height, width, 3), generator=torch.Generator().manual_seed(width)).byte()
    return [PreferencePair(f"{width} {row}", *map(encode_png, both)) for row, both in enumerate(noise.numpy())]


@pytest.mark.parametrize("name", slow_but(("instruct_pix2pix",), ("instruct_pix2pix", "flux1_kontext")))
def test_a_sound_run_of_an_editor_passes_all(name, tmp_path):
    make, _ = EDITORS[name]
    trainer = dpo(tmp_path, pipe=make(), pairs=edited_pairs(), resolution=64)
    assert failed(trainer) <= UNTRAINED
