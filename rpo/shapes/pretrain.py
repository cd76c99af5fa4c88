"""Train the embedded checkpoint from nothing: `python -m rpo.shapes.pretrain --out FOLDER`.

Scenes are drawn, the autoencoder learns them, every scene is encoded once, then UNet and text encoder learn together on
latents. A killed run continues where its last checkpoint was when the same command is given again. Two CPU cores are
enough; on a GPU all data is resident and no step waits for the host.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar as silence_diffusers
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar as silence_transformers

from rpo.shapes.networks import assemble, build_text_encoder, build_tokenizer, build_unet, save_checkpoint
from rpo.shapes.pretrain_config import PretrainConfig
from rpo.shapes.pretrain_denoiser import Captioned, TextToLatent, train_denoiser
from rpo.shapes.pretrain_evaluate import HeldOut, evaluate, table, to_channels_first
from rpo.shapes.pretrain_loop import Phase, TrainingLog, claim, discard, pick_device, seed_of, write_atomically
from rpo.shapes.pretrain_vae import Moments, encode_moments, train_vae
from rpo.shapes.prompts import prompts
from rpo.shapes.world import training_scenes
from rpo.text import write_text

MAY_CHANGE = (
    "out",
    "state",
    "steps",
    "evaluate",
    "held_out_scenes",
    "snapshot_every",
    "log_every",
    "save_every",
    "fresh",
)
"""What a continued run may set differently: none of it changes what a step computes."""


@dataclass(frozen=True)
class Run:
    """A run in progress: what was asked for, and what every phase needs."""

    config: PretrainConfig
    device: torch.device
    log: TrainingLog
    tokenizer: CLIPTokenizer
    held_out: HeldOut

    def phase(self, name: str, steps: int) -> Phase:
        """One stretch of training of this run."""
        config = self.config
        checkpoint = config.state / f"{name}.pt"
        return Phase(name, steps, config.seed, checkpoint, log_every=config.log_every, save_every=config.save_every)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train, save and evaluate the checkpoint.

    Returns:
        The evaluation, as in the checkpoint's `evaluation.json`; empty if none was asked for.
    """
    device = pick_device(config.device)
    _claim_state(config)
    log = TrainingLog(config.state / "log.jsonl", partial(print, flush=True))
    log.record(f"shapes pretraining on {device}", **_as_json(config))
    tokenizer = build_tokenizer(config.state / "tokenizer", world_words())
    images, captions = training_scenes(seed_of(config.seed, 1), config.held_out_scenes)
    run = Run(config, device, log, tokenizer, HeldOut(to_channels_first(images), captions))
    images, captions = training_scenes(seed_of(config.seed, 0), config.scenes)
    resident = to_channels_first(images).to(device)
    vae = train_vae(
        resident,
        run.phase("vae", config.vae_steps),
        batch_size=config.vae_batch_size,
        learning_rate=config.vae_lr,
        log=log,
    )
    data = Captioned(_encoded(run, vae, resident), _token_ids(run, captions), _token_ids(run, [""]))
    networks = _train_denoiser(run, vae, data)
    return _finish(run, _pipeline(run, vae, networks), config.out)


def world_words() -> set[str]:
    """Every word of the world's prompts, which the tokenizer shall know whole."""
    known = [*prompts("train"), *prompts("in_domain"), *prompts("out_of_domain")]
    return {word for prompt in known for word in prompt.text.split()}


def _as_json(config: PretrainConfig) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }


def _claim_state(config: PretrainConfig) -> None:
    """Make the state folder this run's: empty it if asked to, and refuse one that belongs to another run."""
    if config.fresh:
        discard(config.state, "vae.pt", "denoiser.pt", "latents.pt")
    claim(config.state, {name: value for name, value in _as_json(config).items() if name not in MAY_CHANGE})


def _encoded(run: Run, vae: AutoencoderKL, images: Tensor) -> Moments:
    """The latents of all scenes, encoded once per run."""
    file = run.config.state / "latents.pt"
    if not file.exists():
        moments = encode_moments(vae, images)
        write_atomically({"mean": moments.mean, "std": moments.std}, file)
    saved = torch.load(file, map_location=run.device, weights_only=True)
    run.log.record(
        f"latents: {len(saved['mean'])} scenes, std {saved['mean'].std():.3f}, "
        f"posterior std {saved['std'].mean():.3f}, scaling factor {vae.config.scaling_factor:.4f}",
        phase="latents",
        scaling_factor=vae.config.scaling_factor,
        mean=saved["mean"].mean(dim=(0, 2, 3)).tolist(),
        std=saved["mean"].std(dim=(0, 2, 3)).tolist(),
    )
    return Moments(saved["mean"], saved["std"])


def _token_ids(run: Run, captions: list[str]) -> Tensor:
    return run.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(run.device)


def _train_denoiser(run: Run, vae: AutoencoderKL, data: Captioned) -> TextToLatent:
    config = run.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet, text_encoder = build_unet(), build_text_encoder(run.tokenizer)
    networks = TextToLatent(unet.to(run.device), text_encoder.to(run.device))

    def snapshot(step: int) -> None:
        if config.snapshot_every and step % config.snapshot_every == 0 and step < config.steps:
            _finish(run, _pipeline(run, vae, networks), config.state / "snapshots" / f"step-{step:06d}")

    train_denoiser(
        networks,
        data,
        run.phase("denoiser", config.steps),
        batch_size=config.batch_size,
        learning_rate=config.lr,
        log=run.log,
        is_compiled=config.compile,
        is_bfloat16=config.bf16,
        after_step=snapshot,
    )
    return networks


def _pipeline(run: Run, vae: AutoencoderKL, networks: TextToLatent) -> StableDiffusionPipeline:
    return assemble(vae, networks.average_unet, networks.average_text_encoder, run.tokenizer)


def _finish(run: Run, pipe: StableDiffusionPipeline, folder: Path) -> dict[str, Any]:
    """Save the pipeline and measure what was saved."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(pipe, folder, world_words())
    run.log.record(f"saved {folder}", saved=str(folder))
    if not run.config.evaluate:
        return {}
    evaluation = evaluate(
        folder, images_per_split=run.config.evaluate, device=run.device, seed=run.config.seed, held_out=run.held_out
    )
    write_text(folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    run.log.record(table(evaluation), folder=str(folder), evaluation=evaluation)
    return evaluation


def parse_arguments(arguments: list[str] | None = None) -> PretrainConfig:
    """The configuration that the command line asks for; its help is the fields' own documentation."""
    parser = argparse.ArgumentParser(prog="python -m rpo.shapes.pretrain", description=(__doc__ or "").split("\n")[0])
    documentation = _field_documentation()
    for field in dataclasses.fields(PretrainConfig):
        flag, text = "--" + field.name.replace("_", "-"), documentation[field.name].replace("%", "%%")
        if field.default is False:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += f" (default {field.default})"
            parser.add_argument(flag, type=type(field.default), default=field.default, metavar="VALUE", help=text)
    return PretrainConfig(**vars(parser.parse_args(arguments)))


def _field_documentation() -> dict[str, str]:
    """The string under each field of `PretrainConfig`; Python keeps it in the source only."""
    documentation: dict[str, str] = {}
    tree = ast.parse(inspect.getsource(PretrainConfig))
    for field, text in itertools.pairwise(next(node.body for node in tree.body if isinstance(node, ast.ClassDef))):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                documentation[name] = words
    return documentation


if __name__ == "__main__":
    silence_diffusers()
    silence_transformers()
    pretrain(parse_arguments())
