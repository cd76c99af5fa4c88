"""Whether every kind of number and kernel trains, and the quickstart runs: on the embedded checkpoint, few updates.

What a kind computes is held against float32 on the same device: the denoising error of the first update, and the length
of its gradient. A library that is not there, or a kernel that does not run here, is told and left out.
"""

import json
import math
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_parity import coloured_pairs
from gpu_part import Note, Setting

from rpo.adapters.loading import load_model
from rpo.cli.main import main as rpo
from rpo.errors import InputError
from rpo.files.text import lines, read_text
from rpo.models.config import ModelConfig
from rpo.models.execution import xformers_fault
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.settings import AdapterConfig, LearningConfig
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

UPDATES, PAIRS = 3, 4


@dataclass(frozen=True)
class Kind:
    """Settings by which an update differs from that in float32."""

    model: dict[str, Any] = field(default_factory=dict[str, Any])
    learning: dict[str, Any] = field(default_factory=dict[str, Any])
    adapter: dict[str, Any] = field(default_factory=dict[str, Any])
    tolerance: float = 0.1
    """How far error and gradient may be from those of float32, by their size."""


KINDS = {
    "float32": Kind(),
    "bfloat16": Kind({"dtype": "bfloat16"}),
    "float16": Kind({"dtype": "float16"}),
    "mixed bf16": Kind(learning={"mixed_precision": "bf16"}),
    "mixed fp16": Kind(learning={"mixed_precision": "fp16"}),
    "xformers, bfloat16": Kind({"dtype": "bfloat16", "attention": "xformers"}),
    "recomputing": Kind(adapter={"gradient_checkpointing": True}, tolerance=1e-2),
    "8-bit moments": Kind(learning={"optimizer": "adamw8bit"}, tolerance=1e-2),
    "int8 base": Kind({"dtype": "bfloat16", "frozen_base": "int8"}, tolerance=0.3),
    "nf4 base": Kind({"dtype": "bfloat16", "frozen_base": "nf4"}, tolerance=0.5),
    "offloaded base": Kind({"frozen_base": "offload"}, adapter={"gradient_checkpointing": True}, tolerance=1e-2),
}


def kinds(setting: Setting, note: Note) -> None:
    """Train with each."""
    first: dict[str, Any] = {}
    for name, kind in KINDS.items():
        fault = _absent(kind, setting)
        found: dict[str, Any] = {"skipped": fault} if fault else _tried(kind, setting)
        if name == "float32":
            first = found
        if "error" in found and "error" in first:
            gaps = {key: abs(found[key] / first[key] - 1) for key in ("error", "grad_norm")}
            found |= {f"{key}_apart": gap for key, gap in gaps.items()}
            found["is_sound"] = found["is_finite"] and max(gaps.values()) < kind.tolerance
        note(name, found)


def _absent(kind: Kind, setting: Setting) -> str | None:
    if kind.model.get("attention") != "xformers":
        return None
    return xformers_fault(setting.where, getattr(torch, kind.model["dtype"]))


def _tried(kind: Kind, setting: Setting) -> dict[str, Any]:
    try:
        return _trained(kind, setting)
    except InputError as refused:  # which says what is not installed, or not possible on this device
        return {"skipped": str(refused)}
    except Exception as error:
        return {"is_sound": False, "error": f"{type(error).__name__}: {error}"}


def _trained(kind: Kind, setting: Setting) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        learning = {"updates": UPDATES, "micro_batch": PAIRS, "learning_rate": 1e-3, "progress": False}
        config = DPOConfig(
            adapter=AdapterConfig(rank=4, **kind.adapter),
            learning=LearningConfig(**learning | kind.learning),
            pairs_per_update=PAIRS,
            max_chosen_error_ratio=math.inf,
            max_rejected_error_ratio=math.inf,
            preview_every=0,
            preflight=False,
            output=folder,
        )
        model = load_model(ModelConfig(device=setting.device, **kind.model))
        Trainer(model, DPO(coloured_pairs(PAIRS), config)).train()
        lines = read_metrics(Path(folder))
    losses = [line["loop/loss"] for line in lines]
    return {
        "error": lines[0]["dpo/chosen_error"],
        "grad_norm": next((line["loop/grad_norm"] for line in lines if line["loop/grad_norm"]), math.nan),
        "is_finite": all(one is not None and math.isfinite(one) for one in losses),
        "seconds_per_update": lines[-1]["loop/update_seconds"],
    }


SHORT = [
    "curate.source.limit=96",
    "curate.source.images_per_prompt=4",
    "held_out.count=64",
    "dpo.learning.updates=60",
    "dpo.learning.warmup_updates=5",
]

REHEARSED = [
    "curate.source.limit=12",
    "curate.source.images_per_prompt=4",
    "held_out.count=8",
    "dpo.learning.updates=3",
    "dpo.learning.warmup_updates=0",
    "dpo.pairs_per_update=8",
    "dpo.learning.micro_batch=8",
]


def quickstart(setting: Setting, note: Note) -> None:
    """Run `rpo quickstart` in short; too short for its gain to mean much."""
    words = [*(SHORT if setting.on_gpu else REHEARSED), "curate.progress=false", "dpo.learning.progress=false"]
    words += [f"curate.source.model.device={setting.device}"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        note("settings", words)
        code = rpo(["quickstart", *words, f"output={folder}/run"])
        if code != 0:
            raise RuntimeError(f"rpo quickstart ended with {code}; what it said is above")
        note("seconds", time.perf_counter() - started)
        rounds = lines(read_text(Path(folder) / "run/rounds.jsonl"))
        last = json.loads(rounds[-1])
        with suppress(KeyError):
            note("gain", last["gain"])
            note("updates", last["updates"])
