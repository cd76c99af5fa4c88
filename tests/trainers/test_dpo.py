"""The DPO trainer: starts at log 2, learns, costs what it says, resumes to the bit, and refuses what cannot be
trained."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.models.checkpoint import Checkpoint
from rpo.objectives.preference import beta_for_dims
from rpo.shapes.world import COLORS, Scene, draw_scene, render, sample_prompts
from rpo.trainers.dpo import DPOTrainer, errors, loss
from rpo.trainers.dpo_config import DPOConfig, share_of
from rpo.trainers.pairs.guard import ChosenGuard
from rpo.training.log import read_metrics
from rpo.training.loop import LoopConfig, NonFiniteLossError
from tests.tiny import save_tiny_sd, tiny_sd

COLOR_NAMES = tuple(COLORS)


def toy_pairs(count=8, side=64):
    """Chosen images are bright on the left, rejected ones on the right."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side)[None, :, None]
    pairs = []
    for index in range(count):
        noise = generator.normal(0, 8, (2, side, side, 3))
        chosen, rejected = (
            np.clip(image, 0, 255).astype(np.uint8) for image in (255 - ramp + noise[0], ramp + noise[1])
        )
        pairs.append(
            PreferencePair(f"prompt {index % 3}", encode_png(chosen), encode_png(rejected), name=f"pair {index}")
        )
    return pair_set(pairs, origin="toy")


def config(folder, *, updates=3, **changes):
    loop = LoopConfig(updates=updates, learning_rate=1e-2, checkpoint_every=100, progress=False)
    settings = {"pairs_per_update": 4, "micro_batch": 4, "rank": 4, "max_chosen_error_ratio": math.inf, "loop": loop}
    return DPOConfig(folder=str(folder), **settings | changes)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.parameters])


def trained(folder, *, pipe=None, pairs=None, resume=False, watch=None, **changes):
    trainer = DPOTrainer(pipe or tiny_sd(), pairs or toy_pairs(), config(folder, **changes))
    if watch is not None:
        watch(trainer.model.pipe)
    trainer.train(resume=resume)
    return trainer


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
    loop = LoopConfig(updates=20, learning_rate=1e-3, progress=False)
    trainer = DPOTrainer(model, pairs[:48], config(tmp_path, pairs_per_update=16, micro_batch=16, loop=loop))
    unseen = DPOTrainer(Checkpoint.load("shapes"), pairs[48:], config(tmp_path / "unseen")).batches.at(range(64))
    trainer.train()
    lines = read_metrics(tmp_path)
    assert lines[0]["loop/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        after = loss(unseen, policy=trainer.policy, beta=trainer.beta, sft_weight=0.0)
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
    trainer = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path))
    batch = trainer.batches.at(range(4))
    same = dataclasses.replace(batch, x_0=torch.cat([batch.x_0[:4], batch.x_0[:4]]))
    chosen, rejected = errors(trainer.model, same).chunk(2)
    assert torch.allclose(chosen, rejected, atol=1e-6)
    loss(batch, policy=trainer.policy, beta=1.0, sft_weight=0.0).loss.backward()
    trained_names = {name for name, p in trainer.model.denoiser.named_parameters() if p.grad is not None}
    assert trained_names == {name for name, _ in trainer.model.denoiser.named_parameters() if ".lora_" in name}


def test_times_cover_the_schedule_and_captions_are_dropped_at_their_rate(tmp_path):
    trainer = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path))
    visits = [trainer.batches._visit(position) for position in range(2000)]
    timesteps = torch.stack([trainer.batches._noise(pair, draw, torch.Size([1]))[0] for pair, draw in visits]).double()
    assert timesteps.min() < 10
    assert timesteps.max() > 989
    assert timesteps.mean().item() == pytest.approx(499.5, abs=20)
    dropped = [trainer.batches._caption(pair, draw) == "" for pair, draw in visits]
    assert np.mean(dropped) == pytest.approx(0.2, abs=0.03)
    assert Counter(pair for pair, _ in visits) == {pair: 250 for pair in range(8)}


def test_micro_batches_add_up_to_the_whole(tmp_path):
    # A large eps keeps Adam from blowing rounding of near-zero gradients up to whole steps.
    loop = LoopConfig(updates=3, learning_rate=1e-2, adam_eps=1e-3, progress=False)
    whole = weights(trained(tmp_path / "whole", loop=loop))
    parts = weights(trained(tmp_path / "parts", micro_batch=1, loop=loop))
    assert torch.allclose(whole, parts, atol=1e-5)


def test_resuming_is_bit_equal_to_never_stopping(tmp_path):
    undisturbed = weights(trained(tmp_path / "one", updates=6))
    trained(tmp_path / "two", updates=3)
    resumed = trained(tmp_path / "two", updates=6, resume=True)
    assert torch.equal(weights(resumed), undisturbed)
    assert [line["update"] for line in read_metrics(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 300.0}, r"beta from 78\.125 to 300\.0"),
        ({"seed": 1}, "seed from 0 to 1"),
        ({"pairs": toy_pairs(6)}, "pairs from 8 to 6; prompts of the pairs from "),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, changes, message):
    trained(tmp_path, updates=1)
    with pytest.raises(ValueError, match=f"the run cannot be resumed: what it is made of changed .*{message}"):
        trained(tmp_path, updates=2, resume=True, **changes)


def test_two_runs_are_equal(tmp_path):
    assert torch.equal(weights(trained(tmp_path / "one")), weights(trained(tmp_path / "two")))
    assert not torch.equal(weights(trained(tmp_path / "three", seed=1)), weights(trained(tmp_path / "four")))


def test_kept_reference_errors_change_nothing_and_are_reused_by_later_runs(tmp_path):
    cache = str(tmp_path / "cache")
    kept = trained(tmp_path / "kept", updates=8, draws_per_pair=2, cache_folder=cache)
    assert kept._reference_errors.computed == 16  # 8 pairs × 2 draws; the other half of the 32 visits was known
    calls = Counter()

    def watch(pipe):
        pipe.unet.register_forward_pre_hook(lambda *_: calls.update(forwards=1))

    sweep = trained(tmp_path / "sweep", watch=watch, updates=8, draws_per_pair=2, cache_folder=cache, beta=300.0)
    assert sweep._reference_errors.computed == 0
    assert calls["forwards"] == 8
    # The same draws without keeping anything: every error of the reference computed anew.
    plain = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path / "plain", updates=8, draws_per_pair=2))
    plain._reference_errors = None
    plain.train()
    assert torch.allclose(weights(plain), weights(kept), atol=1e-6)


def test_another_base_is_another_reference(tmp_path):
    cache = str(tmp_path / "cache")
    trained(tmp_path / "one", draws_per_pair=1, cache_folder=cache)
    other = trained(tmp_path / "two", pipe=tiny_sd(seed=1), draws_per_pair=1, cache_folder=cache)
    assert other._reference_errors.computed > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_folders_of_either_prediction_train_three_updates(tmp_path, prediction_type):
    model = Checkpoint.load(save_tiny_sd(tmp_path / "model", prediction_type))
    trainer = trained(tmp_path / "run", pipe=model)
    assert read_metrics(tmp_path / "run")[0]["loop/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.save().is_dir()


def test_full_fine_tuning_moves_all_weights_and_keeps_its_reference(tmp_path):
    base = tiny_sd().unet.state_dict()
    trainer = trained(tmp_path, train="full", updates=4, loop=LoopConfig(updates=4, learning_rate=1e-4, progress=False))
    after = trainer.model.denoiser.state_dict()
    assert all(not torch.equal(base[name], after[name]) for name in base if "weight" in name)
    assert read_metrics(tmp_path)[0]["loop/loss"] == pytest.approx(math.log(2), abs=1e-6)
    batch = trainer.batches.at(range(4))
    with trainer.policy.reference():
        assert not torch.is_grad_enabled()
        reference_errors = errors(trainer.model, batch)
    assert torch.equal(reference_errors, errors(Checkpoint(tiny_sd()), batch))
    saved = Checkpoint.load(trainer.save(tmp_path / "pipeline"))
    assert saved.fingerprint("denoiser") == trainer.model.fingerprint("denoiser")


def test_half_precision_base_trains_a_float32_adapter(tmp_path):
    trainer = trained(tmp_path, pipe=tiny_sd(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trainer.policy.parameters} == {torch.float32}
    assert read_metrics(tmp_path)[0]["loop/loss"] == pytest.approx(math.log(2), abs=0.05)
    trainer.save()


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain = weights(trained(tmp_path / "plain"))
    checkpointed = weights(trained(tmp_path / "checkpointed", gradient_checkpointing=True))
    assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_beta_follows_the_latent_size_unless_given(tmp_path):
    assert DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path)).beta == beta_for_dims(256) == 78.125
    trainer = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path, beta=150.0))
    assert trainer.beta == 150.0
    assert (
        "beta 150 over 256 latent dimensions = 0.586 per dimension (1.9 times the paper's; beta_dpo 75 of"
        in trainer.plan()
    )
    assert "4 pairs × 1 micro-batch = 4 pairs per update; 3 updates = 12 pairs, 1.5 epochs" in trainer.plan()


def test_the_guard_stops_when_the_chosen_side_is_forgotten(tmp_path):
    loop = LoopConfig(updates=300, learning_rate=1e-2, progress=False)
    trainer = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path, max_chosen_error_ratio=1.0005, loop=loop))
    result = trainer.train()
    assert result.updates < 300
    assert "chosen side's error has risen to" in result.stopped_because
    assert "raise beta, lower the learning rate, or give sft_weight" in result.stopped_because


def test_the_guard_smooths_over_updates_and_resumes_where_it_was():
    calm, step = (
        {"dpo/margin": margin, "dpo/chosen_error": error, "dpo/reference_chosen_error": 0.5}
        for margin, error in ((0.0, 0.5), (1.0, 1.0))
    )
    guard = ChosenGuard(1.5)
    assert [guard(calm), guard(step), guard(step)] == [None, None, None]
    resumed = ChosenGuard(1.5)
    resumed.load_state_dict(guard.state_dict())
    # 1 - 0.9^n passes one half at n = 7.
    assert [resumed(step) is None for _ in range(5)] == [True, True, True, True, False]


def test_the_guard_refuses_a_start_that_is_not_the_reference():
    assert "before the first update the policy must equal its reference" in ChosenGuard(2.0)(
        {"dpo/margin": 0.7, "dpo/chosen_error": 1.0, "dpo/reference_chosen_error": 1.0}
    )


def test_a_loss_that_is_not_a_number_names_its_records_and_keeps_the_last_good_state(tmp_path):
    trainer = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path, updates=6))
    poisoned = trainer.batches.at(range(12, 16)).names[1]
    moments = trainer.batches.latents.moments

    def poison(requests):
        mean, std = moments(requests)
        rows = [index for index, request in enumerate(requests) if request.name.startswith(f"{poisoned} ")]
        if trainer_is_at_update[0] >= 3:
            mean[rows] = torch.nan
        return mean, std

    trainer_is_at_update = [0]
    at = trainer.batches.at

    def counted(positions):
        trainer_is_at_update[0] = positions[0] // 4
        return at(positions)

    trainer.batches.at = counted
    trainer.batches.latents.moments = poison
    with pytest.raises(NonFiniteLossError, match=f"{poisoned}"):
        trainer.train()
    undisturbed = weights(trained(tmp_path / "undisturbed", updates=3))
    assert torch.equal(weights(trainer), undisturbed)
    assert list(tmp_path.glob("checkpoint-*"))


# What is refused before the first update, each with one clear error.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "'beta' to 0.0, but a number"),
        ({"beta": -1.0}, "'beta' to -1.0, but a number"),
        ({"beta": math.nan}, "'beta' to nan, but a number"),
        ({"sft_weight": -0.1}, "'sft_weight' to -0.1, but a number"),
        ({"max_chosen_error_ratio": 1.0}, "'max_chosen_error_ratio' to 1.0, but a number"),
        ({"micro_batch": 0}, "'micro_batch' to 0, but a whole number"),
        ({"draws_per_pair": 0}, "'draws_per_pair' to 0, but a whole number"),
        ({"loop": LoopConfig(accumulate=2)}, r"loop.accumulate is 2, but DPO works it out"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("resolution", [9, 33, 63])
def test_a_resolution_that_the_autoencoder_cannot_take_is_refused(tmp_path, resolution):
    pipe = tiny_sd()
    message = f"resolution is {resolution}, but .* needs a multiple of {pipe.vae_scale_factor};"
    with pytest.raises(ValueError, match=message):
        DPOTrainer(pipe, toy_pairs(), config(tmp_path, resolution=resolution))


def test_accumulation_that_does_not_divide_names_what_would():
    with pytest.raises(
        ValueError,
        match=r"pairs_per_update=12 is not a multiple of micro_batch=5 times 1 .*a micro_batch of 1, 2, 3, 4, 6, 12",
    ):
        share_of(DPOConfig(pairs_per_update=12, micro_batch=5), process=0, processes=1)


def test_full_fine_tuning_of_half_precision_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"full fine-tuning needs float32 weights, but they are torch\.bfloat16"):
        DPOTrainer(tiny_sd(dtype=torch.bfloat16), toy_pairs(), config(tmp_path, train="full"))


def test_a_pipe_that_carries_an_adapter_is_refused(tmp_path):
    trainer = trained(tmp_path)
    with pytest.raises(ValueError, match="already carries an adapter"):
        DPOTrainer(trainer.model.pipe, toy_pairs(), config(tmp_path))


def test_training_into_an_old_run_s_folder_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match="resume"):
        trained(tmp_path)


def test_encoding_on_first_use_changes_nothing(tmp_path):
    ahead = weights(trained(tmp_path / "ahead"))
    rows = []
    lazy = DPOTrainer(tiny_sd(), toy_pairs(), config(tmp_path / "lazy", encode_ahead=False))
    lazy.model.vae.encoder.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    lazy.batches.at(range(1))
    assert sum(rows) == 2
    lazy.train()
    assert sum(rows) == 16
    assert torch.equal(weights(lazy), ahead)
