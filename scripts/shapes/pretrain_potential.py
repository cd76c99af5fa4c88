"""Train the judge of images on their way: `python -m scripts.shapes.pretrain_potential`. See `rpo.shapes.potential`.

Both generators of the world draw images of training prompts, each is looked at after some of its steps and at its end
(`scripts.shapes.looks`), and three heads learn from what the verifier says of the finished image, by cross-entropy:

    clear      whether the verifier says of the look what it says of the finished image; a look weighs ½ / P, with P how
               often images of this generator and kind of prompt end as this one did, so that luck is worth ½
    potential  whether the finished image is right
    best       the same, at the finished images alone

One part in `APART` of the trajectories is kept from the heads to fit one number for each of them, by which its logits
are multiplied: the confidence that the heads would otherwise have too much of. What is measured at the end is how true
the probabilities are, by time, on prompts that neither the generators' fine-tuning nor the heads have seen.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional

from rpo.config.ranges import Count, Seed, WholeNumber
from rpo.config.settings import settings
from rpo.files.text import write_text
from rpo.files.whole import replace_folder
from rpo.sampling.stepwise import CLEAR
from rpo.shapes.potential import CONFIG, WEIGHTS, PotentialHeads, load_heads
from rpo.shapes.prompts import HELD_OUT, sample_prompts
from rpo.training.loop import LoopConfig
from scripts.shapes.looks import GENERATORS, Looks, draw_looks, joined
from scripts.shapes.networks import draft_of, seeded, write_evaluation
from scripts.shapes.training import from_command_line, seed_of, train

WIDTH, DROPOUT = 128, 0.3
BATCH = 256
APART = 8
TIMES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Lower ends of the times by which the judge is measured; the last are the finished images."""


@settings
class PretrainPotentialConfig:
    """Everything that a run depends on."""

    output: Path = Path("runs/shapes-potential")
    """The looks and the training, which go on after a kill, and the finished folder `checkpoint`."""
    seed: Seed = 0
    """Determines prompts, noise, looks, initial weights and batches."""
    trajectories: Count = 1280
    """Images that `shapes` draws; 500 to 5,000."""
    token_trajectories: Count = 640
    """Images that `shapes-tokens` draws, which takes three times as long."""
    looks: Count = 6
    """Looks at each before its end; 2 to 10."""
    evaluate: WholeNumber = 128
    """Prompts of each held-out split to measure the result on, for each generator; 0 skips it."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(1000, 1e-3, "cosine", 50, weight_decay=1.0, log_every=50)
    )
    """How the heads are trained."""


@dataclass(frozen=True)
class Labelled:
    """Looks with what is to be said of each."""

    looks: Looks
    truth: Tensor
    """[looks, 3], 0 or 1: of clear, potential and best."""
    weight: Tensor
    """[looks, 3]: how much each counts, 0 where a head is not asked."""

    def draw(self, generator: torch.Generator, size: int = BATCH) -> "Labelled":
        """Draw looks at random."""
        return self.select(torch.randint(len(self.truth), (size,), generator=generator))

    def select(self, rows: Tensor) -> "Labelled":
        """Some of them."""
        return Labelled(self.looks.select(rows), self.truth[rows], self.weight[rows])


def pretrain_potential(config: PretrainPotentialConfig) -> None:
    """Train, save and measure the judge."""
    folder, seed = config.output / "looks", seed_of(config.seed, 0)
    counts = dict(zip(GENERATORS, (config.trajectories, config.token_trajectories), strict=True))
    drawn = [
        draw_looks(folder, name, sample_prompts("train", count, config.seed), seed=seed, each=config.looks)
        for name, count in counts.items()
    ]
    data = labelled(joined(drawn))
    is_apart = (torch.arange(len(data.truth)) // (config.looks + 1)) % APART == 0
    learnt, apart = data.select((~is_apart).nonzero().flatten()), data.select(is_apart.nonzero().flatten())
    heads = seeded(config.seed, lambda: PotentialHeads(data.looks.image.shape[1], WIDTH, DROPOUT)).train()
    said = ", ".join(f"{count} of {name}" for name, count in counts.items()) + f", {config.looks} looks"
    train(
        config.output / "heads",
        heads,
        learnt.draw,
        lambda some: loss_of(heads, some),
        config.loop,
        data=said,
        seed=config.seed,
    )
    temper(heads, apart)
    checkpoint = config.output / "checkpoint"
    save_heads(heads, checkpoint)
    if config.evaluate:
        measured = {name: measure(load_heads(checkpoint), held_out_looks(config, name)) for name in GENERATORS}
        write_evaluation(checkpoint, {"trajectories": counts, "looks": config.looks, "held_out": measured})


def held_out_looks(config: PretrainPotentialConfig, name: str) -> Looks:
    """All steps of a generator on prompts of both held-out splits."""
    parts = list[Looks]()
    for number, split in enumerate(HELD_OUT):
        prompts = sample_prompts(split, config.evaluate, config.seed + 1)
        parts.append(draw_looks(config.output / split, name, prompts, seed=seed_of(config.seed, 1 + number)))
    return joined(parts)


def labelled(looks: Looks) -> Labelled:
    """What is to be said of looks, and how much it counts."""
    is_end, is_right = looks.time == 0, looks.is_right.float()
    ends = looks.select(is_end.nonzero().flatten())
    balance = torch.zeros_like(is_right)
    for source in range(len(GENERATORS)):
        for kind in ends.kind.unique():
            here = (looks.source == source) & (looks.kind == kind)
            ended = ends.is_right[(ends.source == source) & (ends.kind == kind)].float()
            if here.any():
                share = torch.where(looks.is_right[here], ended.mean(), 1 - ended.mean())
                balance[here] = 0.5 / share
    agrees = (looks.says_right == looks.is_right).float()
    truth = torch.stack([agrees, is_right, is_right], dim=1)
    return Labelled(looks, truth, torch.stack([balance * ~is_end, torch.ones_like(balance), is_end.float()], dim=1))


def heads_on(heads: PotentialHeads, looks: Looks) -> Tensor:
    """The logits of looks."""
    return heads(looks.image, looks.text, looks.time, looks.source)


def loss_of(heads: PotentialHeads, some: Labelled) -> Tensor:
    """The cross-entropy of each head, a mean over what it is asked about, summed."""
    logits = heads_on(heads, some.looks)
    losses = functional.binary_cross_entropy_with_logits(logits, some.truth, reduction="none")
    return ((some.weight * losses).sum(dim=0) / some.weight.sum(dim=0).clamp(min=1)).sum()


@torch.no_grad()
def temper(heads: PotentialHeads, apart: Labelled) -> None:
    """Multiply the logits of each head by what makes them likeliest on looks that they have not learnt from."""
    logits = heads_on(heads, apart.looks)
    factors = torch.linspace(0.2, 2.0, 91)
    losses = functional.binary_cross_entropy_with_logits(
        factors[:, None, None] * logits, apart.truth.expand(len(factors), -1, -1), reduction="none"
    )
    best = factors[(apart.weight * losses).sum(dim=1).argmin(dim=0)]
    last = heads.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.mul_(best[:, None])
    last.bias.mul_(best)


def save_heads(heads: PotentialHeads, folder: Path) -> None:
    """Write weights in half precision, and what they are to be put into; an existing folder is replaced in one move."""
    draft = draft_of(folder)
    draft.mkdir(parents=True)
    write_text(draft / CONFIG, json.dumps({"dims": heads.dims, "width": heads.width}) + "\n")
    save_file({name: value.half().contiguous() for name, value in heads.state_dict().items()}, draft / WEIGHTS)
    (draft / WEIGHTS).chmod(0o644)  # safetensors leaves it readable by its owner alone
    replace_folder(draft, folder)


@torch.no_grad()
def measure(heads: PotentialHeads, looks: Looks) -> list[dict[str, Any]]:
    """How true the heads are by time, on looks of one generator.

    Returns:
        A row for each time of `TIMES`: its looks; the share that is called clear; and the `Truth` of each head that is
        asked, as a dictionary.
    """
    data, said = labelled(looks), heads_on(heads, looks).sigmoid()
    rows, high = list[dict[str, Any]](), float("inf")
    for low in TIMES:
        here = (looks.time >= low) & (looks.time < high) if low else looks.time == 0
        high = low
        heads_asked = {"clear": 0, "potential": 1} if low else {"best": 2}
        row: dict[str, Any] = {
            "from": low,
            "looks": int(here.sum()),
            "clear_share": float((said[here, 0] >= CLEAR).float().mean()),
        }
        for name, head in heads_asked.items():
            row[name] = truth_of(said[here, head], data.truth[here, head], data.weight[here, head])
        score = (looks.image * looks.text).sum(dim=1)
        row["auc_of_clip"] = auc(score[here], data.truth[here, 1])
        rows.append(row)
    return rows


def truth_of(said: Tensor, truth: Tensor, weight: Tensor) -> dict[str, Any]:
    """How probabilities agree with what came out.

    Returns:
        `said` and `true`, means; `error`, the mean gap between the two within tenths of what is said; `tenths`, what
        they are in each of these, with its share of the looks; `auc`, see `auc`.
    """
    tenth, total = (10 * said).long().clamp(max=9), weight.sum()
    tenths = list[dict[str, float]]()
    for one in tenth.unique():
        own = weight * (tenth == one)
        mean = lambda values, own=own: float((own * values).sum() / own.sum())  # noqa: E731
        if own.sum() > 0:
            tenths.append({"share": float(own.sum() / total), "said": mean(said), "true": mean(truth)})
    return {
        "said": float((weight * said).sum() / total),
        "true": float((weight * truth).sum() / total),
        "error": sum(one["share"] * abs(one["said"] - one["true"]) for one in tenths),
        "auc": auc(said, truth),
        "tenths": tenths,
    }


def auc(said: Tensor, truth: Tensor) -> float:
    """How often of one that is right and one that is not the right one is scored higher; nan where one is lacking."""
    is_right: NDArray[np.bool_] = truth.numpy() > 0
    right, wrong = int(is_right.sum()), int((~is_right).sum())
    ranks = rankdata(said.numpy())[is_right].sum() - right * (right + 1) / 2
    return float(ranks / (right * wrong)) if right and wrong else float("nan")


if __name__ == "__main__":
    pretrain_potential(from_command_line(PretrainPotentialConfig, __doc__))
