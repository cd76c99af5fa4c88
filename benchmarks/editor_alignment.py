"""What an editor gains from its own judged edits, on `shapes`: instructions carried out before and after, by the truth.

    python -m benchmarks.editor_alignment            # three seeds, one after the other; prints the table
    python -m benchmarks.editor_alignment --seeds 0  # one of them

For every seed, images of training prompts are drawn and criticised, and the shipped editor carries out each instruction
several times. The critic of the embedded world orders these edits by what is still wrong with them, where the proxy
reward `shapes-clip` does not disagree: the better one is what the caption says. They are exported as
`rpo curate export --form edits` does, and the editor learns by `rpo train dpo configs/dpo_shapes_editor.yaml`.
Both editors then edit images of held-out prompts, drawn by the base, from the same noise; `scripts.shapes.edit_check`,
which had no say in the pairs, tells whether an instruction was carried out and all else left as it was.

What is finished in the folder is not made again; a run that was killed goes on.
"""

import argparse
import json
import statistics
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.config.load import load_config
from rpo.curation.curate import curate
from rpo.curation.curate_config import CurateConfig, EditorConfig
from rpo.curation.export import export
from rpo.curation.records import Instructions
from rpo.data.preference import PairSet
from rpo.data.readers import read_pairs
from rpo.evaluation.comparison import compare, format_gain, format_share
from rpo.files.text import read_text, write_text
from rpo.models.checkpoint import Checkpoint
from rpo.runs.train import run
from rpo.runs.train_config import DPORunConfig
from rpo.shapes.critic import ShapesCritic
from rpo.shapes.editor import shapes_editor
from rpo.shapes.evaluate import evaluate, held_out_prompts, usual_sampling
from rpo.shapes.instructor import ShapesInstructor
from scripts.shapes.edit_check import carries_out

CONFIGS = Path(__file__).parent.parent / "configs"
EDITS_PER_IMAGE = 6
LEAST_MARGIN = 1.0
"""Of the critic's score between the better and the worse edit: one thing more is right."""

RIGHT = 10.0
"""The critic's score of an image that is what its caption says; the better edit is."""

HELD_OUT_NOISE = 7_000
"""Added to the seed for what is drawn and edited to be judged."""

EDIT_BATCH = 64


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of everything random (default 0 1 2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/editor_alignment"), help="where everything is kept")
    parser.add_argument("--images-per-prompt", type=int, default=4, help="drawn for the pairs (default 4)")
    parser.add_argument("--held-out", type=int, default=800, help="images drawn of each held-out split (default 800)")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of the training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {seed: result_of(args, seed) for seed in args.seeds}
    write_text(args.folder / "results.json", json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


def result_of(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Verdicts of one seed on every held-out instruction, before and after, and how many pairs there were."""
    folder = args.folder / f"seed-{seed}"
    if (folder / "judged.json").is_file():
        return json.loads(read_text(folder / "judged.json"))
    pairs = edited_pairs(folder, seed, args.images_per_prompt)
    config = load_config(
        DPORunConfig,
        CONFIGS / "dpo_shapes_editor.yaml",
        [f"data.source={pairs}", f"output={folder / 'dpo'}", f"seed={seed}", *args.words],
    )
    trained = run(config, resume=(folder / "dpo" / "run.yaml").is_file())
    cases = held_out_cases(args.held_out, seed)
    judged: dict[str, Any] = {"pairs": len(read_pairs(pairs)), "updates": trained.trained.updates}
    judged |= {"domains": cases["domains"], "instructions": cases["instructions"]}
    judged["labels"] = labels(read_pairs(pairs))
    for name, lora in {"before": None, "after": trained.saved / WEIGHT_FILE}.items():
        judged[name] = verdicts(cases, lora, seed)
    write_text(folder / "judged.json", json.dumps(judged) + "\n")
    return judged


def edited_pairs(folder: Path, seed: int, images_per_prompt: int) -> Path:
    """The editor's own edits, the better and the worse one of each couple."""
    if (folder / "pairs" / "export.json").is_file():
        return folder / "pairs"
    words = [
        f"output={folder / 'curate'}",
        f"source.images_per_prompt={images_per_prompt}",
        f"source.seed={2_000 + seed}",
        f"editor.edits_per_image={EDITS_PER_IMAGE}",
        f"editor.seed={seed}",
        f"decide.rewards={{critic: {LEAST_MARGIN}, shapes-clip: 0.0}}",
        f"decide.min_chosen={{critic: {RIGHT}}}",
        "evaluation=''",
        "decide.min_distance=0",
        "decide.max_distance=1",
    ]
    config = load_config(CurateConfig, CONFIGS / "curate_shapes.yaml", words)
    return export(curate(config, resume=True), "edits", to=folder / "pairs").path


def held_out_cases(count: int, seed: int) -> dict[str, Any]:
    """Images of held-out prompts that are not as they should be, each with what would mend it."""
    prompts = held_out_prompts(count, HELD_OUT_NOISE + seed)
    drawn = evaluate(Checkpoint.load("shapes"), prompts, usual_sampling(HELD_OUT_NOISE + seed), progress="held-out")
    critic, instructor = ShapesCritic(), ShapesInstructor()
    images = [Image.fromarray(one) for one in drawn.images]
    critiques = critic(images, list(drawn.texts))
    told = instructor(images, list(drawn.texts), critiques)
    cases = [
        (domain, one.text, pixels)
        for domain, one, pixels in zip(drawn.domains, told, drawn.images, strict=True)
        if isinstance(one, Instructions) and not one.is_empty
    ]
    domains, instructions, pixels = zip(*cases, strict=True)
    return {"domains": domains, "instructions": instructions, "pixels": pixels}


def verdicts(cases: dict[str, Any], lora: Path | None, seed: int) -> list[bool]:
    """Whether each instruction was carried out and nothing else changed, as the editor edits by default."""
    editor = shapes_editor(EditorConfig(batch_size=EDIT_BATCH))
    if lora is not None:
        editor.pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    found: list[bool] = []
    numbered = iter(enumerate(zip(cases["instructions"], cases["pixels"], strict=True)))
    while some := list(islice(numbered, EDIT_BATCH)):
        seeds = [(HELD_OUT_NOISE + seed) * 100_000 + number for number, _ in some]
        edits = editor([Image.fromarray(pixels) for _, (_, pixels) in some], [text for _, (text, _) in some], seeds)
        for (_, (text, pixels)), edit in zip(some, edits, strict=True):
            verdict = carries_out(pixels, np.asarray(edit), text)
            found.append(verdict.is_done and verdict.is_rest_unchanged)
    return found


def labels(pairs: PairSet) -> dict[str, int]:
    """How often the chosen and the rejected edit are right, by the truth."""
    found: Counter[str] = Counter()
    for pair in pairs:
        source, *sides = (np.asarray(pair.decode(one)) for one in ("original", "chosen", "rejected"))
        verdicts = [carries_out(source, side, pair.prompt) for side in sides]
        are_right = ["right" if one.is_done and one.is_rest_unchanged else "wrong" for one in verdicts]
        found[f"chosen {are_right[0]}, rejected {are_right[1]}"] += 1
    return dict(found)


def table(found: dict[int, dict[str, Any]]) -> list[str]:
    """Shares of instructions carried out, seed by seed, with intervals; instructions are what cases resemble by."""
    lines = ["| seed | pairs | | images | before | after | gain |", "|---|---|---|---|---|---|---|"]
    gains: dict[str, list[float]] = {}
    for seed, one in found.items():
        for domain in ("in_domain", "out_of_domain"):
            rows = [index for index, name in enumerate(one["domains"]) if name == domain]
            texts = [one["instructions"][index] for index in rows]
            sides = ([one[side][index] for index in rows] for side in ("before", "after"))
            row = compare(domain, *(np.array(side, bool) for side in sides), groups=texts, seed=seed)
            gains.setdefault(domain, []).append(row.gain.value)
            shares = f"{format_share(row.before)} | {format_share(row.after)} | {format_gain(row.gain)}"
            lines.append(f"| {seed} | {one['pairs']} | {domain.replace('_', '-')} | {len(rows)} | {shares} |")
    lines[:0] = [f"pairs of seed {seed}: {one['labels']}" for seed, one in found.items()]
    for domain, values in gains.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = f"{100 * statistics.mean(values):+.1f} ± {100 * spread:.1f}"
        lines.append(f"| mean | | {domain.replace('_', '-')} | | | | {mean} |")
    return lines


if __name__ == "__main__":
    main()
