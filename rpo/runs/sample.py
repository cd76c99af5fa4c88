"""`rpo sample`: images of prompts in a folder, with a contact sheet to look at.

    images/…png      one file for each image, named by its prompt, its seed and its column
    sheet.png        all of them in a grid, with words and numbers
    samples.json     prompt, seed, rewards and file of each; what they were drawn with; the numbers of each column

The columns are seeds, strengths of the LoRAs (a sweep), or two models (a comparison). `samples.json` is written last: a
folder without it is that of a killed run, and is begun anew.
"""

import json
import re
import shutil
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rpo.adapters.loading import load_model
from rpo.adapters.lora import load_lora
from rpo.adapters.lora_file import inspect_lora
from rpo.adapters.strength import at_strength
from rpo.errors import InputError
from rpo.evaluation.side_by_side import Drawn, Row, draw_side_by_side
from rpo.files.lock import LOCK, sole_owner
from rpo.files.text import write_text
from rpo.files.whole import write_whole, written_whole
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.models.distilled import refuse_distilled
from rpo.models.usual import usual_guidance, usual_steps
from rpo.reports.facts import environment_facts
from rpo.reports.sheet import MOST_ROWS, Sheet, SheetRow, draw_sheet, reduced
from rpo.rewards import Reward, load_reward
from rpo.runs.sample_best import draw_best, rows_of_candidates
from rpo.runs.sample_wish import BASE, Lora, Ways, Wish, adapter, check_selection, prompts_of, size_of, ways_of
from rpo.sampling.select import How

SAMPLES, SHEET, IMAGES, BEGUN = "samples.json", "sheet.png", "images", ".drawing"
DISTANCES = ("pixel_distance", "latent_distance")


def draw_samples(wish: Wish) -> Path:
    """Draw what is wished for.

    Returns:
        The folder.

    Raises:
        InputError: Prompts, a LoRA, a reward or a number cannot be; the model edits images; the folder holds something.
    """
    check_selection(wish)
    prompts, size, ways = prompts_of(wish.prompts), size_of(wish.size), ways_of(wish)
    rewards = {name: load_reward(name) for name in wish.rewards}
    _refuse_occupied(wish.output)
    model = load_model(replace(wish.model, allow_distilled=True))  # drawing undoes nothing
    refuse_editor(model, "`rpo sample`")
    refuse_unusual(model, wish.steps, wish.guidance)
    canvas, steps = model.canvas_of(size), usual_steps(model, wish.steps)
    guidance = usual_guidance(model, wish.guidance)
    load_loras(model, ways.loras)
    images = wish.images or (1 if len(ways.columns) > 1 or wish.best_of else 4)
    rows = rows_of_candidates(prompts, images, wish.seed, wish.best_of or 1)
    found = _Drawing(wish, ways, rows, images)
    with sole_owner(wish.output):
        _begin_anew(wish.output)
        for row, cell in _drawn(model, rows, ways, wish, How(steps, guidance, canvas=canvas), rewards):
            rows[cell.row] = row
            found.take(cell)
        with written_whole(wish.output / SHEET) as partial:
            draw_sheet(found.sheet(f"{steps} steps, guidance {guidance:g}, {canvas}")).save(partial, format="PNG")
        told = {
            "model": wish.model.source,
            "loras": [
                {"path": str(one.path), "strength": one.strength, "sha256": inspect_lora(one.path).sha256}
                for one in ways.loras
            ],
            "settings": {
                "num_steps": steps,
                "guidance_scale": guidance,
                "height": canvas.height,
                "width": canvas.width,
                "dtype": wish.model.dtype,
                **_selection(wish),
            },
            "made_with": dict(environment_facts()),
            "columns": found.columns(),
            "samples": found.samples,
        }
        write_whole(wish.output / SAMPLES, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        (wish.output / BEGUN).unlink()
    return wish.output


def _drawn(
    model: Checkpoint, rows: Sequence[Row], ways: Ways, wish: Wish, how: How, rewards: Mapping[str, Reward]
) -> Iterator[tuple[Row, Drawn]]:
    """The images as they are ready, each with the prompt and seed that it is of."""
    progress = "images" if wish.progress else None
    if wish.best_of:
        with at_strength(model, next(iter(ways.columns)).strengths):
            yield from draw_best(
                model,
                rows,
                rewards,
                wish.best_of,
                how,
                draft_steps=wish.draft_steps,
                looks=wish.looks,
                progress=progress,
            )
        return
    for cell in draw_side_by_side(
        model,
        rows,
        ways.columns,
        num_steps=how.num_steps,
        guidance_scale=how.guidance_scale,
        canvas=how.canvas,
        measured_from=ways.measured_from,
        rewards=rewards,
        progress=progress,
    ):
        yield rows[cell.row], cell


def _selection(wish: Wish) -> dict[str, Any]:
    """How images were chosen, if they were."""
    looks = {"look_after": list(wish.looks)} if wish.looks else {}
    return {"best_of": wish.best_of, "draft_steps": wish.draft_steps, **looks} if wish.best_of else {}


@final
@dataclass
class _Drawing:
    """What has been drawn so far: on the disk at once, small in memory for the sheet."""

    wish: Wish
    ways: Ways
    rows: Sequence[Row]
    images: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    shown: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict)
    captions: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the columns of the sheet are seeds."""
        return self.ways.measured_from is None

    def take(self, cell: Drawn) -> None:
        """Write an image, and note what is known of it."""
        row, column = self.rows[cell.row], self.ways.columns[cell.column]
        words = [f"{cell.row // self.images + 1:03d}", slug(row.prompt), f"seed-{row.seed}", slug(column.label)]
        file = f"{IMAGES}/{'-'.join(filter(None, words))}.png"
        with written_whole(self.wish.output / file) as partial:
            Image.fromarray(cell.pixels).save(partial, format="PNG")
        distances = {"pixel_distance": cell.pixel_distance, "latent_distance": cell.latent_distance}
        self.samples.append(
            {"file": file, "prompt": row.prompt, "seed": row.seed}
            | ({} if self.is_plain else {"column": column.label, **distances})
            | {"rewards": dict(cell.rewards)}
        )
        if cell.row < MOST_ROWS * (self.images if self.is_plain else 1):
            self.shown[cell.row, cell.column] = reduced(cell.pixels)
            self.captions[cell.row, cell.column] = "  ".join(f"{name} {one:.3g}" for name, one in cell.rewards.items())

    def columns(self) -> list[dict[str, Any]]:
        """The means of each column."""
        found = list[dict[str, Any]]()
        for column in self.ways.columns:
            own = [one for one in self.samples if self.is_plain or one["column"] == column.label]
            means = {name: float(np.mean([one["rewards"][name] for one in own])) for name in self.wish.rewards}
            far = {} if self.is_plain else {name: float(np.mean([one[name] for one in own])) for name in DISTANCES}
            strengths = [
                {"path": str(lora.path), "strength": column.strengths[adapter(number)]}
                for number, lora in enumerate(self.ways.loras)
            ]
            found.append({"column": column.label, "loras": strengths, "rewards": means, **far})
        return found

    def sheet(self, settings: str) -> Sheet:
        """The picture of it all."""
        loras = [str(lora) for lora in self.ways.loras]
        if self.wish.compare:
            labels = [one.label for one in self.ways.columns if one.label != BASE]
            loras = [f"{label}: {lora}" for label, lora in zip(labels, loras, strict=True)]
        title = "\n".join([self.wish.model.source, *loras])
        if self.is_plain:
            groups = range(0, len(self.rows), self.images)
            places = [[(start + number, 0) for number in range(self.images)] for start in groups]
            if (n := self.wish.best_of) is not None:  # each prompt has seeds of its own
                labels = [f"best of {n} by {self.wish.rewards[0]}"] * self.images
                lines = [self._line(some, note=self._seeds(some)) for some in places]
                return Sheet(title, settings, labels, lines)
            labels = [f"seed {self.rows[number].seed}" for number in range(self.images)]
            return Sheet(title, settings, labels, [self._line(some, note="") for some in places])
        places = [[(row, column) for column in range(len(self.ways.columns))] for row in range(len(self.rows))]
        lines = [self._line(some, note=f"seed {self.rows[some[0][0]].seed}") for some in places]
        return Sheet(title, settings, [one.label for one in self.ways.columns], lines, self._footer())

    def _seeds(self, places: Sequence[tuple[int, int]]) -> str:
        seeds = [str(self.rows[row].seed) for row, _ in places]
        return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"

    def _line(self, places: Sequence[tuple[int, int]], note: str) -> SheetRow:
        captions = [self.captions.get(place, "") for place in places] if self.wish.rewards else []
        shown = [self.shown[place] for place in places if place in self.shown]
        return SheetRow(self.rows[places[0][0]].prompt, shown, note, captions)

    def _footer(self) -> dict[str, list[str]]:
        means = self.columns()
        origin = self.ways.measured_from
        name = origin.label if origin else ""
        footer = {f"mean {one}": [f"{column['rewards'][one]:.3f}" for column in means] for one in self.wish.rewards}
        far = {one: [f"{column[one]:.4f}" for column in means] for one in DISTANCES}
        return footer | {f"{one.replace('_', ' ')} from {name}": values for one, values in far.items()}


def load_loras(model: Checkpoint, loras: Sequence[Lora]) -> None:
    """Load LoRAs beside each other, as the adapters `adapter(0)` and on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        for number, lora in enumerate(loras):
            load_lora(model, lora.path, name=adapter(number))


def slug(text: str) -> str:
    """What of a text can be in every file system's names."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", plain)[:40].strip("-.")


def refuse_unusual(model: Checkpoint, steps: int | None, guidance: float | None) -> None:
    """Refuse to draw a distilled checkpoint by its pipeline's usual numbers, which are those of the base."""
    if steps is not None and guidance is not None:
        return
    try:
        refuse_distilled(model.name, model.pipe, model.family)
    except InputError as error:
        raise InputError(
            f"{str(error).partition(': ')[0]}, so that its pipeline's usual steps and guidance are not its own; "
            "expected both; give them as its card says, such as --steps 4 --guidance 1"
        ) from None


def _refuse_occupied(folder: Path) -> None:
    """Refuse a folder that holds anything but what a killed run of this left."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; expected a folder; give another --output")
    names = {path.name for path in folder.iterdir()} - {LOCK} if folder.exists() else set[str]()
    if SAMPLES in names or (names and BEGUN not in names):
        what = "samples" if SAMPLES in names else f"{sorted(names)[0]} and is not of this command"
        raise InputError(f"{folder} already holds {what}; expected a new folder; give another --output, or remove it")


def _begin_anew(folder: Path) -> None:
    """Mark the folder as one in which images are being drawn, and take away what a killed run left."""
    _refuse_occupied(folder)
    write_text(folder / BEGUN, "")
    shutil.rmtree(folder / IMAGES, ignore_errors=True)
    (folder / SHEET).unlink(missing_ok=True)
