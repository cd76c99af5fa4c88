"""A model card that says what was done and measured, and leaves out what nobody knows.

What can be read from the weights themselves (rank, alpha, layers, checksum) is read from them. The header is what the
Hugging Face Hub needs to show a LoRA under its base model, with a gallery. Fields that are not given do not appear.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rpo.adapters.formats.write import PLACES
from rpo.adapters.lora_file import WEIGHT_FILE, LoraFile, inspect_lora
from rpo.evaluation.comparison import PairedComparison, format_gain, format_share
from rpo.evaluation.intervals import Interval
from rpo.files.local_paths import shown_path, without_paths
from rpo.files.whole import write_whole
from rpo.from_environment import as_written
from rpo.publishing.licenses import License, license_of_base
from rpo.publishing.methods import METHODS

TEMPLATES = Path(__file__).parents[1] / "reports" / "templates"

PLACEHOLDER = "OWNER/NAME"
"""Stands in the load snippet for a repository that has no name yet; `publish` puts the name there."""

SAMPLE_SIDE = 256
"""Samples smaller than this are enlarged by a whole factor, pixel by pixel: the Hub's gallery would blur them."""

NOT_MEASURED = (
    "No measurement against the base is recorded here: compare both on prompts of your own, with the same seeds."
)
"""What a card says that has no numbers."""

_LOCAL_SETTINGS = ("folder", "output")
"""Settings that say something about the machine of training and nothing about the model end in one of these."""


@dataclass(frozen=True)
class Sample:
    """An image by the published model (uint8, height × width × 3) and its prompt."""

    prompt: str
    pixels: np.ndarray


@dataclass(frozen=True)
class CardFacts:
    """What is known about a model; everything but the method may be left open."""

    method: str
    """How it was trained, as in "Diffusion-DPO"."""
    base_model: str | None = None
    """What `from_pretrained` was given: a hub id, which the header names, or a local folder, of which only the name is
    told."""
    base_expression: str = ""
    """Python for the snippet where the base is no hub id, as in `rpo.shapes.path()`."""
    imports: tuple[str, ...] = ()
    """Import lines that `base_expression` needs."""
    preparation: tuple[str, ...] = ()
    """Lines of Python after which the base, as `pipe`, loads a LoRA; most need none."""
    title: str = ""
    description: str = ""
    """A paragraph on what the model is good for."""
    data: str = ""
    """What it was trained on: how many pairs, where they come from, who or what judged them."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the data."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What identifies data and base, by name: counts and hashes."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Hyper-parameters; nested ones are joined by dots, those that are None or name a folder are left out."""
    edits: bool = False
    """Whether it draws from an image beside the prompt."""
    call: Mapping[str, float | str] = field(default_factory=dict)
    """Arguments that the model is meant to be called with, as in `guidance_scale`."""
    results: Mapping[str, tuple[PairedComparison, ...]] = field(default_factory=dict)
    """Measurements against the base, by heading."""
    results_note: str = ""
    """How they were measured: judge, prompts, seeds, the command that repeats it."""
    samples: tuple[Sample, ...] = ()
    samples_note: str = ""
    """How the samples were chosen."""
    license: str | None = None
    """Licence id of the Hub; that of a base which is well known, is in the package, or has a card is filled in."""
    license_name: str | None = None
    license_link: str | None = None
    """Both for the licence "other"."""
    license_notes: str = ""
    limitations: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def write_model_card(folder: str | os.PathLike[str], card: CardFacts) -> Path:
    """Write `README.md` into a folder with a LoRA or a pipeline, and its sample images under `images/`."""
    folder = Path(folder)
    lora = None if (folder / "model_index.json").is_file() else inspect_lora(folder)
    images = _save_samples(folder, card.samples)
    data = _header(card, images, is_lora=lora is not None)
    others = [name for name, place in PLACES.items() if (folder / place).exists()]
    content = f"---\n{data.to_yaml()}\n---\n\n{_body(card, lora, others)}"
    path = folder / "README.md"
    write_whole(path, ModelCard(content).content)
    return path


def is_hub_id(name: str | None) -> bool:
    """Whether a checkpoint's name is a repository "owner/name" rather than a local path."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _header(card: CardFacts, images: list[str], *, is_lora: bool) -> ModelCardData:
    tags = [_task(card), "diffusers", *(["lora", "template:sd-lora"] if is_lora else []), "rpo", *card.tags]
    known = license_of_base(card.base_model, expression=card.base_expression) or License("")
    licence = License(card.license, card.license_name, card.license_link) if card.license else known
    optional = {
        "license_name": licence.name,
        "license_link": licence.link,
        "datasets": list(card.datasets),
        "widget": [
            {"text": sample.prompt, "output": {"url": url}} for sample, url in zip(card.samples, images, strict=True)
        ],
    }
    return ModelCardData(
        base_model=card.base_model if is_hub_id(card.base_model) else None,
        library_name="diffusers",
        pipeline_tag=_task(card),
        license=licence.id or None,
        tags=list(dict.fromkeys(tags)),
        **{name: value for name, value in optional.items() if value},
    )


def _body(card: CardFacts, lora: LoraFile | None, formats: list[str]) -> str:
    text = template("model_card.md.j2").render(
        card=card,
        shown=_shown,
        method=METHODS.get(card.method),
        not_measured=NOT_MEASURED,
        lora=lora,
        formats=formats,
        places=PLACES,
        base=_base(card),
        is_hub_id=is_hub_id(card.base_model),
        snippet=_snippet(card, lora),
        settings=list(_flat(card.settings)),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def template(name: str) -> Any:
    """One of those for cards, in Markdown; its filter `cell` makes a text fit into a table."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell}
    return environment.get_template(name)


def _base(card: CardFacts) -> str:
    """The base as a sentence names it; of a local folder the name alone, for its path is nobody's business."""
    name = card.base_model or ""
    return name if is_hub_id(name) else card.base_expression or shown_path(name)


def _snippet(card: CardFacts, lora: LoraFile | None) -> str:
    base = card.base_expression or _quoted(card.base_model if is_hub_id(card.base_model) else "path/to/the/base")
    source = base if lora else _quoted(PLACEHOLDER)
    lines = [*card.imports, "from diffusers import DiffusionPipeline"]  # which knows every class
    lines += ["from diffusers.utils import load_image"] if card.edits else []
    lines += ["", f"pipe = DiffusionPipeline.from_pretrained({source})"]
    if lora:
        lines += [
            *card.preparation,
            f'pipe.load_lora_weights("{PLACEHOLDER}", weight_name="{WEIGHT_FILE}", adapter_name="aligned")',
            'pipe.set_adapters("aligned", 1.0)  # less than 1.0 for a weaker effect',
        ]
    prompt = card.samples[0].prompt if card.samples else "your prompt"
    arguments = "".join(f", {name}={value!r}" for name, value in card.call.items())
    image = ', image=load_image("source.png")' if card.edits else ""
    return "\n".join([*lines, f"image = pipe(prompt={prompt!r}{image}{arguments}).images[0]"])


def _task(card: CardFacts) -> str:
    return "image-to-image" if card.edits else "text-to-image"


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and not name.endswith(_LOCAL_SETTINGS):
            yield shown_path(f"{prefix}{name}"), without_paths(as_written(value))


def _shown(row: PairedComparison) -> tuple[str, str, str]:
    """Both models' numbers and the gain: shares in per cent, or scores in the judge's own unit."""
    if row.is_share:
        return format_share(row.before), format_share(row.after), format_gain(row.gain)
    return _score(row.before), _score(row.after), _score(row.gain, sign="+")


def _score(one: Interval, sign: str = "") -> str:
    value, low, high = (format(number, f"{sign}.4g") for number in (one.value, one.low, one.high))
    return f"{value} [{low}, {high}]"


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _save_samples(folder: Path, samples: tuple[Sample, ...]) -> list[str]:
    from PIL import Image

    for old in (folder / "images").glob("*.png"):
        if old.stem.isdecimal():  # of an earlier card
            old.unlink()
    names = [f"images/{index}.png" for index in range(len(samples))]
    for name, sample in zip(names, samples, strict=True):
        factor = max(1, -(-SAMPLE_SIDE // max(sample.pixels.shape[:2])))
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(sample.pixels.repeat(factor, axis=0).repeat(factor, axis=1)).save(folder / name)
    return names
