"""Train the shapes editor from the embedded checkpoint: `rpo shapes pretrain-editor out=FOLDER`.

Triples are drawn, rendered and encoded once; then the UNet, widened for the source's latents, and the text encoder
learn to denoise the edited scene from the source and the instruction (Brooks et al., arXiv:2211.09800). The loss is
min(SNR, 5)/SNR ||eps - eps_hat||^2 (Hang et al., arXiv:2303.09556): what an edit does is decided where the noise is
strong, and plain epsilon-matching spends its gradient where it is weak. A moving average of the weights is the result.
A killed run continues where its last checkpoint was when the same command is given again.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.logging import disable_progress_bar as silence_diffusers
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar as silence_transformers

from rpo.config import load_config
from rpo.shapes.networks import build_scheduler, save_checkpoint
from rpo.shapes.pretrain_config import PretrainEditorConfig
from rpo.shapes.pretrain_denoiser import WARMUP_STEPS, TextToLatent, average_decay
from rpo.shapes.pretrain_editor_data import Instructed, InstructedBatch, draw_batch, draw_instructed
from rpo.shapes.pretrain_editor_evaluate import EditSampling, editor_table, evaluate_editor
from rpo.shapes.pretrain_editor_networks import (
    assemble_editor,
    build_editor_tokenizer,
    editor_words,
    extend_text_encoder,
    load_base,
    widen_unet,
)
from rpo.shapes.pretrain_loop import (
    Phase,
    TrainingLog,
    claim,
    discard,
    linear_warmup,
    pick_device,
    seed_of,
    set_learning_rate,
    train,
    write_atomically,
)
from rpo.shapes.pretrain_vae import Moments
from rpo.text import write_text

SNR_LIMIT = 5.0
"""Signal-to-noise ratio from which a step counts less; the value of the paper."""


MAY_CHANGE = ("out", "state", "steps", "lr", "evaluate", "evaluate_every", "log_every", "save_every", "fresh")
"""What a continued run may set differently."""


@dataclass(frozen=True)
class EditorRun:
    """A run in progress: what was asked for, and what every phase needs."""

    config: PretrainEditorConfig
    log: TrainingLog
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL


def pretrain_editor(config: PretrainEditorConfig) -> dict[str, Any]:
    """Train, save and evaluate the editor.

    Returns:
        The evaluation, as in the checkpoint's `evaluation.json`; empty if none was asked for.
    """
    device = pick_device(config.device)
    if config.fresh:
        discard(config.state, "triples.pt", "editor.pt")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    claim(config.state, {name: value for name, value in settings.items() if name not in MAY_CHANGE})
    log = TrainingLog(config.state / "log.jsonl", partial(print, flush=True))
    log.record(f"shapes editor pretraining on {device}", **settings)
    base = load_base()
    tokenizer = build_editor_tokenizer(config.state / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        text_encoder = extend_text_encoder(base.text_encoder, base.tokenizer, tokenizer)
    networks = TextToLatent(widen_unet(base.unet).to(device), text_encoder.to(device))
    run = EditorRun(config, log, tokenizer, base.vae.to(device).eval().requires_grad_(False))
    _train(run, networks, _encoded(run))
    return _finish(run, networks, config.out)


def _encoded(run: EditorRun) -> Instructed:
    """The triples, drawn and encoded once per run."""
    file = run.config.state / "triples.pt"
    if not file.exists():
        run.log.record(f"drawing and encoding {run.config.triples} triples", phase="triples")
        data = draw_instructed(run.vae, run.tokenizer, run.config.triples, seed_of(run.config.seed, 0))
        parts = {"source": data.source, "mean": data.edited.mean, "std": data.edited.std}
        write_atomically({**parts, "token_ids": data.token_ids, "empty_ids": data.empty_ids}, file)
    saved = torch.load(file, map_location=run.vae.device, weights_only=True)
    return Instructed(saved["source"], Moments(saved["mean"], saved["std"]), saved["token_ids"], saved["empty_ids"])


def instructed_loss(networks: TextToLatent, batch: InstructedBatch, alphas_cumprod: Tensor) -> Tensor:
    """The mean squared error of the predicted noise, weighted by min(SNR, `SNR_LIMIT`) / SNR."""
    states = networks.text_encoder(batch.token_ids)[0]
    eps_hat = networks.unet(batch.inputs, batch.timestep, states, return_dict=False)[0]
    snr = alphas_cumprod[batch.timestep] / (1 - alphas_cumprod[batch.timestep])
    weight = snr.clamp(max=SNR_LIMIT) / snr
    return (weight * (batch.eps - eps_hat).square().mean(dim=(1, 2, 3))).mean()


def _train(run: EditorRun, networks: TextToLatent, data: Instructed) -> None:
    config, device = run.config, data.source.device
    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    parameters, averages = networks.parameters(), networks.average_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), fused=True)

    def step(index: int, generator: torch.Generator) -> Tensor:
        loss = instructed_loss(networks, draw_batch(data, alphas_cumprod, config.batch_size, generator), alphas_cumprod)
        set_learning_rate(optimizer, linear_warmup(index, warmup_steps=WARMUP_STEPS, peak=config.lr))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - average_decay(index))
        return loss

    def snapshot(done: int) -> None:
        if config.evaluate_every and done % config.evaluate_every == 0 and done < config.steps:
            _finish(run, networks, config.state / "snapshots" / f"step-{done:06d}")

    phase = Phase("editor", config.steps, config.seed, config.state / "editor.pt", config.log_every, config.save_every)
    train(phase, step, {**networks.parts(), "optimizer": optimizer}, device=device, log=run.log, after_step=snapshot)


def _finish(run: EditorRun, networks: TextToLatent, folder: Path) -> dict[str, Any]:
    """Save the averages as a pipeline and measure them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipe = assemble_editor(run.vae, networks.average_unet, networks.average_text_encoder, run.tokenizer)
    save_checkpoint(pipe, folder, editor_words())
    run.log.record(f"saved {folder}", saved=str(folder))
    if not run.config.evaluate:
        return {}
    pipe.set_progress_bar_config(disable=True)
    evaluation = evaluate_editor(pipe, cases=run.config.evaluate, seed=run.config.seed, sampling=EditSampling())
    write_text(folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    run.log.record(editor_table(evaluation), folder=str(folder), evaluation=evaluation)
    return evaluation


if __name__ == "__main__":
    silence_diffusers()
    silence_transformers()
    pretrain_editor(load_config(PretrainEditorConfig, None, sys.argv[1:]))
