"""What choosing at test time buys on `shapes`: accuracy against denoiser evaluations and seconds, the judge included.

    python benchmarks/selection.py                               # all ways, three seeds; table and figure
    python benchmarks/selection.py --lora runs/quickstart/lora   # beside them an aligned LoRA, chosen from or not
    python benchmarks/selection.py report                        # from what is finished

Every way draws 100 held-out prompts of each domain at guidance 2. The judge that chooses is the learned `shapes-clip`;
the verifier, which nobody asks while choosing, says what is right. Seconds are those of one core, the judge's and the
decoder's among them. One seed takes about 20 minutes of one core.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import read, write
from objectives_judge import pack, unpack

from rpo import shapes
from rpo.adapters.lora import load_lora
from rpo.curation.components import load_critic, load_instructor
from rpo.curation.correct import SelfCorrection
from rpo.curation.curate_config import ChatConfig, EditorConfig
from rpo.evaluation.intervals import paired_gain
from rpo.files.text import write_text
from rpo.models.checkpoint import Checkpoint
from rpo.reports.charts import Chart, Series, draw_figure
from rpo.rewards import load_reward, score
from rpo.sampling.sample import generate
from rpo.sampling.select import How, Selected, best_of_n, by_drafts, corrected
from rpo.sampling.stepwise import by_pruning
from rpo.shapes.editor import shapes_editor
from rpo.shapes.prompts import held_out_texts
from rpo.shapes.reward import STRICT
from rpo.types import Images, PerSample

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "selection.json", HERE / "selection.svg"
PROMPTS = 100
N = 8
EDIT_BRANCHES = 3
"""Latents of a step of an edit: with instruction and image, with the image alone, with neither."""

ANCESTRAL, ODE = How(20, 2.0, eta=1.0), How(20, 2.0, eta=0.0)
Way = Callable[[Checkpoint, Sequence[str], How], Selected]


def judge(images: Images, prompts: Sequence[str]) -> PerSample:
    """What chooses."""
    return score(load_reward("shapes-clip"), images, prompts, name="shapes-clip")


def best(model: Checkpoint, prompts: Sequence[str], how: How, *, n: int) -> Selected:
    """The best of n."""
    return best_of_n(model, prompts, judge, n, how)


def drafts(model: Checkpoint, prompts: Sequence[str], how: How, *, n: int, steps: int) -> Selected:
    """The best draft, in full."""
    return by_drafts(model, prompts, judge, n, how, draft_steps=steps)


def pruned(model: Checkpoint, prompts: Sequence[str], how: How, *, n: int, stages: dict[int, int]) -> Selected:
    """What is left of n."""
    return by_pruning(model, prompts, judge, n, how, stages=stages)


def one_image(model: Checkpoint, prompts: Sequence[str], how: How) -> Selected:
    """The first image of each prompt, which nobody chose."""
    images = generate(
        model,
        prompts,
        seed=how.seed,
        num_steps=how.num_steps,
        guidance_scale=how.guidance_scale,
        eta=how.eta,
        batch_size=how.batch_size,
    )
    nothing = torch.zeros(len(prompts))
    return Selected(images, nothing.long(), nothing, 2 * how.num_steps * len(prompts), 0)


def corrector() -> SelfCorrection:
    """The critic of `shapes` sees with the verifier's eyes: its corrections are those of an ideal critic."""
    config = ChatConfig()
    return SelfCorrection(load_critic(config), load_instructor(config), shapes_editor(EditorConfig(batch_size=64)))


def corrected_image(model: Checkpoint, prompts: Sequence[str], how: How) -> Selected:
    """One image, edited by what is wrong with it, and kept where the judge finds it better."""
    first, correct = one_image(model, prompts, how), corrector()
    found = corrected(first.images, prompts, correct, judge)
    edits = shapes.EDIT_SOLVER_STEPS * EDIT_BRANCHES * correct.edited
    return Selected(found.images, first.chosen, found.scores, first.evaluations + edits, 2 * len(prompts))


WAYS: dict[str, tuple[Way, How]] = {
    "one image, eta 1": (one_image, ANCESTRAL),
    "one image, eta 0": (one_image, ODE),
    "best of 2, eta 1": (partial(best, n=2), ANCESTRAL),
    "best of 4, eta 1": (partial(best, n=4), ANCESTRAL),
    "best of 8, eta 1": (partial(best, n=N), ANCESTRAL),
    "best of 8, eta 0": (partial(best, n=N), ODE),
    "best of 16, eta 1": (partial(best, n=2 * N), ANCESTRAL),
    "8 drafts of 4 steps, eta 0": (partial(drafts, n=N, steps=4), ODE),
    "8 drafts of 6 steps, eta 0": (partial(drafts, n=N, steps=6), ODE),
    "8 drafts of 10 steps, eta 0": (partial(drafts, n=N, steps=10), ODE),
    "16 drafts of 6 steps, eta 0": (partial(drafts, n=2 * N, steps=6), ODE),
    "8 drafts of 6 steps, eta 1": (partial(drafts, n=N, steps=6), ANCESTRAL),
    "8 pruned to 4, 2, 1, eta 1": (partial(pruned, n=N, stages={8: 4, 12: 2, 16: 1}), ANCESTRAL),
    "8 pruned to 2, 1, eta 1": (partial(pruned, n=N, stages={6: 2, 14: 1}), ANCESTRAL),
    "16 pruned to 4, 1, eta 1": (partial(pruned, n=2 * N, stages={6: 4, 12: 1}), ANCESTRAL),
    "one image corrected, eta 1": (corrected_image, ANCESTRAL),
}
"""By name: what chooses, and how an image is drawn."""

ALIGNED = ("one image, eta 1", "best of 8, eta 1", "8 pruned to 4, 2, 1, eta 1")
"""Those that are repeated with a LoRA."""


def measure(name: str, model: Checkpoint, seed: int) -> dict[str, Any]:
    """One way on both domains: what is right, evaluations, and seconds of one image."""
    way, how = WAYS[name]
    found: dict[str, Any] = {"right": {}, "evaluations": 0, "judged": 0, "seconds": 0.0}
    for domain, prompts in held_out_texts(PROMPTS, seed=0).items():
        own = replace(how, seed=seed, batch_size=64)
        start = time.process_time()
        selected = way(model, prompts, own)
        found["seconds"] += time.process_time() - start
        right = score(STRICT, selected.images, prompts, name="verifier") > 0
        found["right"][domain] = pack(right.tolist())
        found["evaluations"] += selected.evaluations
        found["judged"] += selected.judged
    count = PROMPTS * len(found["right"])
    return found | {key: found[key] / count for key in ("evaluations", "judged", "seconds")}


def run(seeds: Sequence[int], ways: Sequence[str], lora: Path | None) -> None:
    """Everything that is missing."""
    torch.set_num_threads(1)
    jobs = [("", name, seed) for seed in seeds for name in ways]
    jobs += [(" of the LoRA", name, seed) for seed in seeds for name in ALIGNED] if lora else []
    base, aligned = Checkpoint.load("shapes"), None
    if lora:
        aligned = Checkpoint.load("shapes")
        load_lora(aligned, lora)
    held_out_texts(1, seed=0)  # what is made once is no way's
    judge(torch.zeros(1, 3, 64, 64), ["a red circle"])
    for suffix, name, seed in jobs:
        results = (read(RESULTS) or {"ways": {}})["ways"]
        if str(seed) not in results.get(name + suffix, {}):
            model = aligned if suffix and aligned else base
            results.setdefault(name + suffix, {})[str(seed)] = measure(name, model, seed)
            write(RESULTS, {"ways": results})
            print(f"{name}{suffix}, seed {seed}", flush=True)


def table(results: dict[str, Any]) -> str:
    """A line for each way, over all seeds."""
    first = "one image, eta 1"
    lines = [
        "| way | in-domain | out-of-domain | gain over one image | evaluations | judged | seconds |",
        "|---" * 7 + "|",
    ]
    for name, seeds in results.items():
        shares = [100 * _right(seeds, domain).mean() for domain in ("in_domain", "out_of_domain")]
        both = sorted(set(seeds) & set(results[first]))
        own, other = (_both(results[one], both) for one in (name, first))
        gain = paired_gain(other, own, groups=list(range(len(own) // len(both))) * len(both), seed=0)
        costs = [np.mean([one[key] for one in seeds.values()]) for key in ("evaluations", "judged", "seconds")]
        lines.append(
            f"| {name} | {shares[0]:.1f} % | {shares[1]:.1f} % | {100 * gain.value:+.1f} [{100 * gain.low:+.1f}, "
            f"{100 * gain.high:+.1f}] | {costs[0]:,.0f} | {costs[1]:.1f} | {costs[2]:.3f} |"
        )
    return "\n".join(lines)


def figure(results: dict[str, Any]) -> str:
    """Accuracy against both costs, the ways that belong together as curves."""
    groups = {
        "best of 1 to 16": [name for name in results if name.startswith(("one image, eta 1", "best of"))],
        "drafts": [name for name in results if "drafts" in name and "eta 0" in name],
        "pruning": [name for name in results if "pruned" in name],
        "with the LoRA": [name for name in results if name.endswith("LoRA")],
    }
    charts = []
    for key, label in (("evaluations", "denoiser evaluations of an image"), ("seconds", "seconds of an image")):
        series = []
        for title, names in groups.items():
            own = [name for name in names if title == "with the LoRA" or not name.endswith("LoRA")]
            own = [name for name in own if "eta 0" not in name or title == "drafts"]
            points = sorted(
                (float(np.mean([one[key] for one in results[name].values()])), 100 * float(_both(results[name]).mean()))
                for name in own
            )
            if points:
                series.append(Series(title, *zip(*points, strict=True), is_noisy=False))
        charts.append(Chart("Verified accuracy, both domains, %", tuple(series), (), "", x_label=label, is_log=True))
    return draw_figure(charts)


def _right(seeds: dict[str, Any], domain: str) -> np.ndarray:
    return np.concatenate([unpack(one["right"][domain]) for one in seeds.values()])


def _both(seeds: dict[str, Any], chosen: Sequence[str] | None = None) -> np.ndarray:
    """Both domains of each seed, one seed after the other."""
    parts = [unpack(right) for seed in chosen or sorted(seeds) for right in seeds[seed]["right"].values()]
    return np.concatenate(parts).astype(float)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "report"], help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise (default 0 1 2)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="all by default")
    parser.add_argument("--lora", type=Path, help="an aligned LoRA to put beside it")
    args = parser.parse_args()
    if args.what == "all":
        run(args.seeds, args.ways, args.lora)
    if (results := read(RESULTS)) is None:
        sys.exit(f"{RESULTS} is not there; run this without `report` first")
    told = table(results["ways"])
    write_text(FIGURE, figure(results["ways"]))
    write(RESULTS, results | {"tables": {"ways": told}})
    print(told)


if __name__ == "__main__":
    main()
