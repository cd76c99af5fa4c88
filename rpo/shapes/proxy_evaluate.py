"""How far the proxy reward can be trusted: on scenes with known truth, and on what the base draws.

On held-out scenes: does the right caption come first among all known ones, and is a right scene scored above a near
miss of the same layout? On images of the base, against the verifier: of two images of one prompt, one that holds and
one that does not, how often is the right one scored higher (AUC), how do the orders agree (Spearman), and how often
does the best of n by proxy hold?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

import rpo.shapes
from rpo.models.checkpoint import Checkpoint
from rpo.shapes.evaluate import evaluate
from rpo.shapes.evaluation import Sampling, ShapesEvaluation
from rpo.shapes.pretrain_evaluate import SPLITS, to_channels_first
from rpo.shapes.prompts import sample_prompts
from rpo.shapes.proxy_data import decode_noisy, to_pixel_values
from rpo.shapes.proxy_scenes import FAMILY_SIZE, Families, known_prompts

EMBED_BATCH = 128


@dataclass(frozen=True)
class Proxy:
    """A trained proxy, as embeddings of unit length."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    @staticmethod
    def load(folder: Path, device: torch.device) -> "Proxy":
        """Load the folder that `save_proxy` wrote, in float32."""
        model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32)
        return Proxy(model.to(device).eval(), CLIPTokenizer.from_pretrained(str(folder)))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Of uint8 [count, 3, 64, 64], on the CPU."""
        parts = [to_pixel_values(batch.to(self.model.device)) for batch in images.split(EMBED_BATCH)]
        found = [self.model.get_image_features(pixel_values=part).pooler_output for part in parts]
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Of sentences, on the CPU."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.model.device)
        found = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return torch.nn.functional.normalize(found, dim=-1).cpu()


def evaluate_proxy(
    folder: Path,
    *,
    seed: int,
    held_out: Families,
    prompts_per_split: int,
    images_per_prompt: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measure the proxy in `folder`.

    Args:
        prompts_per_split: How many prompts of each split the base draws; 0 skips it.

    Returns:
        What `format_proxy` shows, as plain numbers that JSON can hold.
    """
    proxy = Proxy.load(folder, device)
    result: dict[str, Any] = {}
    if held_out.prompts:
        rendered = to_channels_first(held_out.images)
        vae = AutoencoderKL.from_pretrained(str(rpo.shapes.path()), subfolder="vae").to(device)
        decoded = decode_noisy(vae, rendered, seed)
        result["held_out_scenes"] = {
            "families": len(held_out.prompts),
            "rendered": scene_accuracy(proxy, rendered, held_out),
            "decoded": scene_accuracy(proxy, decoded, held_out),
        }
    if prompts_per_split:
        model = Checkpoint.load("shapes", device=str(device))
        prompts = {split: sample_prompts(split, prompts_per_split, seed) for split in SPLITS}
        drawn = evaluate(
            model, prompts, Sampling(seed, images_per_prompt=images_per_prompt, guidance_scale=3.0, eta=0.0)
        )
        images = proxy.embed_images(to_channels_first(drawn.images))
        scores = (images * proxy.embed_texts(drawn.texts)).sum(-1).double().numpy()
        result["base_images"] = {"images_per_prompt": images_per_prompt, **agreements(drawn, scores)}
    return result


def scene_accuracy(proxy: Proxy, images: Tensor, families: Families) -> dict[str, float]:
    """Retrieval among all known sentences, and right scenes against near misses.

    Args:
        images: uint8 [count, 3, 64, 64], those of `families` in some form.
    """
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
    per_prompt = evaluation.sampling.images_per_prompt
    table: dict[str, dict[str, float]] = {}
    for domain in dict.fromkeys(evaluation.domains):
        chosen = evaluation.where(domain)
        table[domain] = agreement(
            scores[chosen].reshape(-1, per_prompt),
            evaluation.holds[chosen].reshape(-1, per_prompt),
            evaluation.scores[chosen].reshape(-1, per_prompt),
        )
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


def format_proxy(evaluation: Mapping[str, Any]) -> str:
    """The numbers of `evaluate_proxy` for the terminal."""
    lines: list[str] = []
    for form in ("rendered", "decoded") if "held_out_scenes" in evaluation else ():
        numbers = evaluation["held_out_scenes"][form]
        lines.append(
            f"held-out scenes, {form}: right caption first {_percent(numbers['caption_retrieval'])}, right scene above "
            f"a near miss {_percent(numbers['right_above_near_miss'])}"
        )
    for domain in SPLITS if "base_images" in evaluation else ():
        numbers = evaluation["base_images"][domain]
        lines.append(
            f"base's images, {domain}: accuracy {_percent(numbers['accuracy'])}, best of n "
            f"{_percent(numbers['best_of_n'])}; within a prompt AUC {numbers['auc_within']:.3f}, Spearman "
            f"{numbers['spearman_within']:.2f}"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
