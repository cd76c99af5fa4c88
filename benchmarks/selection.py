"""What choosing at test time buys on `shapes`: accuracy against denoiser evaluations and seconds, the judge included.

    python benchmarks/selection.py                               # all ways, three seeds; table and figure
    python benchmarks/selection.py --lora runs/quickstart/lora   # beside them an aligned LoRA, chosen from or not
    python benchmarks/selection.py potential --seeds 0 1         # the judge on the way and reflection, two checkpoints
    python benchmarks/selection.py report                        # from what is finished

Every way draws 100 held-out prompts of each domain at guidance 2. The judge that chooses is the learned `shapes-clip`,
or of `potential` that which can be asked on the way, `shapes-potential` and `shapes-tokens-potential`; the verifier,
which nobody asks while choosing, says what is right. Seconds are those of one core, the judge's and the decoder's among
them. One seed takes about 20 minutes of one core, of `potential` about 40.
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
from rpo.sampling.redraw import Remasking
from rpo.sampling.sample import generate
from rpo.sampling.select import How, Selected, best_of_n, by_drafts, corrected
from rpo.sampling.stepwise import by_potential, by_pruning
from rpo.shapes.editor import shapes_editor
from rpo.shapes.faults import faults_of
from rpo.shapes.potential import ShapesPotential
from rpo.shapes.prompts import held_out_texts
from rpo.shapes.reward import STRICT
from rpo.types import Images, PerSample

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "selection.json", HERE / "selection.svg"
FIGURE_OF_TRUTH, LEAST_SHARE = HERE / "selection_truth.svg", 0.02
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

LOOKS = {"shapes": (10, 12, 14), "shapes-tokens": (12, 14, 16)}
"""Steps after which there is a look: of tokens later, since they are clear later."""


def on_the_way(model: Checkpoint, prompts: Sequence[str], how: How, *, source: str, n: int) -> Selected:
    """Of n those that are clear and have no potential are dropped at each look."""
    return by_potential(model, prompts, ShapesPotential(source), n, how, looks=LOOKS[source])


def pruned_by_potential(model: Checkpoint, prompts: Sequence[str], how: How, *, source: str) -> Selected:
    """At each look the better half goes on."""
    stages = dict(zip(LOOKS[source], (N // 2, N // 4, 1), strict=True))
    return by_pruning(model, prompts, ShapesPotential(source), N, how, stages=stages)


def best_by_potential(model: Checkpoint, prompts: Sequence[str], how: How, *, source: str, n: int) -> Selected:
    """The best of n finished ones."""
    return best_of_n(model, prompts, ShapesPotential(source), n, how)


def reflected(model: Checkpoint, prompts: Sequence[str], how: How, *, source: str, way: Way) -> Selected:
    """What a way gives, criticised and corrected once, and kept where the judge finds it better."""
    first, judge = way(model, prompts, how), ShapesPotential(source)
    if source == "shapes":
        correct = corrector()
        found = corrected(first.images, prompts, correct, judge)
        spent = shapes.EDIT_SOLVER_STEPS * EDIT_BRANCHES * correct.edited
    else:
        correct = Remasking(model, faults_of, how)
        found = corrected(first.images, prompts, correct, judge)
        spent = correct.evaluations
    judged = first.judged + 2 * len(prompts)
    return Selected(found.images, first.chosen, found.scores, first.evaluations + spent, judged)


def _potential_ways(source: str) -> dict[str, tuple[Way, str, str]]:
    drop = partial(on_the_way, source=source, n=N)
    ways: dict[str, tuple[Way, str]] = {
        "one image": (one_image, "one image"),
        "best of 4": (partial(best_by_potential, source=source, n=4), "best of 4"),
        "4, dropped by potential": (partial(on_the_way, source=source, n=4), "best of 4"),
        "best of 8": (partial(best_by_potential, source=source, n=N), "best of 4"),
        "8, dropped by potential": (drop, "best of 8"),
        "8, pruned to 4, 2, 1 by potential": (partial(pruned_by_potential, source=source), "best of 8"),
        "one image, reflected": (partial(reflected, source=source, way=one_image), "one image"),
        "8, dropped by potential, reflected": (partial(reflected, source=source, way=drop), "best of 8"),
    }
    return {f"{source}, {name}": (way, source, f"{source}, {rival}") for name, (way, rival) in ways.items()}


POTENTIAL: dict[str, tuple[Way, str, str]] = {**_potential_ways("shapes"), **_potential_ways("shapes-tokens")}
"""By name: what chooses, from whose images, and what it is compared with."""

ALIGNED = ("one image, eta 1", "best of 8, eta 1", "8 pruned to 4, 2, 1, eta 1")
"""Those that are repeated with a LoRA."""


def measure(way: Way, how: How, model: Checkpoint, seed: int) -> dict[str, Any]:
    """One way on both domains: what is right, evaluations, and seconds of one image."""
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
            results.setdefault(name + suffix, {})[str(seed)] = measure(*WAYS[name], model, seed)
            write(RESULTS, (read(RESULTS) or {}) | {"ways": results})
            print(f"{name}{suffix}, seed {seed}", flush=True)


def run_potential(seeds: Sequence[int], ways: Sequence[str]) -> None:
    """The same of the ways of `POTENTIAL`."""
    torch.set_num_threads(1)
    held_out_texts(1, seed=0)
    models = dict[str, Checkpoint]()
    for seed, name in ((seed, name) for seed in seeds for name in ways):
        way, source, _ = POTENTIAL[name]
        results = (read(RESULTS) or {}).get("potential", {})
        if str(seed) not in results.get(name, {}):
            if source not in models:
                models[source] = Checkpoint.load(source)
                ShapesPotential(source)(torch.zeros(1, 3, 64, 64), ["a red circle"])
            results.setdefault(name, {})[str(seed)] = measure(way, ANCESTRAL, models[source], seed)
            write(RESULTS, (read(RESULTS) or {}) | {"potential": results})
            print(f"{name}, seed {seed}", flush=True)


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


def table_of_potential(results: dict[str, Any]) -> str:
    """A line for each way of `POTENTIAL`, over the seeds that it has in common with what it is compared with."""
    lines = [
        "| checkpoint, way | in-domain | out-of-domain | gain over one image | compared with | by | evaluations "
        "| judged | seconds |",
        "|---" * 9 + "|",
    ]
    for name, (_, source, rival) in POTENTIAL.items():
        if name not in results:
            continue
        seeds = results[name]
        shares = [100 * _right(seeds, domain).mean() for domain in ("in_domain", "out_of_domain")]
        costs = [np.mean([one[key] for one in seeds.values()]) for key in ("evaluations", "judged", "seconds")]
        against = "" if rival == name else rival.partition(", ")[2]
        gain = _gain(results, f"{source}, one image", name)
        lines.append(
            f"| {name} | {shares[0]:.1f} % | {shares[1]:.1f} % | {gain} | {against} | "
            f"{_gain(results, rival, name) if against else ''} | {costs[0]:,.0f} | {costs[1]:.1f} | {costs[2]:.2f} |"
        )
    return "\n".join(lines)


def _gain(results: dict[str, Any], rival: str, name: str) -> str:
    """In points, with its interval over prompts."""
    both = sorted(set(results[name]) & set(results.get(rival, {})))
    if not both:
        return ""
    own, other = (_both(results[one], both) for one in (name, rival))
    gain = paired_gain(other, own, groups=list(range(len(own) // len(both))) * len(both), seed=0)
    return f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def table_of_truth() -> str:
    """How true the judges' probabilities are, by time, as the making of the judge measured it."""
    found = read(shapes.POTENTIAL / "evaluation.json") or {"held_out": {}}
    lines = [
        "| checkpoint | time | clear | agree: said, true | potential: said, true | error | AUC | AUC of `shapes-clip` |"
    ]
    lines.append("|---" * 8 + "|")
    for source, rows in found["held_out"].items():
        high = 1.0
        for row in rows:
            low, one, clear = row["from"], row.get("potential") or row["best"], 100 * row["clear_share"]
            time, share = (f"{low:.1f} to {high:.1f}", f"{clear:.0f} %") if low else ("finished", "")
            agree = f"{row['clear']['said']:.2f}, {row['clear']['true']:.2f}" if "clear" in row else ""
            high = low
            lines.append(
                f"| {source} | {time} | {share} | {agree} | {one['said']:.2f}, {one['true']:.2f} "
                f"| {one['error']:.2f} | {one['auc']:.2f} | {row['auc_of_clip']:.2f} |"
            )
    return "\n".join(lines)


def figure_of_truth() -> str:
    """What came true of what was said, for potential at two times on the way and for the finished images."""
    found, charts = (read(shapes.POTENTIAL / "evaluation.json") or {"held_out": {}})["held_out"], list[Chart]()
    for source, rows in found.items():
        series = [Series("what is said", (0.0, 1.0), (0.0, 1.0), is_noisy=False)]
        for row in rows:
            if row["from"] in (0.6, 0.3, 0.0):
                tenths = [one for one in (row.get("potential") or row["best"])["tenths"] if one["share"] >= LEAST_SHARE]
                title = f"time from {row['from']:.1f}" if row["from"] else "finished"
                series.append(
                    Series(title, *zip(*((one["said"], one["true"]) for one in tenths), strict=True), is_noisy=False)
                )
        charts.append(Chart(f"{source}: share that came out right", tuple(series), (), "", x_label="potential"))
    return draw_figure(charts)


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
    parser.add_argument("what", nargs="?", default="all", choices=["all", "potential", "report"], help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise (default 0 1 2)")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *POTENTIAL], help="all by default")
    parser.add_argument("--lora", type=Path, help="an aligned LoRA to put beside it")
    args = parser.parse_args()
    if args.what == "all":
        run(args.seeds, args.ways or list(WAYS), args.lora)
    if args.what == "potential":
        run_potential(args.seeds, args.ways or list(POTENTIAL))
    if (results := read(RESULTS)) is None:
        sys.exit(f"{RESULTS} is not there; run this without `report` first")
    tables = {"ways": table(results["ways"])}
    if "potential" in results:
        tables |= {"potential": table_of_potential(results["potential"]), "truth": table_of_truth()}
        write_text(FIGURE_OF_TRUTH, figure_of_truth())
    write_text(FIGURE, figure(results["ways"]))
    write(RESULTS, results | {"tables": tables})
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
