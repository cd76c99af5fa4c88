"""A run as one HTML file: what became better, by how much, how it looks, how it was made and how to use it.

A report is a list of sections of plain data, so any trainer can write one. The file is complete in itself: pictures and
curves are inline, nothing is requested from anywhere (a content security policy makes the browser enforce it), and it
reads well in light, in dark and on paper.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.files.whole import write_whole
from rpo.reports.charts import draw
from rpo.reports.sections import (
    CommandsSection,
    ContestsSection,
    CurvesSection,
    FactsSection,
    LineupsSection,
    NumbersSection,
    PairsSection,
    PreviewsSection,
    Section,
    StagesSection,
    TableSection,
    TextSection,
)

if TYPE_CHECKING:
    from jinja2 import Environment

_FEW_SECONDS = 9.95  # below, a decimal is worth its place

SMALL_SIDE, LARGEST_SIDE = 128, 320
"""Pixels: below the first, an image is shown pixel by pixel; above the second, a photo is made smaller."""

TEMPLATES = Path(__file__).parent / "templates"


_PARTIALS: dict[type[Section], str] = {
    NumbersSection: "numbers",
    TableSection: "table",
    CurvesSection: "curves",
    PairsSection: "pairs",
    PreviewsSection: "previews",
    ContestsSection: "contests",
    LineupsSection: "lineups",
    TextSection: "text",
    CommandsSection: "commands",
    FactsSection: "facts",
    StagesSection: "stages",
}


@dataclass(frozen=True)
class Report:
    """A whole report: its title, the result in a sentence, and its sections in reading order."""

    title: str
    summary: str
    sections: tuple[Section, ...]
    subtitle: str = ""


def environment(*, is_html: bool = True) -> "Environment":
    """What fills in the templates of this folder; in HTML every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here, so that `import rpo` stays quick

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=is_html,
    )


def guide(name: str) -> list[dict[str, str]]:
    """What the numbers of a kind of run mean: texts with the metric that each belongs to, from `templates/`."""
    file = Path(__file__).parent / "templates" / f"guide_{name}.yaml"
    return [{"term": "", **one} for one in yaml.safe_load(read_text(file))]


def render(report: Report) -> str:
    """The report as HTML text.

    Returns:
        A complete page; every text of the report is escaped.
    """
    templates = environment()
    templates.filters |= {"data_uri": data_uri, "photo_uri": photo_uri, "duration": format_duration}
    templates.globals |= {"draw": draw}
    sections = [(f"section-{n}", _PARTIALS[type(section)], section) for n, section in enumerate(report.sections, 1)]
    return templates.get_template("report.html.j2").render(report=report, sections=sections)


def write_report(report: Report, path: Path) -> Path:
    """Write the report; an older file at `path` stays whole until the new one is complete."""
    write_whole(path, render(report))
    return path


def data_uri(pixels: np.ndarray) -> str:
    """An image as an inline PNG address, pixel for pixel."""
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise InputError(
            f"image has dtype {pixels.dtype} and shape {pixels.shape}, but a report shows uint8 [height, width, 3]; "
            "convert with (255 * image).round().astype('uint8')"
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def photo_uri(pixels: np.ndarray) -> str:
    """An image to be looked at: as it is if it is small; else at most `LARGEST_SIDE` pixels wide or high, as JPEG."""
    from PIL import Image

    longer = max(pixels.shape[:2])
    if longer <= SMALL_SIDE:
        return data_uri(pixels)
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def format_duration(seconds: float) -> str:
    """Seconds as people write them: `0.42 s`, `37 s`, `6 min 12 s`, `2 h 5 min`."""
    if seconds < _FEW_SECONDS:
        return f"{seconds:.2g} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, whole_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {whole_minutes} min"
    return f"{minutes} min {whole_seconds} s" if minutes else f"{whole_seconds} s"
