"""The card of a curated data set: who made what, under which licences, and how much came through each stage.

A folder on this machine is called by its last name only: paths are nobody's business.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import DatasetCardData

from rpo.curation.status import RunStatus
from rpo.curation.store.folder import RunFolder
from rpo.data.columns import DETAIL_COLUMNS
from rpo.files.local_paths import shown_path
from rpo.files.text import write_text
from rpo.publishing.model_card import PLACEHOLDER, is_hub_id
from rpo.publishing.publish import CARD
from rpo.reports.html import environment

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER = "n>1M"


def write_dataset_card(folder: Path, run: RunFolder, status: RunStatus, form: str, licence: str | None) -> Path:
    """Write `README.md` into an exported data set."""
    identities = run.identities()
    edits, sources = identities.get("edits", {}), identities.get("sources", {})
    templates = environment(is_html=False)
    templates.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    text = templates.get_template("dataset_card.md.j2").render(
        title="Rich preference pairs",
        form=form,
        place=PLACEHOLDER,
        columns=DETAIL_COLUMNS,
        makers={stage: shown_settings(one) for stage, one in identities.items() if one},
        editor_licence=edits.get("licence", ""),
        editor_model=shown_model(edits.get("model") or edits.get("kind", "")),
        generator_model=shown_model(sources.get("model", "")),
        status=status,
    )
    header = DatasetCardData(
        license=licence,
        task_categories=["text-to-image"],
        size_categories=[_size(status.num_pairs)],
        tags=["preference", "dpo", "image-editing", "rpo"],
    )
    path = folder / CARD
    write_text(path, f"---\n{header.to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text) + "\n")
    return path


def shown_model(name: str) -> str:
    """A model as others may know it: a hub id as it is, a folder of this machine by its last name."""
    name = shown_path(name)
    return name if "/" not in name or is_hub_id(name) else Path(name).name


def shown_settings(identity: Mapping[str, str]) -> str:
    """What decided a stage's results, in one line."""
    return ", ".join(f"{key}: {shown_model(value)}" for key, value in identity.items() if value)


def _size(count: int) -> str:
    return next((name for limit, name in _SIZES if count < limit), _LARGER)
