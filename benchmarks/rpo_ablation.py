"""What rich preferences are worth on `shapes`, arm by arm, and each component of the objective family on them.

    python benchmarks/rpo_ablation.py arms            # where the pairs come from; three seeds; table and figure
    python benchmarks/rpo_ablation.py objectives      # plain DPO against each component, on the rich pairs
    python benchmarks/rpo_ablation.py report          # from what is finished so far

For every seed, images of the training prompts are drawn once and curated once: criticised, instructed, edited and
scored by the proxy reward `shapes-clip`, which ranks and filters but where an arm names the critic. Every arm takes the
same number of pairs from them and trains a LoRA with the settings of the quickstart, but fewer updates at a constant
rate; what differs says so. Verified accuracy is that of held-out prompts, which nothing here saw, with the same noise
for every arm of a seed. Each run is a process on one core and continues where it was killed: start the command again.
"""

import argparse
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import on_one_core, write
from rpo_ablation_pairs import CONFIG, PROXY, SETS, SOURCE_SCORES, source_scores
from rpo_ablation_report import report

from rpo.config.load import load_config
from rpo.curation.curate import curate
from rpo.curation.curate_config import CurateConfig
from rpo.curation.status import status_of
from rpo.data.preference import PairSet, pair_set
from rpo.files.text import write_text
from rpo.models.checkpoint import Checkpoint
from rpo.rewards import load_reward
from rpo.runs.align_config import AlignConfig
from rpo.shapes.evaluate import evaluate, held_out_prompts, usual_sampling
from rpo.shapes.prompts import sample_prompts
from rpo.trainers.dpo import DPO
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

IMAGES_PER_PROMPT = 4
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Arm:
    """One way to get pairs and to train on them."""

    title: str
    pairs: str
    """Name of a pair set in `rpo_ablation_pairs.SETS`."""
    overrides: tuple[str, ...] = ()
    """What is not as in the quickstart's training."""
    share: float = 1.0
    """Of the number of pairs that the other arms have."""


SLOWER = "learning.learning_rate=3e-4"
"""A rate at which the chosen side is not forgotten at once."""

PLAIN = ("objective.sft_weight=0", SLOWER)

ARMS = {
    "ranked": Arm("(i) own images, ranked by the proxy", "ranked"),
    "rich": Arm("(ii) rich: edits that the proxy finds better", "rich"),
    "unfiltered": Arm("(iii) all edits, no relabelling", "unfiltered"),
    "blind": Arm("(iv) edits from the caption alone", "blind"),
    "region": Arm("(v) rich, region-weighted", "rich", ("region={}",)),
    "mixed": Arm("(vi) half (i), half (ii)", "mixed"),
    "verified": Arm("(vii) rich, edits that the critic finds right", "verified"),
    "siblings": Arm("(viii) own images, ordered by the critic", "siblings"),
    "both": Arm("(ix) (vii) and (viii) mixed", "verified_and_siblings"),
    "ranked_plain": Arm("(i), plain DPO", "ranked", PLAIN),
    "ranked_double": Arm("(i), twice the pairs", "ranked", share=2.0),
    "rich_half": Arm("(ii), half of the pairs", "rich", share=0.5),
}

COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rich_plain": ("Diffusion-DPO", ()),
    "ipo": ("link: IPO", ("objective.link=ipo",)),
    "hinge": ("link: hinge", ("objective.link=hinge",)),
    "cauchy": ("link: Cauchy", ("objective.link=cauchy",)),
    "smoothing": ("label smoothing 0.1", ("objective.label_smoothing=0.1",)),
    "time": ("normalisation by time", ("objective.normalization=time",)),
    "margin": ("home advantage 0.5", ("objective.margin=0.5",)),
    "margin_rewards": ("margin 0.5 by the scores' gap", ("objective.margin_from=rewards", "objective.margin=0.5")),
    "mixing": ("reference mixing 0.25, margin 0.5", ("objective.reference_weight=0.25", "objective.margin=0.5")),
    "context": ("contextual scaling", ("objective.context=reference",)),
    "sft": ("SFT term 0.2", ("objective.sft_weight=0.2",)),
    "winner": ("winner-preserving 0.9", ("objective.winner_preserving=0.9",)),
    "all": (
        "all together: time, margin, mixing, context, SFT",
        (
            "objective.normalization=time",
            "objective.margin=0.5",
            "objective.margin_mixed=true",
            "objective.reference_weight=0.25",
            "objective.context=reference",
            "objective.sft_weight=0.2",
        ),
    ),
}
OBJECTIVES = {name: Arm(title, "rich", (*PLAIN, *words)) for name, (title, words) in COMPONENTS.items()} | {
    "mapo": Arm("MaPO", "rich", (SLOWER, "objective={kind: mapo}")),
    "kto": Arm("KTO", "rich", (SLOWER, "objective={kind: kto, beta: 150.0}")),
}
OBJECTIVES["rso"] = Arm("pairs by rejection sampling", "rejection", PLAIN)
PARTS = {"arms": ARMS, "objectives": OBJECTIVES}


def make_data(folder: Path, seed: int, prompts: int) -> None:
    """The two curation runs of a seed, on the same images: with critique, and blind."""
    data = folder / f"data-{seed}"
    rich, blind, texts = data / "rich", data / "blind", data / "prompts.txt"
    data.mkdir(parents=True, exist_ok=True)
    write_text(texts, "\n".join(prompt.text for prompt in sample_prompts("train", prompts, seed)) + "\n")
    words = [f"output={rich}", f"source.seed={1000 + seed}", f"source.images_per_prompt={IMAGES_PER_PROMPT}"]
    words += [f"source.prompts={texts}", "progress=false"]
    _curate([*words, "stop_after=sources"])
    if not blind.exists():
        partial = blind.with_name("blind.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(rich, partial)
        partial.rename(blind)
    _curate(words)
    told = ["instructor.kind=shapes-caption", "instruct_sound=true", "redo=instructions"]
    _curate([*words, f"output={blind}", *told])
    if not (data / SOURCE_SCORES).is_file():
        write(data / SOURCE_SCORES, source_scores(rich))


def _curate(words: list[str]) -> None:
    config = load_config(CurateConfig, CONFIG, words)
    curate(config, resume=(Path(config.output) / "manifest.json").exists())


def pairs_of_arm(folder: Path, arm: Arm, seed: int) -> PairSet:
    """As many pairs as every arm of the seed has, times the arm's share, in an order of chance."""
    data = folder / f"data-{seed}"
    sets = {name: SETS[name](data) for name in dict.fromkeys(one.pairs for one in (*ARMS.values(), arm))}
    count = min(len(sets[one.pairs]) / max(1.0, one.share) for one in ARMS.values())
    found = sets[arm.pairs][: round(arm.share * count)]
    return pair_set(found, origin=f"{arm.pairs} pairs of seed {seed}")


def train(folder: Path, name: str, arm: Arm, seed: int, *, images: int, updates: int) -> None:
    """One run, judged at its end."""
    place = folder / f"{name}-{seed}"
    if (place / "judged.json").is_file():
        return
    words = [f"dpo.{word}" for word in arm.overrides]
    words += [
        f"dpo.seed={seed}",
        f"dpo.output={place / 'dpo'}",
        f"dpo.cache_folder={folder / f'data-{seed}' / 'cache'}",
    ]
    words += [f"dpo.learning.updates={updates}", "dpo.learning.lr_schedule=constant", "dpo.learning.progress=false"]
    dpo = load_config(AlignConfig, QUICKSTART, words).dpo
    pairs = pairs_of_arm(folder, arm, seed)
    trainer = Trainer(Checkpoint.load("shapes"), DPO(pairs, dpo))
    print(trainer.plan(), flush=True)
    start = time.perf_counter()
    trained = trainer.train(resume=(place / "dpo").exists())
    seconds = time.perf_counter() - start
    trainer.save()
    last = read_metrics(trainer.folder)[-1]
    facts = {
        "pairs": len(pairs),
        "updates": trained.updates,
        "stopped_because": trained.stopped_because,
        "seconds": seconds,
        "metrics": {key: value for key, value in last.items() if key.startswith("dpo/")},
        **judged(checkpoint_of(trainer), seed, images),
    }
    write(place / "judged.json", facts)


def checkpoint_of(trainer: Trainer) -> Checkpoint:
    """The model that was trained."""
    assert isinstance(trainer.run.model, Checkpoint)
    return trainer.run.model


def judged(model: Checkpoint, seed: int, images: int) -> dict[str, Any]:
    """Verified accuracy (percent) and mean proxy score on held-out prompts, by domain and by kind of prompt."""
    found = evaluate(model, held_out_prompts(images, seed), usual_sampling(seed))
    pixels = torch.from_numpy(found.images).permute(0, 3, 1, 2).float() / 255
    proxy = load_reward(PROXY)(pixels, found.texts)
    result: dict[str, Any] = {"kinds": {}}
    for domain in dict.fromkeys(found.domains):
        where = found.where(domain)
        result[domain] = 100 * float(found.holds[where].mean())
        result[f"{domain}_proxy"] = float(proxy[where].mean())
        kinds = sorted({found.prompts[index].kind for index in where})
        result["kinds"][domain] = {
            kind: 100 * float(found.holds[[i for i in where if found.prompts[i].kind == kind]].mean()) for kind in kinds
        }
    return result


def yields(folder: Path, seed: int) -> dict[str, Any]:
    """What came through each stage, and what the verifier thinks of the pairs."""
    found: dict[str, Any] = {}
    for name in ("rich", "blind"):
        status = status_of(folder / f"data-{seed}" / name)
        stages = {stage.name: stage.kept for stage in status.stages}
        one = status.evaluation
        verdict = {"better": one.better, "equal": one.equal, "worse": one.worse} if one else {}
        found[name] = {"stages": stages, "pairs": status.num_pairs, "dropped": dict(status.dropped), **verdict}
    return found


def _all(args: argparse.Namespace) -> None:
    common = [f"--folder={args.folder}", f"--images={args.images}", f"--prompts={args.prompts}"]
    common.append(f"--updates={args.updates}")
    arms = {name: arm for name, arm in PARTS[args.part].items() if not args.only or name in args.only}
    with ThreadPoolExecutor(args.workers) as pool:
        for part, names in (("data", ["data"]), ("one", list(arms))):
            words = {f"{name}-{seed}": [f"--seeds={seed}", f"--only={name}"] for seed in args.seeds for name in names}
            jobs = [
                pool.submit(on_one_core, __file__, [part, *common, *more], args.folder / f"{job}.log")
                for job, more in words.items()
                if not (args.folder / job / "judged.json").is_file()
            ]
            for job in jobs:
                job.result()


def main(argv: list[str] | None = None) -> None:
    """Run what the words ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "report", "data", "one"])
    parser.add_argument("--folder", type=Path, default=Path("runs/rpo_ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=460, help="training prompts, four images each")
    parser.add_argument("--images", type=int, default=200, help="held-out prompts of each domain")
    parser.add_argument("--updates", type=int, default=180, help="of every run")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--only", nargs="+", default=[], help="these arms alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.part in PARTS:
        _all(args)
    elif args.part == "data":
        for seed in args.seeds:
            make_data(args.folder, seed, args.prompts)
            base = args.folder / f"base-{seed}" / "judged.json"
            if not base.is_file():
                write(base, judged(Checkpoint.load("shapes"), seed, args.images))
            write(args.folder / f"data-{seed}" / "yields.json", yields(args.folder, seed))
        return
    elif args.part == "one":
        (name,) = args.only
        arm = (ARMS | OBJECTIVES)[name]
        train(args.folder, name, arm, args.seeds[0], images=args.images, updates=args.updates)
        return
    report(args.folder, {part: {name: arm.title for name, arm in arms.items()} for part, arms in PARTS.items()})


if __name__ == "__main__":
    main()
