"""Images of shapes prompts with the verdict on each, and what follows: accuracies, and the gain of a second model.

No model is needed here: images that lie on a disk are judged just as well as fresh ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rpo.errors import InputError
from rpo.evaluation.comparison import Accuracy, Comparison, accuracy, accuracy_by, compare, compare_by
from rpo.shapes import ETA, GUIDANCE_SCALE, NUM_STEPS
from rpo.shapes.prompts import KINDS, Prompt, PromptKind
from rpo.shapes.verifier import Verdict, verify
from rpo.types import Images


@dataclass(frozen=True)
class Sampling:
    """Everything besides the model and the prompts that determines the images."""

    seed: int
    images_per_prompt: int = 1
    num_steps: int = NUM_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    eta: float = ETA
    solver: Literal["ddim", "dpm_solver"] = "ddim"
    spacing: Literal["checkpoint", "uniform"] = "checkpoint"


@dataclass(frozen=True)
class ShapesEvaluation:
    """One model's images of a list of prompts, and the verdict on each; images of one prompt lie beside each other."""

    prompts: tuple[Prompt, ...]
    """One per image."""
    domains: tuple[str, ...]
    """One per image: the split its prompt is from."""
    images: NDArray[np.uint8]
    """[images, 64, 64, 3], exactly what the verifier judged."""
    verdicts: tuple[Verdict, ...]
    sampling: Sampling

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Whether each image shows what its prompt asks for."""
        return np.array([verdict.holds for verdict in self.verdicts], bool)

    @property
    def scores(self) -> NDArray[np.float64]:
        """How nearly, from 0 to 1."""
        return np.array([verdict.score for verdict in self.verdicts], np.float64)

    @property
    def texts(self) -> list[str]:
        """The prompt of every image, which is what images resemble each other by."""
        return [prompt.text for prompt in self.prompts]

    def where(self, domain: str) -> NDArray[np.intp]:
        """Indices of the images of one domain."""
        return np.flatnonzero(np.asarray(self.domains) == domain)


def judge_images(
    images: NDArray[np.uint8], prompts_by_domain: Mapping[str, Sequence[Prompt]], sampling: Sampling
) -> ShapesEvaluation:
    """Judge images that are there already, in the order in which `evaluate` draws them.

    Args:
        images: [images, 64, 64, 3], those of one prompt beside each other.
    """
    repeats = range(sampling.images_per_prompt)
    pairs = [(prompt, domain) for domain, some in prompts_by_domain.items() for prompt in some for _ in repeats]
    if len(images) != len(pairs):
        raise InputError(
            f"got {len(images)} images for {len(pairs) // len(repeats)} prompts with {len(repeats)} images each, which "
            f"makes {len(pairs)}; give the images of exactly these prompts, in their order"
        )
    verdicts = tuple(verify(image, prompt) for image, (prompt, _) in zip(images, pairs, strict=True))
    prompts, domains = tuple(prompt for prompt, _ in pairs), tuple(domain for _, domain in pairs)
    return ShapesEvaluation(prompts, domains, images, verdicts, sampling)


def to_pixels(images: Images) -> NDArray[np.uint8]:
    """Float images [n, 3, h, w] in [0, 1] as the bytes [n, h, w, 3] that a PNG holds."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def accuracies(evaluation: ShapesEvaluation) -> dict[str, list[Accuracy]]:
    """For each domain: all prompts together, then by kind."""
    table: dict[str, list[Accuracy]] = {}
    for domain in dict.fromkeys(evaluation.domains):
        order = _by_kind(evaluation, domain)
        holds, kinds, texts = _columns(evaluation, order)
        total = Accuracy("all", len(holds), len(set(texts)), accuracy(holds, groups=texts))
        table[domain] = [total, *accuracy_by(holds, kinds, groups=texts)]
    return table


def comparisons(before: ShapesEvaluation, after: ShapesEvaluation, *, seed: int = 0) -> dict[str, list[Comparison]]:
    """For each domain: the gain over all prompts together, then by kind.

    Args:
        after: Of the second, on the same prompts with the same sampling.
    """
    check_comparable(before, after)
    table: dict[str, list[Comparison]] = {}
    for domain in dict.fromkeys(before.domains):
        order = _by_kind(before, domain)
        holds, kinds, texts = _columns(before, order)
        holds_after = after.holds[order]
        total = compare("all", holds, holds_after, groups=texts, seed=seed)
        table[domain] = [total, *compare_by(holds, holds_after, kinds, groups=texts, seed=seed)]
    return table


def check_comparable(before: ShapesEvaluation, after: ShapesEvaluation) -> None:
    """Refuse to compare images that differ in more than the model."""
    if before.sampling != after.sampling:
        raise InputError(
            f"before was drawn with {before.sampling} and after with {after.sampling}, but a paired gain needs the "
            "same noise for both; evaluate both with one Sampling"
        )
    if before.prompts != after.prompts or before.domains != after.domains:
        raise InputError(
            f"before has {len(before.prompts)} images and after {len(after.prompts)}, and their prompts differ, but a "
            "paired gain compares image by image; evaluate both on one list of prompts"
        )


def readable(domain: str) -> str:
    """The name of a domain as people write it: "out_of_domain" is "out-of-domain"."""
    return domain.replace("_", "-")


def _by_kind(evaluation: ShapesEvaluation, domain: str) -> list[int]:
    """Images of one domain, sorted by kind, so that tables list the kinds in their usual order."""
    ranks: dict[PromptKind, int] = {kind: rank for rank, kind in enumerate(KINDS)}
    return sorted(evaluation.where(domain).tolist(), key=lambda index: ranks[evaluation.prompts[index].kind])


def _columns(evaluation: ShapesEvaluation, order: Sequence[int]) -> tuple[NDArray[np.bool_], list[str], list[str]]:
    prompts = [evaluation.prompts[index] for index in order]
    return evaluation.holds[order], [prompt.kind for prompt in prompts], [prompt.text for prompt in prompts]
