"""How good the words checkpoint is; what is measured is the folder on disk, as a user gets it.

By split and guidance: the share of images that the judge reads as asked. What RapidOCR makes of the same images, where
it is installed. And what the autoencoder loses of words.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import rpo.words
from rpo.data.pixels import to_pixels
from rpo.evaluation.held_out import Sampling
from rpo.models.checkpoint import Checkpoint
from rpo.rewards.ocr import OCR
from rpo.words.prompts import Split, prompt_of, sample_words
from rpo.words.reader import read_word
from rpo.words.reward import JUDGE
from rpo.words.world import training_images
from scripts.shapes.training import seed_of
from scripts.shapes.vae import channels_first, decode, encode, psnr

SPLITS: tuple[Split, ...] = ("train", "in_domain", "out_of_domain")
GUIDANCES = (1.0, 2.0, 3.0)
HELD_OUT_IMAGES = 512


def evaluate_checkpoint(folder: Path, count: int, *, seed: int, device: torch.device | str) -> dict[str, Any]:
    """Measure a checkpoint on `count` words of each split."""
    model = Checkpoint.load(folder, device=device)
    found: dict[str, Any] = {"images_per_split": count, "num_steps": rpo.words.NUM_STEPS, "eta": rpo.words.ETA}
    found |= {"guidance_scale": rpo.words.GUIDANCE_SCALE, "accuracy": {}, "ocr_reward": {}}
    for split in SPLITS:
        prompts = [prompt_of(word) for word in sample_words(split, count, seed)]
        found["accuracy"][split] = {}
        for guidance in GUIDANCES:
            sampling = Sampling(seed, num_steps=rpo.words.NUM_STEPS, guidance_scale=guidance, eta=rpo.words.ETA)
            images = sampling.draw(model, prompts, batch_size=64)
            found["accuracy"][split][f"guidance {guidance:g}"] = round(JUDGE(images, prompts).mean().item(), 4)
            if guidance == rpo.words.GUIDANCE_SCALE and find_spec("rapidocr"):
                found["ocr_reward"][split] = round(OCR(images, prompts).mean().item(), 4)
    return found | {"vae": vae_quality(model.pipe.vae, HELD_OUT_IMAGES, seed=seed_of(seed, 1))}


def vae_quality(vae: Any, count: int, *, seed: int) -> dict[str, float]:
    """PSNR on words, and the share that the judge and the OCR model read right after the autoencoder."""
    drawn, captions = training_images(seed, count, mistakes=0.0)
    images = channels_first(drawn)
    decoded = decode(vae, encode(vae, images).mean).cpu()
    read = [read_word(pixels).word for pixels in to_pixels(decoded)]
    right = [prompt_of(word) == caption for word, caption in zip(read, captions, strict=True)]
    found = {"psnr_db": psnr(images, decoded), "judged_after_round_trip": sum(right) / count}
    if find_spec("rapidocr"):
        found["ocr_after_round_trip"] = (OCR(decoded, captions) == 1).double().mean().item()
    return {name: round(value, 4) for name, value in found.items()}
