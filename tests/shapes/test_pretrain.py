import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rpo.shapes import pretrain as script
from rpo.shapes.networks import (
    MAX_TOKENS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from rpo.shapes.pretrain_denoiser import (
    Captioned,
    TextToLatent,
    average_decay,
    draw_batch,
    train_denoiser,
)
from rpo.shapes.pretrain_evaluate import accuracy_by_kind, to_channels_first
from rpo.shapes.pretrain_loop import Phase, TrainingLog, linear_warmup, one_cycle, train, write_atomically
from rpo.shapes.pretrain_vae import Moments, encode_moments, psnr, train_vae, vae_loss
from rpo.shapes.prompts import parse_prompt, prompts
from rpo.shapes.world import Scene, SceneObject, render, training_scenes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), script.world_words())


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return to_channels_first(training_scenes(0, 16)[0])


@pytest.fixture
def captioned(tokenizer) -> Captioned:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(12, 4, 8, 8, generator=generator)
    ids = torch.randint(0, len(tokenizer), (12, MAX_TOKENS), generator=generator)
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    return Captioned(Moments(mean, torch.full_like(mean, 0.1)), ids, empty)


def silent_log(folder: Path) -> TrainingLog:
    return TrainingLog(folder / "log.jsonl", lambda line: None)


def log_that_dies_at(folder: Path, step: int) -> TrainingLog:
    """Stands for a kill: the run ends inside step `step`, before that step is saved."""

    def echo(line: str) -> None:
        if f" {step}/" in line:
            raise KeyboardInterrupt

    return TrainingLog(folder / "log.jsonl", echo)


def weights(networks: TextToLatent) -> list[Tensor]:
    return [*networks.parameters(), *networks.average_parameters()]


def test_every_word_of_the_world_is_one_token_and_every_prompt_fits(tokenizer) -> None:
    everything = [*prompts("train"), *prompts("in_domain"), *prompts("out_of_domain")]
    for prompt in everything:
        assert tokenizer.tokenize(prompt.text) == [f"{word}</w>" for word in prompt.text.split()]
        assert len(tokenizer(prompt.text).input_ids) <= MAX_TOKENS


def test_other_text_is_spelled_in_bytes_and_comes_back(tokenizer) -> None:
    ids = tokenizer("zyx 7 é").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zyx 7 é"


def test_merges_of_one_word_leave_the_others_whole(tmp_path: Path) -> None:
    # "re" of "red" also occurs inside "green" and "three", and "tree" begins like "trees".
    words = ["red", "green", "three", "tree", "trees", "e"]
    tokenizer = build_tokenizer(tmp_path, words)
    assert [tokenizer.tokenize(word) for word in words] == [[f"{word}</w>"] for word in words]


def test_denoiser_continues_bit_equally_after_a_kill(tmp_path: Path, tokenizer, captioned: Captioned) -> None:
    def run(folder: Path, log: TrainingLog) -> list[Tensor]:
        folder.mkdir(exist_ok=True)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            networks = TextToLatent(build_unet(), build_text_encoder(tokenizer))
        phase = Phase("denoiser", 6, seed=3, checkpoint=folder / "denoiser.pt", log_every=1, save_every=3)
        train_denoiser(networks, captioned, phase, batch_size=2, learning_rate=1e-3, log=log)
        return weights(networks)

    undisturbed = run(tmp_path / "a", silent_log(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", log_that_dies_at(tmp_path / "b", 5))
    resumed = run(tmp_path / "b", silent_log(tmp_path / "b"))
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["resumed_at"] for line in lines if "resumed_at" in line] == [3]
    assert all(torch.equal(one, other) for one, other in zip(undisturbed, resumed, strict=True))


def test_vae_continues_bit_equally_after_a_kill(tmp_path: Path, scenes: Tensor) -> None:
    def run(folder: Path, log: TrainingLog):
        folder.mkdir(exist_ok=True)
        phase = Phase("vae", 4, seed=3, checkpoint=folder / "vae.pt", log_every=1, save_every=2)
        return train_vae(scenes, phase, batch_size=2, learning_rate=2e-3, log=log)

    undisturbed = run(tmp_path / "a", silent_log(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", log_that_dies_at(tmp_path / "b", 3))
    resumed = run(tmp_path / "b", silent_log(tmp_path / "b"))
    assert all(
        torch.equal(one, other) for one, other in zip(undisturbed.parameters(), resumed.parameters(), strict=True)
    )
    assert undisturbed.config.scaling_factor == resumed.config.scaling_factor


def test_training_leaves_the_global_generator_alone(tmp_path: Path, scenes: Tensor) -> None:
    before = torch.get_rng_state()
    phase = Phase("vae", 1, seed=0, checkpoint=tmp_path / "vae.pt")
    train_vae(scenes, phase, batch_size=2, learning_rate=1e-3, log=silent_log(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


def test_scaled_latents_have_unit_standard_deviation(tmp_path: Path, scenes: Tensor) -> None:
    phase = Phase("vae", 1, seed=0, checkpoint=tmp_path / "vae.pt")
    vae = train_vae(scenes, phase, batch_size=2, learning_rate=1e-3, log=silent_log(tmp_path))
    moments = encode_moments(vae, scenes)
    assert (moments.mean.var() + (moments.std**2).mean()).sqrt().item() == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(weight, weight.half().float()) for weight in vae.parameters())


def test_vae_loss_is_reconstruction_plus_weighted_kl(scenes: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = build_vae()
    images = scenes[:2].float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(5))).sample
        error = decoded - images
        expected = error.abs().mean() + (error**2).mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        assert vae_loss(vae, images, torch.Generator().manual_seed(5)).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


def test_psnr_of_a_constant_error_of_one_tenth_is_twenty() -> None:
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    assert psnr(images, torch.full((2, 3, 4, 4), 0.3)) == pytest.approx(20, abs=1e-4)


def test_noisy_latents_are_alpha_x0_plus_sigma_eps(captioned: Captioned) -> None:
    exact = dataclasses.replace(captioned, moments=Moments(torch.full((12, 4, 8, 8), 2.0), torch.zeros(12, 4, 8, 8)))
    scheduler = build_scheduler()
    batch = draw_batch(exact, scheduler.alphas_cumprod, 8, torch.Generator().manual_seed(0))
    expected = scheduler.add_noise(torch.full((8, 4, 8, 8), 2.0), batch.eps, batch.timestep)
    torch.testing.assert_close(batch.x_t, expected)


def test_one_caption_in_ten_is_emptied(captioned: Captioned) -> None:
    batch = draw_batch(captioned, build_scheduler().alphas_cumprod, 4000, torch.Generator().manual_seed(0))
    is_empty = (batch.token_ids == captioned.empty_ids).all(dim=1)
    assert is_empty.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert all((row == captioned.token_ids).all(dim=1).any() for row in batch.token_ids[~is_empty][:50])


def test_posterior_noise_has_the_posterior_spread(captioned: Captioned) -> None:
    still = torch.ones(1000)  # alpha = 1: no diffusion noise is left in x_t
    constant = dataclasses.replace(
        captioned, moments=Moments(torch.zeros(12, 4, 8, 8), torch.full((12, 4, 8, 8), 0.25))
    )
    batch = draw_batch(constant, still, 400, torch.Generator().manual_seed(0))
    assert batch.x_t.std().item() == pytest.approx(0.25, rel=0.02)


def test_learning_rates() -> None:
    assert [linear_warmup(step, warmup_steps=4, peak=8.0) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    cycle = [one_cycle(step, steps=100, peak=1.0) for step in range(100)]
    assert cycle[0] == pytest.approx(1 / 25)
    assert max(cycle) == cycle[30] == 1.0
    assert cycle == sorted(cycle[:31]) + sorted(cycle[31:], reverse=True)
    assert cycle[-1] < 0.002


def test_average_forgets_the_random_start_and_then_grows_long() -> None:
    assert average_decay(0) == 0.1
    kept = 1.0
    for step in range(1000):
        kept *= average_decay(step)
    assert kept < 1e-12
    assert average_decay(10**6) == 0.9995


def test_a_crash_while_saving_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    write_atomically({"step": 1}, file)
    with pytest.raises(AttributeError):
        write_atomically({"step": 2, "unsaveable": lambda: None}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    def take_step(index: int, generator: torch.Generator) -> Tensor:
        return torch.tensor(float("nan") if index >= 2 else 1.0)

    phase = Phase("vae", 4, seed=0, checkpoint=tmp_path / "vae.pt", log_every=2, save_every=2)
    with pytest.raises(ValueError, match="the mean loss of steps 3 to 4 is nan, expected a finite number; lower --lr"):
        train(phase, take_step, {}, device=CPU, log=silent_log(tmp_path))
    assert torch.load(phase.checkpoint, weights_only=True)["step"] == 2


def test_accuracy_is_told_for_each_kind_that_occurs_and_for_all() -> None:
    circle = render(Scene((SceneObject("circle", "red", 32, 32, 9),)))
    images = to_channels_first(np.stack([circle] * 3)).float() / 255
    asked = [parse_prompt(text) for text in ("a red circle", "a green circle", "three red circles")]
    accuracy = accuracy_by_kind(images, asked)
    assert accuracy == {"single": 0.5, "count": 0.0, "all": pytest.approx(1 / 3)}


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., script.PretrainConfig]:
    def config(**changes: object) -> script.PretrainConfig:
        arguments = ["--state", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", "--scenes", "32"]
        arguments += ["--vae-steps", "2", "--steps", "2", "--batch-size", "4", "--vae-batch-size", "4"]
        arguments += ["--evaluate", "4", "--held-out-scenes", "8", "--log-every", "1"]
        return dataclasses.replace(script.parse_arguments(arguments), **changes)

    return config


def test_the_script_makes_a_checkpoint_goes_on_and_refuses_a_strangers_state(
    tiny_run: Callable[..., script.PretrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = script.pretrain(tiny_run(snapshot_every=1))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == evaluation
    assert set(evaluation["accuracy"]) == {"train", "in_domain", "out_of_domain"}
    assert evaluation["vae"]["verified"] == 1.0
    assert (tmp_path / "snapshots" / "step-000001" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert "verified accuracy" in capsys.readouterr().out

    script.pretrain(tiny_run(steps=3, evaluate=0))
    out = capsys.readouterr().out
    assert "vae: continues after step 2" in out
    assert "denoiser 3/3" in out
    assert "denoiser 2/3" not in out
    assert not (tmp_path / "out" / "evaluation.json").exists()  # the numbers of the replaced weights went with them

    with pytest.raises(ValueError, match=r"other settings \(seed: 0 -> 1\), expected the same ones to continue it"):
        script.pretrain(tiny_run(seed=1))
