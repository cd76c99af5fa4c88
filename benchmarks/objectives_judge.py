"""How `objectives.py` judges a model: by several samplers, its distance from the base, its diversity, both rewards."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rpo.adapters.lora import adapter_layers, reference
from rpo.evaluation.held_out import Sampling
from rpo.models.checkpoint import Checkpoint
from rpo.process.transition import Ddim
from rpo.rewards import load_reward
from rpo.sampling.sample import image_generator, sample
from rpo.sampling.step import predict, transition
from rpo.shapes.evaluate import ShapesEvaluation, evaluate, held_out_prompts, usual_sampling
from rpo.shapes.prompts import Prompt, sample_prompts

SAMPLERS = {
    f"{name}, guidance {guidance:g}": usual_sampling(seed=0, guidance_scale=guidance, **settings)
    for name, settings in {
        "DDIM 20, eta 0": {"num_steps": 20, "eta": 0.0},
        "DDIM 20, eta 1": {"num_steps": 20, "eta": 1.0},
        "uniform 10, eta 1": {"num_steps": 10, "eta": 1.0, "spacing": "uniform"},
        "DPM-Solver++ 10": {"num_steps": 10, "eta": 0.0, "solver": "dpm_solver"},
    }.items()
    for guidance in (1.0, 2.0)
}
"""By which every model is judged: deterministic and ancestral, leading and uniform steps, a second-order solver, each
with and without guidance. For the base, guidance 2 is better than 1, 3 or 5 with most of these."""

WATCHED = "DDIM 20, eta 1, guidance 2"
"""By which runs are judged on their way: the default sampler of `shapes`."""

HELD_OUT = ("in_domain", "out_of_domain")
PROXY = "shapes-clip"
BEST_OF = 4
"""Images among which the untrained bar takes the best."""

KL_STEPS, LAST_STEPS = 10, 2
KL_IMAGES = 64
DIVERSE_PROMPTS = 32


def judged(model: Checkpoint, images: int, *, in_full: bool) -> dict[str, Any]:
    """What there is to say of a model.

    Args:
        images: Prompts of each split.
        in_full: By all samplers, with the diversity of what it draws; otherwise by the one that is watched.
    """
    model.denoiser.to(memory_format=torch.channels_last)  # on a CPU a quarter faster, and the same images to 1e-4
    splits = _splits(images) if in_full else _held_out(_splits(images))
    found = {name: evaluate(model, splits, SAMPLERS[name]) for name in _names(in_full)}
    facts: dict[str, Any] = {
        **(path_kl(model, min(images, KL_IMAGES)) if adapter_layers(model.denoiser) else {}),
        **scores(found[WATCHED]),
        "verdicts": {name: packed(one) for name, one in found.items()},
    }
    if in_full:
        facts["diversity"] = diversity(model, min(images, DIVERSE_PROMPTS))
    return facts


def best_of_base(model: Checkpoint, images: int) -> dict[str, Any]:
    """The best of several images of the base, by each reward: verdicts and scores by the watched sampler."""
    splits, watched = _held_out(_splits(images)), SAMPLERS[WATCHED]
    several = Sampling(**{**vars(watched), "images_per_prompt": BEST_OF})
    drawn = evaluate(model, splits, several)
    by_proxy = _proxy_scores(drawn).reshape(-1, BEST_OF)
    rows = np.arange(len(by_proxy))
    found: dict[str, Any] = {}
    for name, by in {"graded": drawn.scores.reshape(-1, BEST_OF), "proxy": by_proxy}.items():
        best = by.argmax(axis=1)
        facts: dict[str, Any] = {"gold": {}, "proxy": {}, "verdicts": {}}
        for split in splits:
            where = drawn.where(split)[::BEST_OF] // BEST_OF
            own = rows[where], best[where]
            facts["verdicts"][split] = pack(drawn.holds.reshape(-1, BEST_OF)[own])
            facts["gold"][split] = float(drawn.scores.reshape(-1, BEST_OF)[own].mean())
            facts["proxy"][split] = float(by_proxy[own].mean())
        found[name] = facts
    return found


def scores(drawn: ShapesEvaluation) -> dict[str, dict[str, float]]:
    """Mean scores of both rewards by split: the verifier's, which is gold, and those of the proxy."""
    proxy = _proxy_scores(drawn)
    return {
        "gold": {split: round(float(drawn.scores[drawn.where(split)].mean()), 4) for split in HELD_OUT},
        "proxy": {split: round(float(proxy[drawn.where(split)].mean()), 4) for split in HELD_OUT},
    }


@torch.no_grad()
def path_kl(model: Checkpoint, images: int) -> dict[str, float]:
    """KL from the base along paths of the reverse SDE without guidance, the same for every method, in nats.

    That of the last steps is told apart: their noise is so small that a difference too small to see outweighs the rest.
    """
    prompts = [prompt.text for prompt in held_out_prompts(images, seed=0)["in_domain"]]
    generators = [image_generator(0, index, 0) for index in range(len(prompts))]
    cond, grid, kernel = model.encode_prompts(prompts), model.grid(KL_STEPS), Ddim(1.0)
    drawn = sample(model, cond, grid, kernel, guidance_scale=1.0, generators=generators)
    costs: list[float] = []
    for step in range(grid.num_steps):
        at = drawn.latents[step], grid[step]
        policy = transition(model, predict(model, *at, cond, guidance_scale=1.0), *at, grid[step + 1], kernel)
        with reference(model.denoiser):
            base = transition(model, predict(model, *at, cond, guidance_scale=1.0), *at, grid[step + 1], kernel)
        costs.append(policy.kl(base).mean().item())
    return {"kl": round(sum(costs[:-LAST_STEPS]), 4), "kl_last_steps": round(sum(costs[-LAST_STEPS:]), 4)}


@torch.no_grad()
def diversity(model: Checkpoint, prompts: int) -> float:
    """How far apart images of one prompt lie: 1 less the mean cosine of two of them, as the proxy's eyes see them."""
    texts = [prompt.text for prompt in held_out_prompts(prompts, seed=0)["in_domain"]]
    several = Sampling(**{**vars(SAMPLERS[WATCHED]), "images_per_prompt": BEST_OF})
    proxy: Any = load_reward(PROXY)
    seen = proxy.embed_images(several.draw(model, texts, batch_size=64)).view(len(texts), BEST_OF, -1)
    alike = (seen @ seen.transpose(1, 2)).sum(dim=(1, 2)) - BEST_OF
    return round(float(1 - (alike / (BEST_OF * (BEST_OF - 1))).mean()), 5)


def packed(drawn: ShapesEvaluation) -> dict[str, str]:
    """By split, a bit for each prompt: 1 where its image shows what was asked for."""
    return {split: pack(drawn.holds[drawn.where(split)]) for split in dict.fromkeys(drawn.domains)}


def pack(holds: Sequence[bool] | np.ndarray) -> str:
    """Verdicts as hexadecimal digits, four to a digit, after their number."""
    bits = "".join(str(int(one)) for one in holds)
    return f"{len(bits)}:{int(bits, 2):0{-(-len(bits) // 4)}x}"


def unpack(text: str) -> np.ndarray:
    """What `pack` gave."""
    count, _, digits = text.partition(":")
    return np.array([digit == "1" for digit in f"{int(digits, 16):0{int(count)}b}"])


def evaluations_to_judge(images: int, *, in_full: bool) -> int:
    """What judging costs, which no run is charged for."""
    splits = len(_splits(1)) if in_full else len(HELD_OUT)
    one = sum((SAMPLERS[name].num_steps or 0) * round(SAMPLERS[name].guidance_scale or 1) for name in _names(in_full))
    diverse = min(images, DIVERSE_PROMPTS) * BEST_OF * 40 if in_full else 0
    return splits * images * one + 3 * KL_STEPS * min(images, KL_IMAGES) + diverse


def _names(in_full: bool) -> tuple[str, ...]:
    return tuple(SAMPLERS) if in_full else (WATCHED,)


def _splits(images: int) -> dict[str, list[Prompt]]:
    """Training prompts choose among samplers; the rest judge, and come first: their noise is always the same."""
    return {**held_out_prompts(images, seed=0), "train": sample_prompts("train", images, seed=0)}


def _held_out(splits: dict[str, list[Prompt]]) -> dict[str, list[Prompt]]:
    return {split: splits[split] for split in HELD_OUT}


@torch.no_grad()
def _proxy_scores(drawn: ShapesEvaluation) -> np.ndarray:
    pixels = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255
    return load_reward(PROXY)(pixels, drawn.texts).numpy()
