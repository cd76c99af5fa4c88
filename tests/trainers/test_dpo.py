"""The DPO trainer: starts at log 2, learns, costs what it says, resumes to the bit, and refuses what cannot be
trained."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.models import checkpoint
from rpo.models.checkpoint import Checkpoint
from rpo.objectives.preference.base import beta_for_dims
from rpo.objectives.preference.dpo import Dpo
from rpo.shapes.world import COLORS, Scene, draw_scene, render, sample_prompts
from rpo.trainers.pairs.batches import share_of
from rpo.trainers.pairs.errors import denoise
from rpo.training.log import read_metrics
from rpo.training.loop import NonFiniteLossError
from tests.marks import slow_but
from tests.tiny import save_tiny_sd, tiny_sd
from tests.trainers.pair_runs import config, counting, steady, toy_pairs, trained, trainer_of, weights

COLOR_NAMES = tuple(COLORS)


def recoloured_pairs(count):
    """Scenes that keep their prompt, and the same scenes in another colour."""
    pairs = []
    for index, prompt in enumerate(sample_prompts("train", count, seed=0)):
        scene = draw_scene(prompt, np.random.default_rng(index))
        other = {color: COLOR_NAMES[(place + 1) % len(COLOR_NAMES)] for place, color in enumerate(COLOR_NAMES)}
        wrong = Scene(tuple(dataclasses.replace(one, color=other[one.color]) for one in scene.objects))
        pairs.append(PreferencePair(prompt.text, encode_png(render(scene)), encode_png(render(wrong))))
    return pair_set(pairs, origin="recoloured")


def test_on_shapes_the_first_loss_is_log_two_and_unseen_pairs_are_learnt(tmp_path):
    model = Checkpoint.load("shapes")
    pairs = recoloured_pairs(64)
    learning = {"updates": 20, "learning_rate": 1e-3, "micro_batch": 16}
    trainer = trainer_of(tmp_path, pipe=model, pairs=pairs[:48], pairs_per_update=16, learning=learning)
    held_out = trainer_of(tmp_path / "unseen", pipe=Checkpoint.load("shapes"), pairs=pairs[48:])
    unseen = held_out.algorithm.data.at(range(64))
    trainer.train()
    lines = read_metrics(tmp_path)
    assert lines[0]["loop/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        after = trainer.algorithm.loss(unseen)
    # Already the base prefers the right colour; what is asked is that the policy does so more than the base.
    assert after.metrics["dpo/implicit_accuracy"] > 0.7
    assert after.loss < 0.9 * math.log(2)


def test_training_leaves_the_adapter_active_on_the_caller_s_pipe_and_saves_it(tmp_path):
    pipe, arguments = tiny_sd(), {"num_inference_steps": 3, "output_type": "pt"}
    before = pipe("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    trainer = trained(tmp_path, pipe=pipe)
    after = pipe("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    assert (after - before).abs().max() > 1e-4
    fresh = tiny_sd()
    fresh.load_lora_weights(str(trainer.save()))
    loaded = fresh("prompt 0", generator=torch.Generator().manual_seed(0), **arguments).images
    assert (loaded - after).abs().max() < 1e-5


def test_an_update_is_two_forwards_and_one_backward_and_encodes_nothing_twice(tmp_path):
    calls = Counter()

    def watch(pipe):
        pipe.unet.register_forward_pre_hook(lambda _, args: calls.update(forwards=1, rows=args[0].shape[0]))
        pipe.unet.conv_out.register_full_backward_hook(lambda *_: calls.update(backwards=1))
        pipe.vae.encoder.register_forward_pre_hook(lambda _, args: calls.update(images=args[0].shape[0]))
        pipe.text_encoder.register_forward_pre_hook(lambda _, args: calls.update(prompts=args[0].shape[0]))

    trained(tmp_path, watch=watch, updates=6)
    assert calls == {"forwards": 12, "rows": 6 * 2 * 8, "backwards": 6, "images": 16, "prompts": 4}
    calls.clear()
    trained(tmp_path / "again", watch=watch, cache_folder=str(tmp_path / "cache"))
    assert calls.keys() == {"forwards", "rows", "backwards"}


def test_both_sides_share_noise_and_time_and_the_reference_gets_no_gradient(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = trainer.algorithm.data.at(range(4))
    same = dataclasses.replace(batch, x_0=torch.cat([batch.x_0[:4], batch.x_0[:4]]))
    chosen, rejected = denoise(trainer.run.model, same).errors().chunk(2)
    assert torch.allclose(chosen, rejected, atol=1e-6)
    trainer.algorithm.loss(batch).loss.backward()
    named = dict(trainer.run.model.denoiser.named_parameters())
    assert {name for name, p in named.items() if p.grad is not None} == {name for name in named if ".lora_" in name}


def test_micro_batches_add_up_to_the_whole(tmp_path):
    whole, parts = (
        steady(trainer_of(tmp_path / str(size), learning={"micro_batch": size, "updates": 3})) for size in (4, 1)
    )
    whole.train()
    parts.train()
    assert torch.allclose(weights(whole), weights(parts), atol=1e-5)


def test_resuming_is_bit_equal_to_never_stopping(tmp_path):
    undisturbed = weights(trained(tmp_path / "one", updates=6))
    trained(tmp_path / "two", updates=3)
    resumed = trained(tmp_path / "two", updates=6, resume=True)
    assert torch.equal(weights(resumed), undisturbed)
    assert [line["update"] for line in read_metrics(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    trained(folder, updates=1)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Dpo(beta=300.0)}, r"what it is made of changed .*beta from 78\.125 to 300\.0"),
        ({"seed": 1}, r"\(seed from 0 to 1\)"),
        ({"pairs": toy_pairs(6)}, "what it is made of changed .*pairs from 8 to 6; prompts of the pairs from "),
    ],
)
def test_resuming_with_other_settings_is_refused(begun, changes, message):
    with pytest.raises(ValueError, match=message):
        trained(begun, updates=2, resume=True, **changes)


def test_two_runs_are_equal(tmp_path):
    one, two, other = (weights(trained(tmp_path / f"{place}", seed=seed)) for place, seed in enumerate((0, 0, 1)))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_kept_reference_errors_change_nothing_and_are_reused_by_later_runs(tmp_path):
    cache, calls, settings = str(tmp_path / "cache"), Counter(), {"updates": 8, "draws_per_pair": 2}
    kept = trained(tmp_path / "kept", watch=counting(calls), cache_folder=cache, **settings)
    assert calls["forwards"] == 8 + 4  # 8 pairs × 2 draws are 4 micro-batches; the rest of the visits was known
    calls.clear()
    trained(tmp_path / "sweep", watch=counting(calls), cache_folder=cache, objective=Dpo(beta=300.0), **settings)
    assert calls["forwards"] == 8
    # The same draws without keeping anything: every error of the reference computed anew.
    plain = trainer_of(tmp_path / "plain", **settings)
    plain.algorithm._kept = None
    plain.train()
    assert torch.allclose(weights(plain), weights(kept), atol=1e-6)


def test_another_base_is_another_reference(tmp_path):
    calls, settings = Counter(), {"draws_per_pair": 1, "cache_folder": str(tmp_path / "cache"), "updates": 2}
    trained(tmp_path / "one", **settings)
    trained(tmp_path / "two", pipe=tiny_sd(seed=1), watch=counting(calls), **settings)
    assert calls["forwards"] == 4


@pytest.mark.parametrize("prediction_type", slow_but(("v_prediction",), ("epsilon", "v_prediction")))
def test_folders_of_either_prediction_train_three_updates(tmp_path, prediction_type):
    model = Checkpoint.load(save_tiny_sd(tmp_path / "model", prediction_type))
    trainer = trained(tmp_path / "run", pipe=model)
    assert read_metrics(tmp_path / "run")[0]["loop/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.save().is_dir()


def test_full_fine_tuning_moves_all_weights_and_keeps_its_reference(tmp_path):
    base = tiny_sd().unet.state_dict()
    trainer = trained(tmp_path, adapter={"train": "full"}, learning={"updates": 4, "learning_rate": 1e-4})
    after = trainer.run.model.denoiser.state_dict()
    assert all(not torch.equal(base[name], after[name]) for name in base if "weight" in name)
    assert read_metrics(tmp_path)[0]["loop/loss"] == pytest.approx(math.log(2), abs=1e-6)
    batch = trainer.algorithm.data.at(range(4))
    with trainer.run.policy.reference():
        assert not torch.is_grad_enabled()
        reference_errors = denoise(trainer.run.model, batch).errors()
    assert torch.equal(reference_errors, denoise(Checkpoint(tiny_sd()), batch).errors())
    saved = Checkpoint.load(trainer.save(tmp_path / "pipeline"))
    assert saved.fingerprint("denoiser") == trainer.run.model.fingerprint("denoiser")


def test_half_precision_base_trains_a_float32_adapter(tmp_path):
    trainer = trained(tmp_path, pipe=tiny_sd(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trainer.run.policy.parameters} == {torch.float32}
    assert read_metrics(tmp_path)[0]["loop/loss"] == pytest.approx(math.log(2), abs=0.05)
    trainer.save()


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain = weights(trained(tmp_path / "plain"))
    checkpointed = weights(trained(tmp_path / "checkpointed", adapter={"gradient_checkpointing": True}))
    assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_beta_follows_the_latent_size_unless_given(tmp_path):
    assert trainer_of(tmp_path).algorithm.beta == beta_for_dims(256) == 78.125
    trainer = trainer_of(tmp_path, objective=Dpo(beta=150.0))
    assert trainer.algorithm.beta == 150.0
    plan = trainer.plan()
    for said in ("Diffusion-DPO, lora", "beta 150 over 256 dimensions", "8 pairs at 64", "1.5 epochs"):
        assert said in plan


def test_the_guard_stops_when_the_chosen_side_is_forgotten(tmp_path):
    result = trainer_of(tmp_path, max_chosen_error_ratio=1.0005, updates=300).train()
    assert result.updates < 300
    assert "chosen side's error has risen to" in result.stopped_because
    assert "raise beta, lower the learning rate, or give sft_weight" in result.stopped_because


def test_a_loss_that_is_not_a_number_names_its_records_and_keeps_the_last_good_state(tmp_path):
    poisoned = trainer_of(tmp_path / "names").algorithm.data.at(range(12, 16)).names[1]
    trainer = trainer_of(tmp_path, updates=6)
    loss = trainer.algorithm.loss

    def poison(batch):
        output = loss(batch)
        if poisoned not in batch.names or len(read_metrics(tmp_path)) < 3:
            return output
        bad = torch.tensor([math.nan if name == poisoned else 0.0 for name in batch.names])
        return dataclasses.replace(output, loss=output.loss * math.nan, sample_losses=output.sample_losses + bad)

    trainer.algorithm.loss = poison
    with pytest.raises(NonFiniteLossError, match=poisoned):
        trainer.train()
    undisturbed = weights(trained(tmp_path / "undisturbed", updates=3))
    assert torch.equal(weights(trainer), undisturbed)
    assert list(tmp_path.glob("checkpoint-*"))


# What is refused before the first update, each with one clear error.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_chosen_error_ratio": 1.0}, "'max_chosen_error_ratio' to 1.0"),
        ({"learning": {"micro_batch": 0}}, "'micro_batch' to 0"),
        ({"draws_per_pair": 0}, "'draws_per_pair' to 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("resolution", [9, 33, 63])
def test_a_resolution_that_the_autoencoder_cannot_take_is_refused(tmp_path, resolution):
    pipe = tiny_sd()
    message = f"{resolution}x{resolution}, but .* multiples of {pipe.vae_scale_factor}"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, pipe=pipe, resolution=resolution)


def test_accumulation_that_does_not_divide_names_what_would():
    with pytest.raises(ValueError, match=r"=12 is not a multiple of .*=5 times 1 .*a micro_batch of 1, 2, 3, 4, 6, 12"):
        share_of(12, 5, process=0, processes=1)


def test_full_fine_tuning_of_half_precision_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"full fine-tuning needs float32 weights, but they are torch\.bfloat16"):
        trainer_of(tmp_path, pipe=tiny_sd(dtype=torch.bfloat16), adapter={"train": "full"})


def test_training_into_an_old_run_s_folder_is_refused(begun):
    with pytest.raises(ValueError, match="resume"):
        trained(begun)


def test_encoding_on_first_use_changes_nothing(tmp_path):
    ahead = weights(trained(tmp_path / "ahead"))
    rows = []
    lazy = trainer_of(tmp_path / "lazy", encode_ahead=False)
    lazy.run.model.vae.encoder.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    lazy.algorithm.data.at(range(1))
    assert sum(rows) == 2
    lazy.train()
    assert sum(rows) == 16
    assert torch.equal(weights(lazy), ahead)


@pytest.mark.parametrize("is_ahead", slow_but((True,), (True, False)))
def test_what_is_encoded_for_leaves_the_device_while_updates_run(tmp_path, monkeypatch, is_ahead):
    """The CPU plays the GPU: networks note where they are sent, and what waits does so on a device of another name."""
    pipe, sent = tiny_sd(), []
    trainer = trainer_of(tmp_path, pipe=pipe, encode_ahead=is_ahead, preview_every=3, preflight=True)
    monkeypatch.setattr(checkpoint, "WAITING", torch.device("meta"))
    for name in ("vae", "text_encoder"):
        network = pipe.components[name]

        def to(device, network=network, name=name):
            sent.append((name, str(device)))
            vars(network)["computes_on"] = torch.device(device)

        monkeypatch.setattr(network, "to", to)
    pipe.unet.register_forward_pre_hook(lambda *_: sent.append("update") if torch.is_grad_enabled() else None)
    trainer.train()
    drawn = [("text_encoder", "cpu"), ("text_encoder", "meta"), ("vae", "cpu"), ("vae", "meta")]
    gone, back = ([(name, where) for name in ("vae", "text_encoder")] for where in ("meta", "cpu"))
    updates = ["update"] * (sent.count("update") - 3)  # the preflight has some, too
    expected = [*gone, *updates, *drawn, *["update"] * 3, *drawn, *back]
    assert sent == (expected if is_ahead else [one for one in expected if one == "update"])
