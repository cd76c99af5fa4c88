"""The card of a curated data set: who made what, under which licences, and how much came through each stage.

A folder on this machine is called by its last name only: paths are nobody's business.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCardData

from rpo.curation.status import RunStatus
from rpo.curation.store.run import CurationRun
from rpo.data.columns import DETAIL_COLUMNS
from rpo.files.local_paths import shown_path
from rpo.files.text import write_text
from rpo.publishing.model_card import PLACEHOLDER, is_hub_id
from rpo.publishing.publish import CARD
from rpo.reports.html import environment

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER = "n>1M"


@dataclass(frozen=True)
class CardSource:
    """A run that a data set has pairs of, as its card tells it."""

    name: str
    number: int
    """Pairs of it."""
    makers: Mapping[str, str]
    editor: str
    licence: str
    generator: str
    status: RunStatus


def write_dataset_card(
    folder: Path,
    runs: Sequence[tuple[CurationRun, RunStatus, int]],
    left_out: Mapping[str, int],
    form: str,
    licence: str | None,
) -> Path:
    """Write `README.md` into an exported data set.

    Args:
        runs: Each run, what it has come to, and how many pairs there are of it.
        left_out: Pairs that were not written, by reason.
    """
    sources = [_source(*one) for one in runs]
    num_pairs = sum(one.number for one in sources)
    templates = environment(is_html=False)
    templates.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    text = templates.get_template("dataset_card.md.j2").render(
        title="Rich preference pairs",
        form=form,
        place=PLACEHOLDER,
        columns=DETAIL_COLUMNS,
        sources=sources,
        num_pairs=num_pairs,
        left_out=left_out,
    )
    header = DatasetCardData(
        license=licence,
        task_categories=["text-to-image"],
        size_categories=[_size(num_pairs)],
        tags=["preference", "dpo", "image-editing", "rpo"],
    )
    path = folder / CARD
    write_text(path, f"---\n{header.to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text) + "\n")
    return path


def _source(run: CurationRun, status: RunStatus, number: int) -> CardSource:
    identities = run.identities()
    edits, sources = identities.get("edits", {}), identities.get("sources", {})
    return CardSource(
        name=Path(run.store.address).name,
        number=number,
        makers={stage: shown_settings(one) for stage, one in identities.items() if one},
        editor=shown_model(edits.get("model") or edits.get("kind", "")),
        licence=edits.get("licence", ""),
        generator=shown_model(sources.get("model", "")),
        status=status,
    )


def shown_model(name: str) -> str:
    """A model as others may know it: a hub id as it is, a folder of this machine by its last name."""
    name = shown_path(name)
    return name if "/" not in name or is_hub_id(name) else Path(name).name


def shown_settings(identity: Mapping[str, str]) -> str:
    """What decided a stage's results, in one line."""
    return ", ".join(f"{key}: {shown_model(value)}" for key, value in identity.items() if value)


def _size(count: int) -> str:
    return next((name for limit, name in _SIZES if count < limit), _LARGER)
