"""How good the checkpoint, the editor and the proxy are; what is measured is the folder on disk, as a user gets it.

The checkpoint: verified accuracy by kind of prompt, and what its autoencoder loses. The editor: the share of
instructions carried out with an otherwise unchanged scene. The proxy: does the right caption come first among all known
ones, is a right scene scored above a near miss of the same layout, and, on images of the base, how often is the right
one of two scored higher (AUC), how do the orders agree (Spearman), how often does the best of n by proxy hold?
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AmusedPipeline, AutoencoderKL, StableDiffusionInstructPix2PixPipeline
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

import rpo.shapes
from rpo.evaluation.held_out import Sampling
from rpo.models.checkpoint import Checkpoint
from rpo.shapes.evaluate import ShapesEvaluation, accuracies, evaluate, judge_images, usual_sampling
from rpo.shapes.prompts import Split, sample_prompts
from rpo.shapes.verifier import verify_all
from rpo.shapes.world import render, training_scenes
from scripts.shapes.edit_check import carries_out
from scripts.shapes.edit_world import EDIT_TASKS, EditTriple, triples
from scripts.shapes.proxy_scenes import FAMILY_SIZE, Families, known_prompts
from scripts.shapes.training import seed_of
from scripts.shapes.vae import channels_first, decode, encode, psnr
from scripts.shapes.vq import decode_tokens, encode_tokens

SPLITS: tuple[Split, ...] = ("train", "in_domain", "out_of_domain")
HELD_OUT_SCENES = 1024
EDIT_SAMPLING = {
    "num_inference_steps": rpo.shapes.EDIT_NUM_STEPS,
    "guidance_scale": rpo.shapes.EDIT_GUIDANCE_SCALE,
    "image_guidance_scale": rpo.shapes.EDIT_IMAGE_GUIDANCE_SCALE,
}
EDIT_BATCH, TOKEN_BATCH, EMBED_BATCH = 32, 64, 128
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own."""

LATENT_NOISE = 0.3
"""Largest standard deviation of the noise on the latents of decoded images; the latents themselves have about 1."""

IMAGES_PER_PROMPT = 4
PROXY_SAMPLING = {"guidance_scale": 3.0, "eta": 0.0}
"""Of the images on which the proxy is measured: another sampler than the base's best."""


def evaluate_checkpoint(folder: Path, images_per_split: int, *, seed: int, device: torch.device) -> dict[str, Any]:
    """Measure a checkpoint on prompts of each split, and its autoencoder on scenes that no training saw."""
    model = Checkpoint.load(folder, device=device)
    prompts = {split: sample_prompts(split, images_per_split, seed) for split in SPLITS}
    sampling = usual_sampling(seed)
    found = accuracies(evaluate(model, prompts, sampling))
    images, captions = training_scenes(seed_of(seed, 1), HELD_OUT_SCENES)
    return {
        "images_per_split": images_per_split,
        "num_steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "eta": sampling.eta,
        "accuracy": {split: {row.name: row.share.value for row in rows} for split, rows in found.items()},
        "vae": vae_quality(model.pipe.vae, channels_first(images), captions),
    }


def vae_quality(vae: AutoencoderKL, images: Tensor, captions: list[str]) -> dict[str, float]:
    """PSNR on scenes, and the share that the verifier accepts before and after the autoencoder."""
    return reconstruction(images, captions, decode(vae, encode(vae, images).mean).cpu())


def reconstruction(images: Tensor, captions: list[str], decoded: Tensor) -> dict[str, float]:
    """The same of uint8 scenes and what an autoencoder of any kind made of them."""
    untouched, after = (verify_all(some, captions) for some in (images / 255, decoded))
    return {
        "psnr_db": psnr(images, decoded),
        "verified": float(np.mean([verdict.holds for verdict in untouched])),
        "verified_after_round_trip": float(np.mean([verdict.holds for verdict in after])),
    }


def evaluate_tokens(folder: Path, images_per_split: int, *, seed: int, device: torch.device) -> dict[str, Any]:
    """Measure a token generator on prompts of each split, and its VQ model on scenes that no training saw."""
    pipe = AmusedPipeline.from_pretrained(str(folder)).to(device)
    prompts = {split: sample_prompts(split, images_per_split, seed) for split in SPLITS}
    sampling = Sampling(seed, num_steps=rpo.shapes.TOKENS_NUM_STEPS, guidance_scale=rpo.shapes.TOKENS_GUIDANCE_SCALE)
    texts = [prompt.text for some in prompts.values() for prompt in some]
    found = accuracies(judge_images(token_images(pipe, texts, sampling), prompts, sampling))
    images, captions = training_scenes(seed_of(seed, 1), HELD_OUT_SCENES)
    scenes = channels_first(images)
    return {
        "images_per_split": images_per_split,
        "num_steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "accuracy": {split: {row.name: row.share.value for row in rows} for split, rows in found.items()},
        "vqvae": reconstruction(scenes, captions, decode_tokens(pipe.vqvae, encode_tokens(pipe.vqvae, scenes)).cpu()),
    }


def token_images(pipe: AmusedPipeline, texts: Sequence[str], sampling: Sampling) -> NDArray[np.uint8]:
    """What the stock pipeline draws for each text, [texts, 64, 64, 3]; every batch has a generator of its own."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(texts), TOKEN_BATCH):
        images += pipe(
            list(texts[start : start + TOKEN_BATCH]),
            num_inference_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            generator=torch.Generator().manual_seed(seed_of(sampling.seed, start)),
        ).images
    return np.stack([np.asarray(image) for image in images])


def evaluate_editor(pipe: StableDiffusionInstructPix2PixPipeline, *, cases: int, seed: int) -> dict[str, Any]:
    """Measure an editor on as many scenes with sentences that training knows as with held-out ones, by task."""
    pipe.set_progress_bar_config(disable=True)
    num_steps = EDIT_SAMPLING["num_inference_steps"]
    result: dict[str, Any] = {"cases": cases, "num_steps": num_steps, **EDIT_SAMPLING, "batch_size": EDIT_BATCH}
    del result["num_inference_steps"]
    for name, is_held_out_only in (("known_sentences", False), ("held_out_sentences", True)):
        drawn = list(islice(triples(seed_of(seed, 7), is_held_out_only=is_held_out_only), cases))
        result[name] = _by_task(drawn, edit_images(pipe, drawn, seed=seed))
    return result


def edit_images(
    pipe: StableDiffusionInstructPix2PixPipeline, drawn: list[EditTriple], *, seed: int
) -> list[Image.Image]:
    """The editor's answer to each triple, each from a generator of its own."""
    images: list[Image.Image] = []
    for start in range(0, len(drawn), EDIT_BATCH):
        batch = drawn[start : start + EDIT_BATCH]
        generators = [torch.Generator().manual_seed(seed_of(seed, start + index)) for index in range(len(batch))]
        sources = [Image.fromarray(render(triple.source)) for triple in batch]
        told = [triple.instruction for triple in batch]
        images += pipe(told, image=sources, generator=generators, **EDIT_SAMPLING).images
    return images


def _by_task(drawn: list[EditTriple], images: list[Image.Image]) -> dict[str, dict[str, float]]:
    total, done, unchanged, both = Counter(), Counter(), Counter(), Counter()
    for triple, image in zip(drawn, images, strict=True):
        verdict = carries_out(render(triple.source), np.asarray(image), triple.instruction)
        for name in (triple.task, "all"):
            total[name] += 1
            done[name] += verdict.is_done
            unchanged[name] += verdict.is_rest_unchanged
            both[name] += verdict.is_done and verdict.is_rest_unchanged
    shares = {"carried_out": both, "is_done": done, "is_rest_unchanged": unchanged}
    return {
        task: {**{name: found[task] / total[task] for name, found in shares.items()}, "cases": total[task]}
        for task in (*EDIT_TASKS, "all")
        if total[task]
    }


def to_pixel_values(images: Tensor) -> Tensor:
    """Images in uint8 as the proxy reads them."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std


def decode_noisy(vae: AutoencoderKL, images: Tensor, seed: int) -> Tensor:
    """What the autoencoder makes of uint8 images after noise of a random strength, as uint8 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    mean = encode(vae, images).mean
    strength = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, generator=generator)
    noise = strength * torch.randn(mean.shape, generator=generator)
    return decode(vae, mean + noise.to(mean)).mul(255).round().to("cpu", torch.uint8)


@dataclass(frozen=True)
class Proxy:
    """A trained proxy, as embeddings of unit length, on the CPU."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    @staticmethod
    def load(folder: Path, device: torch.device) -> "Proxy":
        """Load the folder of a CLIPModel, in float32."""
        model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32)
        return Proxy(model.to(device).eval(), CLIPTokenizer.from_pretrained(str(folder)))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Of uint8 [count, 3, 64, 64]."""
        parts = [to_pixel_values(batch.to(self.model.device)) for batch in images.split(EMBED_BATCH)]
        found = [self.model.get_image_features(pixel_values=part).pooler_output for part in parts]
        return functional.normalize(torch.cat(found), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Of sentences."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.model.device)
        found = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return functional.normalize(found, dim=-1).cpu()


def evaluate_proxy(
    folder: Path, held_out: Families, prompts_per_split: int, *, seed: int, device: torch.device
) -> dict[str, Any]:
    """Measure a proxy on held-out scenes, and on images that the base draws of prompts of each split."""
    proxy, base = Proxy.load(folder, device), Checkpoint.load("shapes", device=device)
    rendered = channels_first(held_out.images)
    forms = {"rendered": rendered, "decoded": decode_noisy(base.pipe.vae, rendered, seed)}
    scenes = {form: scene_accuracy(proxy, images, held_out) for form, images in forms.items()}
    prompts = {split: sample_prompts(split, prompts_per_split, seed) for split in SPLITS}
    sampling = usual_sampling(seed, images_per_prompt=IMAGES_PER_PROMPT, **PROXY_SAMPLING)
    drawn = evaluate(base, prompts, sampling)
    scores = (proxy.embed_images(channels_first(drawn.images)) * proxy.embed_texts(drawn.texts)).sum(-1)
    return {
        "held_out_scenes": {"families": len(held_out.prompts), **scenes},
        "base_images": {"images_per_prompt": IMAGES_PER_PROMPT, **agreements(drawn, scores.double().numpy())},
    }


def scene_accuracy(proxy: Proxy, images: Tensor, families: Families) -> dict[str, float]:
    """Retrieval among all known sentences, and right scenes against near misses; the images are those of `families`."""
    sentences = [prompt.text for prompt in known_prompts()]
    embedded = proxy.embed_images(images)
    best = (embedded @ proxy.embed_texts(sentences).T).argmax(1).tolist()
    is_found = [sentences[first] in right for first, right in zip(best, families.captions, strict=True) if right]
    texts = proxy.embed_texts([prompt.text for prompt in families.prompts])
    scores = (embedded.view(-1, FAMILY_SIZE, embedded.shape[1]) * texts[:, None]).sum(-1)
    return {
        "caption_retrieval": float(np.mean(is_found)),
        "right_above_near_miss": (scores[:, :1] > scores[:, 1:]).double().mean().item(),
        "right_above_all_near_misses": (scores[:, 0] > scores[:, 1:].amax(1)).double().mean().item(),
    }


def agreements(evaluation: ShapesEvaluation, scores: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """For each domain: how scores of its images agree with the verifier."""
    size, table = evaluation.sampling.images_per_prompt, dict[str, dict[str, float]]()
    for domain in dict.fromkeys(evaluation.domains):
        chosen = evaluation.where(domain).reshape(-1, size)
        table[domain] = agreement(scores[chosen], evaluation.holds[chosen], evaluation.scores[chosen])
    return table


def agreement(scores: NDArray[np.float64], holds: NDArray[np.bool_], verified: NDArray[np.float64]) -> dict[str, float]:
    """How scores order the images of each prompt, compared with the verifier; all arguments are [prompts, images].

    Returns:
        `accuracy` of the images; `best_of_n`, that of each prompt's best by score, and `worst_of_n`; `auc_within`, the
        share of right-wrong pairs of one prompt in which the right image scores higher (a tie counts half), and
        `pairs`, their number; `auc`, the same over all prompts; `spearman_within`, the mean over prompts where both
        vary. What has nothing to be measured on is nan.
    """
    within = [_wins(row[right], row[~right]) for row, right in zip(scores, holds, strict=True)]
    wins, pairs = sum(won for won, _ in within), sum(count for _, count in within)
    all_wins, all_pairs = _wins(scores[holds], scores[~holds])
    varying = [row for row in range(len(scores)) if np.ptp(scores[row]) > 0 and np.ptp(verified[row]) > 0]
    correlations = [spearmanr(scores[row], verified[row]).statistic for row in varying]
    rows = np.arange(len(scores))
    return {
        "accuracy": float(holds.mean()),
        "best_of_n": float(holds[rows, scores.argmax(1)].mean()),
        "worst_of_n": float(holds[rows, scores.argmin(1)].mean()),
        "auc_within": wins / pairs if pairs else float("nan"),
        "pairs": pairs,
        "auc": all_wins / all_pairs if all_pairs else float("nan"),
        "spearman_within": float(np.mean(correlations)) if correlations else float("nan"),
    }


def _wins(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> tuple[float, int]:
    """In how many pairs of one of each the right one is higher, and how many pairs there are."""
    above = (right[:, None] > wrong).sum() + 0.5 * (right[:, None] == wrong).sum()
    return float(above), len(right) * len(wrong)
