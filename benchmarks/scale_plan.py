"""A plan with numbers for 10⁸ curated pairs and a base of 20 billion weights: cards, days, bytes and money.

    python benchmarks/scale_plan.py                                # prints the tables, and writes scale_plan.json

Every number is an assumption with its source, a measurement with its command, a count of operations on the real
architecture without weights, or computed here of these. Change an assumption, and the rest follows.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from card import DENSE_BF16_TFLOPS
from torch.utils.flop_counter import FlopCounterMode

FILE = Path(__file__).with_suffix(".json")
SIDE = 1024
THREE_DIGITS = 100


@dataclass(frozen=True)
class Given:
    """A number that is not computed here."""

    what: str
    value: float
    unit: str
    source: str


ASSUMED = {
    "pairs": Given("pairs wanted", 1e8, "", "the task"),
    "edited": Given("images with something to fix, edited", 0.42, "of those drawn", "the quickstart: 1,489 of 3,584"),
    "kept": Given("pairs that come of it", 0.33, "of those drawn", "the quickstart: 1,188 of 3,584; yours: status"),
    "many": Given("forwards of an image or edit, many steps", 40, "", "20 steps with guidance"),
    "few": Given("forwards, few steps", 8, "", "8 steps of a distilled checkpoint, without guidance"),
    "rate": Given("dense bf16 of an H100", DENSE_BF16_TFLOPS["H100"], "TFLOP/s", "its data sheet"),
    "used": Given("used of it by denoisers", 0.4, "", "assumed; `make gpu` measures it for smaller bases"),
    "served": Given("used of it by a server of language models", 0.2, "", "assumed; decoding is bound by memory"),
    "cards": Given("cards", 1024, "", "128 machines of 8"),
    "price": Given("an hour of a card", 2.5, "$", "assumed; lists of clouds are between 2 and 4"),
    "vlm": Given("weights of the vision-language model", 8e9, "", "assumed: the usual small one"),
    "asked": Given("tokens of a critique: image, text, answer", 1337 + 600 + 150, "", "28 px a token; our template"),
    "told": Given("tokens of an instruction", 760, "", "our template and a critique"),
    "clip": Given("weights of a reward, 257 tokens an image", 6.3e8, "", "CLIP ViT-H, as PickScore has"),
    "png": Given("an image of 1,024 px as PNG", 1.6e6, "bytes", "assumed: half of its raw bytes"),
    "month": Given("storage", 0.023, "$ per GB and month", "list price of S3 Standard"),
    "put": Given("a million objects written", 5.0, "$", "list price of S3 Standard"),
    "shard": Given("records of a shard", 128, "", "the default of `shard`"),
    "run": Given("records of a run", 1e6, "", "one run for each million, mixed at export"),
    "batch": Given("pairs of an update", 2048, "", "as Diffusion-DPO"),
    "forwards": Given(
        "an update, in forwards of one image, for each image", 4, "",
        "reference, policy, once more for checkpointing, back through frozen weights",
    ),
    "latents": Given("a cached image: mean and deviation, float32", 2 * 16 * 128 * 128 * 4, "bytes", "16 channels"),
}  # fmt: skip

MEASURED = {
    "sealed": Given("to seal a record", 133, "µs of a core", "`benchmarks/curation_scale.py simulate`"),
    "text": Given("of a record beside its images", 362, "bytes", "the same"),
    "status": Given("`status` of 10⁵ records", 0.01, "s of a core", "`benchmarks/curation_scale.py read`"),
    "export": Given("`export` to parquet, a record", 410, "µs of a core", "the same"),
    "planned": Given("a plan, a record", 80, "bytes", "at most; `tests/curation/test_growth.py`"),
    "held": Given("a set of pairs in a process that trains, a pair", 1300, "bytes", "`benchmarks/growth.py`"),
    "begun": Given("to the first update, a pair", 312, "µs of a core", "the same"),
}


@cache
def forward(images: int) -> float:
    """TFLOP of one forward of the base on so many images of 1,024 px that attend to each other, and 256 words."""
    with torch.device("meta"):
        network = diffusers.QwenImageTransformer2DModel()
        state, text = torch.empty(1, images * (SIDE // 16) ** 2, 64), torch.empty(1, 256, 3584)
        shapes: Any = [[(1, SIDE // 16, SIDE // 16)] * images]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(state, encoder_hidden_states=text, timestep=torch.empty(1), img_shapes=shapes)
    return counter.get_total_flops() / 1e12


@cache
def weights() -> int:
    """Of the base."""
    with torch.device("meta"):
        return sum(one.numel() for one in diffusers.QwenImageTransformer2DModel().parameters())


def value(name: str) -> float:
    """A number that is given."""
    return (ASSUMED | MEASURED)[name].value


def drawn() -> float:
    """Images to draw: records."""
    return value("pairs") / value("kept")


def tables() -> dict[str, str]:
    """All tables of the page, by name."""
    return {
        "assumed": given(ASSUMED),
        "measured": given(MEASURED),
        "curation": curation(),
        "training": training(),
        "storage": storage(),
        "books": books(),
    }


def given(numbers: dict[str, Given]) -> str:
    """What is not computed here."""
    rows = ((one.what, f"{number(one.value)} {one.unit}".strip(), one.source) for one in numbers.values())
    return table("what | number | source", rows)


def curation() -> str:
    """Stages, and what each needs of cards: by many steps, and by few."""
    rows = [
        (stage.name, number(stage.records), number(stage.work), *map(number, (*stage.hours, *map(days, stage.hours))))
        for stage in stages()
    ]
    many, few = whole()
    rows.append(("**together**", "", "", *map(number, (many, few, days(many), days(few)))))
    rows.append(("**$**", "", "", *(number(hours * value("price")) for hours in (many, few)), "", ""))
    columns = "card-hours, many steps | few steps | days, many steps | few steps"
    return table(f"stage | records | TFLOP a forward or call | {columns}", rows)


@dataclass(frozen=True)
class Stage:
    """What a stage does, and what of cards that takes."""

    name: str
    records: float
    work: float
    """TFLOP of one forward or call."""
    rate: float
    """TFLOP/s of a card."""
    calls: tuple[float, float] = (1.0, 1.0)
    """Of a record, by many steps and by few."""

    @property
    def hours(self) -> tuple[float, float]:
        """Of cards."""
        many, few = (self.records * calls * self.work / self.rate / 3600 for calls in self.calls)
        return many, few


def stages() -> list[Stage]:
    """Of curation."""
    images, edits, sampled = drawn(), drawn() * value("edited"), (value("many"), value("few"))
    denoiser, served = value("rate") * value("used"), value("rate") * value("served")
    token = 2 * value("vlm") / 1e12
    return [
        Stage("draw", images, forward(1), denoiser, sampled),
        Stage("critique", images, token * value("asked"), served),
        Stage("instruct", edits, token * value("told"), served),
        Stage("edit", edits, forward(2), denoiser, sampled),
        Stage("score both by two rewards", edits, 4 * 2 * value("clip") * 257 / 1e12, denoiser),
    ]


def whole() -> tuple[float, float]:
    """Card-hours of curation, by many steps and by few."""
    many, few = (sum(hours) for hours in zip(*(stage.hours for stage in stages()), strict=True))
    return many, few


def days(hours: float) -> float:
    """On all cards."""
    return hours / value("cards") / 24


def training() -> str:
    """One pass over all pairs."""
    pairs, pair = value("pairs"), 2 * value("forwards") * forward(1)
    updates, hours = pairs / value("batch"), pairs * pair / (value("rate") * value("used")) / 3600
    held, size = value("held") * pairs / 1e9, 2 * weights() / 1e9
    rows = [
        ("TFLOP of a pair", number(pair)),
        ("updates", number(updates)),
        ("seconds of an update", number(hours * 3600 / value("cards") / updates)),
        ("card-hours; days; $", "; ".join(map(number, (hours, days(hours), hours * value("price"))))),
        ("weights in bf16: on each card; over the 8 of a machine", f"{size:.3g} GB; {size / 8:.3g} GB"),
        ("the set in memory: of a process; of 8 on a machine", f"{number(held)} GB; {number(8 * held)} GB"),
        ("hours from the start to the first update", number(value("begun") * 1e-6 * pairs / 3600)),
    ]  # fmt: skip
    return table("one pass over the pairs | ", rows)


def storage() -> str:
    """What lies where."""
    parts = {
        "runs: images": bytes_of_images(),
        "runs: everything else": drawn() * value("text"),
        "export, two images a pair": value("pairs") * (2 * value("png") + value("text")),
        "latents that training keeps, each machine its own": value("pairs") * 2 * value("latents"),
    }
    rows = [(name, number(size / 1e12), number(size / 1e9 * value("month"))) for name, size in parts.items()]
    return table("what | TB | $ a month", rows)


def bytes_of_images() -> float:
    """Of all runs."""
    return drawn() * (1 + value("edited")) * value("png")


def books() -> str:
    """What the store itself does."""
    runs, files, export = drawn() / value("run"), 2 * drawn() / value("shard"), value("export") * 1e-6 * drawn() / 3600
    rates = [bytes_of_images() / (86400 * days(hours)) for hours in whole()]
    plan = [value("planned") * records / 1e9 for records in (value("run"), drawn())]
    rows = [
        ("runs", number(runs)),
        ("files: shards and marks", f"{number(files)}, written for {number(files / 1e6 * value('put'))} $"),
        ("hours of a core to seal all", number(value("sealed") * 1e-6 * drawn() / 3600)),
        ("hours of a core to export all", f"{number(export)}; side by side {number(export / runs * 60)} minutes a run"),
        ("seconds of a core for the status of all", number(value("status") * drawn() / 1e5)),
        ("memory of a plan in each worker", f"{number(plan[0])} GB for one run, {number(plan[1])} GB if all were one"),
        ("written by all: many steps; few", "; ".join(f"{number(rate / 1e9)} GB/s" for rate in rates)),
    ]
    return table("the store | ", rows)


def table(head: str, rows: Any) -> str:
    """Of cells."""
    names = head.split("|")
    return "\n".join([f"| {head} |", f"|{'---|' * len(names)}", *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float) -> str:
    """Three digits, with words for what is large."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}" if value >= THREE_DIGITS else f"{value:.3g}"


def main() -> None:
    """Print all tables, and keep them for the page."""
    found = tables()
    for one in found.values():
        print(one, end="\n\n")
    counted = {"forward(1)": forward(1), "forward(2)": forward(2), "weights": weights()}
    FILE.write_text(json.dumps({"counted": counted, "tables": found}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
