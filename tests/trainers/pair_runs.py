"""Preference runs as small as they can be: eight pairs of two colours, three updates."""

import dataclasses
import math

import numpy as np
import torch

from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.objectives.preference.dpo import Dpo
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.settings import AdapterConfig, LearningConfig
from rpo.trainers.trainer import Trainer
from tests.tiny import tiny_sd


def toy_pairs(count=8, side=64):
    """Chosen images are bright on the left, rejected ones on the right."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side)[None, :, None]
    pairs = []
    for index in range(count):
        noise = generator.normal(0, 8, (2, side, side, 3))
        chosen, rejected = (
            np.clip(image, 0, 255).astype(np.uint8) for image in (255 - ramp + noise[0], ramp + noise[1])
        )
        pairs.append(
            PreferencePair(f"prompt {index % 3}", encode_png(chosen), encode_png(rejected), name=f"pair {index}")
        )
    return pair_set(pairs, origin="toy")


SCORED = pair_set(
    [
        dataclasses.replace(pair, chosen_score=1.0 + 0.1 * index, rejected_score=0.05 * index)
        for index, pair in enumerate(toy_pairs())
    ]
)


def edits(count=8):
    """Noise, and the same noise with one bright patch."""
    generator, pairs = np.random.default_rng(3), []
    for index in range(count):
        source = generator.integers(0, 150, (64, 64, 3), dtype=np.uint8)
        edit = source.copy()
        edit[8:24, 8:24] += 100
        pairs.append(PreferencePair(f"prompt {index % 3}", encode_png(edit), encode_png(source), name=f"pair {index}"))
    return pair_set(pairs)


def config(folder, *, updates=3, learning=None, adapter=None, **changes):
    """Settings of a run; `learning` and `adapter` are what differs in those sections."""
    speed = {"updates": updates, "learning_rate": 1e-2, "progress": False, "micro_batch": 4} | (learning or {})
    settings = {
        "pairs_per_update": 4,
        "max_chosen_error_ratio": math.inf,
        "max_rejected_error_ratio": math.inf,
        "preview_every": 0,
        "preflight": False,
        "learning": LearningConfig(**speed),
        "adapter": AdapterConfig(**{"rank": 4} | (adapter or {})),
    }
    return DPOConfig(output=str(folder), **settings | changes)


def trainer_of(folder, *, pipe=None, pairs=None, objective=None, **changes):
    settings = config(folder, objective=objective or Dpo(), **changes)
    return Trainer(pipe or tiny_sd(), DPO(pairs or toy_pairs(), settings))


def steady(trainer):
    """The trainer with a large eps, which keeps Adam from blowing rounding of near-zero gradients up to whole steps."""
    trainer.loop = dataclasses.replace(trainer.loop, adam_eps=1e-3)
    return trainer


def counting(calls):
    """A watcher of forwards of the denoiser."""
    return lambda pipe: pipe.unet.register_forward_pre_hook(lambda *_: calls.update(forwards=1))


def trained(folder, *, resume=False, watch=None, **changes):
    trainer = trainer_of(folder, **changes)
    if watch is not None:
        watch(trainer.run.model.pipe)
    trainer.train(resume=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.run.policy.parameters])
