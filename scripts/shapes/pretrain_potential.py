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
from rpo.reports.charts import Chart, Series, draw_figure
from rpo.shapes.potential import CONFIG, WEIGHTS, PotentialHeads, load_heads
from rpo.shapes.prompts import HELD_OUT, sample_prompts
from rpo.training.loop import LoopConfig
from scripts.shapes.looks import GENERATORS, Looks, draw_looks, joined
from scripts.shapes.networks import draft_of, seeded, write_evaluation
from scripts.shapes.training import from_command_line, seed_of, train

WIDTH, DROPOUT = 128, 0.2
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
    """Images that each generator draws; 500 to 5,000."""
    looks: Count = 6
    """Looks at each before its end; 2 to 10."""
    evaluate: WholeNumber = 192
    """Prompts of each held-out split to measure the result on, for each generator; 0 skips it."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(600, 1e-3, "cosine", 50, weight_decay=0.05, log_every=50, progress=True)
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
    prompts = sample_prompts("train", config.trajectories, config.seed)
    folder, seed = config.output / "looks", seed_of(config.seed, 0)
    drawn = [draw_looks(folder, name, prompts, seed=seed, each=config.looks) for name in GENERATORS]
    data = labelled(joined(drawn))
    is_apart = (torch.arange(len(data.truth)) // (config.looks + 1)) % APART == 0
    learnt, apart = data.select((~is_apart).nonzero().flatten()), data.select(is_apart.nonzero().flatten())
    heads = seeded(config.seed, lambda: PotentialHeads(data.looks.image.shape[1], WIDTH, DROPOUT)).train()
    said = f"{config.trajectories} trajectories of {', '.join(GENERATORS)}, {config.looks} looks"
    train(config.output / "heads", heads, learnt.draw, lambda some: loss_of(heads, some), config.loop, data=said, seed=config.seed)
    temper(heads, apart)
    checkpoint = config.output / "checkpoint"
    save_heads(heads, checkpoint)
    if config.evaluate:
        held_out = {
            split: {
                name: draw_looks(
                    config.output / split,
                    name,
                    sample_prompts(split, config.evaluate, config.seed + 1),
                    seed=seed_of(config.seed, 1 + number),
                )
                for name in GENERATORS
            }
            for number, split in enumerate(HELD_OUT)
        }
        measured = {
            name: measure(load_heads(checkpoint), joined([held_out[split][name] for split in HELD_OUT]))
            for name in GENERATORS
        }
        write_text(checkpoint / "calibration.svg", figure(measured))
        write_evaluation(checkpoint, {"trajectories": config.trajectories, "looks": config.looks, "held_out": measured})


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


def loss_of(heads: PotentialHeads, some: Labelled) -> Tensor:
    """The cross-entropy of each head, a mean over what it is asked about, summed."""
    logits = heads(some.looks.image, some.looks.text, some.looks.time)
    losses = functional.binary_cross_entropy_with_logits(logits, some.truth, reduction="none")
    return ((some.weight * losses).sum(dim=0) / some.weight.sum(dim=0).clamp(min=1)).sum()
