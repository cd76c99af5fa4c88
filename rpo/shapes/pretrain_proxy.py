"""Train the proxy reward from nothing: `rpo shapes pretrain-proxy out=FOLDER`, a small CLIPModel (arXiv:2103.00020).

The loss is CLIP's, in both directions over one batch, with two differences that a world of few sentences asks for:

- Several captions of a batch may hold of one image. Each of them is matched against the wrong ones only:
  loss(row) = mean over right j of -log(exp(s_j) / (exp(s_j) + sum over wrong k of exp(s_k))).
- A batch is made of families (`rpo.shapes.proxy_scenes`), so that among the wrong ones there always are some that
  differ in one attribute, number or relation. A near miss that no sentence describes takes part as a wrong image.

The result is an honest stand-in for CLIPScore or PickScore: a learned score that agrees with the verifier often, not
always, and that can be gamed. A killed run continues where its last checkpoint was.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rpo.shapes.networks import MAX_TOKENS, build_tokenizer
from rpo.shapes.pretrain import world_words
from rpo.shapes.pretrain_config import PretrainProxyConfig
from rpo.shapes.pretrain_loop import (
    Phase,
    TrainingLog,
    claim,
    discard,
    one_cycle,
    pick_device,
    round_to_half,
    seed_of,
    set_learning_rate,
    train,
)
from rpo.shapes.proxy_checkpoint import save_proxy
from rpo.shapes.proxy_data import Data, draw_batch, load_data, to_pixel_values
from rpo.shapes.proxy_evaluate import evaluate_proxy, format_proxy
from rpo.shapes.proxy_scenes import draw_families
from rpo.text import write_text

WIDTH = 128
MAX_LOGIT_SCALE = 100.0
"""CLIP's bound on the factor of the cosine."""


MAY_CHANGE = (
    "out",
    "state",
    "stop",
    "held_out_families",
    "prompts_per_split",
    "images_per_prompt",
    "log_every",
    "save_every",
    "fresh",
)
"""What a continued run may set differently: none of it changes what a step computes."""


def pretrain_proxy(config: PretrainProxyConfig) -> dict[str, Any]:
    """Train, save and measure the proxy.

    Returns:
        The measurement, as in the folder's `evaluation.json`; empty if none was asked for.
    """
    device = pick_device(config.device)
    if config.fresh:
        discard(config.state, "decoded.pt", "proxy.pt")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    claim(config.state, {name: value for name, value in settings.items() if name not in MAY_CHANGE})
    log = TrainingLog(config.state / "log.jsonl", partial(print, flush=True))
    log.record(f"shapes proxy pretraining on {device}", **settings)
    tokenizer = build_tokenizer(config.state / "tokenizer", world_words())
    families = draw_families(seed_of(config.seed, 0), config.families)
    data = load_data(families, tokenizer, config.state / "decoded.pt", seed=seed_of(config.seed, 2), device=device)
    model = build_proxy(tokenizer, config.seed).to(device)
    _train(model, data, config, log)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_proxy(model, tokenizer, config.out, world_words())
    log.record(f"saved {config.out}", saved=str(config.out))
    if not config.held_out_families and not config.prompts_per_split:
        return {}
    evaluation = evaluate_proxy(
        config.out,
        seed=config.seed,
        held_out=draw_families(seed_of(config.seed, 1), config.held_out_families),
        prompts_per_split=config.prompts_per_split,
        images_per_prompt=config.images_per_prompt,
        device=device,
    )
    write_text(config.out / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    log.record(format_proxy(evaluation), evaluation=evaluation)
    return evaluation


def build_proxy(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """Make an untrained model of about 1.3 million parameters: 64 patches of 8 x 8 pixels, two text layers.

    Args:
        seed: Determines the initial weights; the global generator stays as it is.
    """
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": WIDTH,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "projection_dim": WIDTH,
        "image_size": 64,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def contrastive_loss(logits: Tensor, holds: Tensor) -> Tensor:
    """CLIP's loss where several captions may hold of an image, and several images of a caption.

    Args:
        holds: Which captions hold of which images, of the same shape.
    """
    return (_matching_loss(logits, holds) + _matching_loss(logits.T, holds.T)) / 2


def _matching_loss(logits: Tensor, is_right: Tensor) -> Tensor:
    """Mean over right entries, weighted so that each row with any counts once, of -log softmax against wrong ones."""
    wrong = logits.masked_fill(is_right, -torch.inf).logsumexp(1, keepdim=True)
    losses = functional.softplus(wrong - logits)
    count = is_right.sum(1)
    per_row = losses.masked_fill(~is_right, 0).sum(1) / count.clamp(min=1)
    return per_row.sum() / (count > 0).sum().clamp(min=1)


def _train(model: CLIPModel, data: Data, config: PretrainProxyConfig, log: TrainingLog) -> None:
    """Train `model` in place; its weights end as half precision will hold them."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )

    def step(index: int, generator: torch.Generator) -> Tensor:
        batch = draw_batch(data, config.batch_families, generator)
        output = model(input_ids=batch.token_ids, pixel_values=to_pixel_values(batch.pixels))
        loss = contrastive_loss(output.logits_per_image, batch.holds)
        set_learning_rate(optimizer, one_cycle(index, steps=config.steps, peak=config.lr))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(MAX_LOGIT_SCALE)))
        return loss

    phase = Phase(
        "proxy",
        min(config.stop or config.steps, config.steps),
        config.seed,
        config.state / "proxy.pt",
        log_every=config.log_every,
        save_every=config.save_every,
    )
    model.train()
    train(phase, step, {"model": model, "optimizer": optimizer}, device=data.holds.device, log=log)
    model.eval().requires_grad_(False)
    round_to_half([model])
