"""What the package computes today, run by run, so that a change of its form can be told from a change of its results.

    python -m tests.golden.traces write                    # traces.json: numbers that hold on every machine, to 1e-3
    python -m tests.golden.traces write --only keys        # ... the keys of all commands, and all else as it was
    python -m tests.golden.traces record FILE              # digests that hold to the bit, on this machine only
    python -m tests.golden.traces compare FILE             # ... and which of them are others now

Before code is moved, record; afterwards, compare. A trace is three updates on a tiny pipeline by one algorithm and
objective, the lines of a small curation, the bytes of a saved LoRA, or the keys of a command.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.cli.main import COMMANDS
from rpo.config.load import load_config
from rpo.config.settings import describe_fields
from rpo.curation.curate import curate
from rpo.curation.curate_config import CurateConfig
from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, read_marks
from rpo.curation.store.shard import load
from rpo.objectives.preference.region import RegionConfig
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.value import network, returns
from rpo.trainers.value.settings import ValueConfig
from tests.run_state import metrics_of
from tests.trainers.online_runs import endpoint, grpo, learning, lightness, score_as_action
from tests.trainers.pair_runs import SCORED, edits, trainer_of

FILE = Path(__file__).with_name("traces.json")
UPDATES = 3
TOLERANCE = 1e-3

Trace = Callable[[Path], dict[str, Any]]
"""What a run in that folder gave: numbers, lists, texts and bytes, by name."""


def trained(trainer: Any) -> dict[str, Any]:
    """The weights and every logged number, after training."""
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.run.policy.parameters])
    return {"weights": weights, "metrics": metrics_of(trainer.folder)}


def preference(folder: Path, words: str = "", pairs: Any = SCORED, **changes: Any) -> dict[str, Any]:
    """DPO by the objective of these words."""
    objective = load_config(DPOConfig, None, [f"objective.{word}" for word in words.split()]).objective
    return trained(trainer_of(folder, pairs=pairs, objective=objective, updates=UPDATES, **changes))


def online(folder: Path, make: Callable[..., Any], **changes: Any) -> dict[str, Any]:
    """An algorithm that draws, with these settings, and a value that is small and little trained."""
    kept, returns.PRETRAIN_UPDATES, network.CHANNELS = (returns.PRETRAIN_UPDATES, network.CHANNELS), 2, 8
    try:
        return trained(make(folder, **{"learning": learning(UPDATES), "reward": lightness} | changes))
    finally:
        returns.PRETRAIN_UPDATES, network.CHANNELS = kept


def saved(folder: Path) -> dict[str, Any]:
    """A LoRA's file, and the model card beside it."""
    trainer = trainer_of(folder / "run", pairs=SCORED, updates=1)
    trainer.train()
    place = trainer.save(folder / "lora")
    return {"file": (place / WEIGHT_FILE).read_bytes(), "files": sorted(path.name for path in place.iterdir())}


def curated(folder: Path) -> dict[str, Any]:
    """What every stage of a small curation on `shapes` says, and its images."""
    words = ["source.limit=3", "source.images_per_prompt=2", "source.num_steps=4", "progress=false"]
    words += ["source.guidance_scale=2.0", "source.eta=1.0"]
    curate(load_config(CurateConfig, None, [*words, f"output={folder}"]))
    lines: dict[str, list[str]] = {stage: [] for stage in STAGES}
    images = set[str]()
    for mark in read_marks(Store(folder)):
        shard = load(Store(folder), mark, len(STAGES))
        images |= shard.images.keys()
        for stage, rows in shard.rows.items():
            lines[stage] += [json.dumps({"id": record, **row}) for record, row in rows.items()]
    return {"lines": lines, "images": sorted(images)}


def keys(_: Path) -> dict[str, Any]:
    """Every setting of every command, with its default."""
    places = {name: command.config.split(":") for name, command in COMMANDS.items() if command.config}
    classes = {name: getattr(import_module(module), cls) for name, (module, cls) in places.items()}
    return {name: [f"{one.key}: {one.default}" for one in describe_fields(cls)] for name, cls in classes.items()}


OBJECTIVES = (
    "link=cauchy",
    "label_smoothing=0.1",
    "normalization=time",
    "normalization=weights time_weights=[0,1,1,0.5]",
    "margin=0.5",
    "margin_from=time",
    "margin_from=rewards",
    "margin=0.4 margin_mixed=true reference_weight=0.25",
    "reference_weight=0 margin=0.5",
    "context=scores",
    "context=reference",
    "winner_preserving=0.9",
    "kind=kto",
    "kind=mapo",
)
BENT = ("link=ipo", "link=hinge", "link=square_hinge", "link=linear")
FAR = "beta=5000"
"""A beta by which these links, straight or alike near 0, are told apart."""
SEVERAL = {"steps": StepsConfig(passes=2)}
PATHWISE = {"estimator": "pathwise", "value": ValueConfig(uses_reward=False, sees_latents=True, updates=2)}
OF_V = {"value": ValueConfig(updates=2, pretrain_rollouts=1)}

TRACES: dict[str, Trace] = {
    "dpo": preference,
    **{f"dpo {words}": partial(preference, words=words) for words in OBJECTIVES},
    **{f"dpo {words}": partial(preference, words=f"{words} {FAR}") for words in BENT},
    "dpo sft": partial(preference, words="sft_weight=0.2"),
    "dpo region": partial(preference, pairs=edits(), region=RegionConfig()),
    "grpo": partial(online, make=grpo),
    "grpo kl": partial(online, make=grpo, kl_weight=0.1),
    "grpo several": partial(online, make=grpo, **SEVERAL),
    "ddpo": partial(online, make=grpo, baseline="prompt_history", scale="group"),
    "score-as-action": partial(online, make=score_as_action),
    "score-as-action state cost": partial(
        online, make=score_as_action, estimator="likelihood_state_cost", kl_weight=1.0
    ),
    "score-as-action clip": partial(online, make=score_as_action, update="clip", **SEVERAL),
    "score-as-action trust region": partial(online, make=score_as_action, update="trust_region", **SEVERAL),
    "score-as-action value": partial(online, make=score_as_action, advantage="return_minus_value", **OF_V),
    "score-as-action pathwise": partial(online, make=score_as_action, **PATHWISE),
    "endpoint": partial(online, make=endpoint),
    "endpoint kl": partial(online, make=endpoint, kl_weight=0.1),
    "endpoint value": partial(online, make=endpoint, baseline="value"),
    "lora": saved,
    "curation": curated,
    "keys": keys,
}
"""Each algorithm by each of its objectives and estimators."""


def digest(found: Any) -> str:
    """Equal where everything is, to the bit."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.numpy().tobytes()).hexdigest()
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)

    return hashlib.sha256(json.dumps(found, default=plain, sort_keys=True).encode()).hexdigest()


def portable(found: dict[str, Any]) -> dict[str, Any]:
    """What holds on another processor too: numbers to a tolerance, and no bytes that were computed."""
    if "weights" in found:
        weights = found["weights"].double()
        places = torch.arange(len(weights), dtype=torch.float64)
        norm = weights.norm().item()
        # Rounding moves each weight by as much as it does, however little of them all a direction sees.
        directions = [(weights @ torch.cos(places * pace)).item() / norm for pace in (0.1, 1.0, 2.5)]
        last = {name: value for name, value in found["metrics"][-1].items() if isinstance(value, float)}
        return {"norm": norm, "directions": directions, "metrics": last}
    if "lines" in found:
        return {"lines": {name: len(lines) for name, lines in found["lines"].items()}, "images": len(found["images"])}
    return {name: value for name, value in found.items() if not isinstance(value, bytes)}


def trace(name: str) -> dict[str, Any]:
    """The trace of that name, made now."""
    with tempfile.TemporaryDirectory() as folder:
        return TRACES[name](Path(folder))


def main() -> None:
    """Write, record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "record", "compare"])
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--only", nargs="+", choices=TRACES, default=list(TRACES), help="these traces alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: trace(name) for name in args.only}
    if args.action == "write":
        known = json.loads(args.file.read_text()) if args.file.exists() else {}
        now = known | {name: portable(one) for name, one in found.items()}
        args.file.write_text(json.dumps({name: now[name] for name in TRACES if name in now}, indent=1) + "\n")
        return
    digests = {name: digest(one) for name, one in found.items()}
    if args.action == "record":
        args.file.write_text(json.dumps(digests, indent=1) + "\n")
        return
    before = json.loads(args.file.read_text())
    changed = [name for name in digests if digests[name] != before.get(name)]
    print("\n".join([f"{len(digests) - len(changed)} of {len(digests)} are as they were", *changed]))
    raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
