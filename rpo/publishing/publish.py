"""Publishing a LoRA or a pipeline on the Hugging Face Hub: a plan first, an upload only when asked for.

The plan lists every file that would be sent, and nothing else is sent: no optimizer state, no checkpoints, no hidden
files. A folder without working weights or without a model card is refused.
"""

import glob
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora
from rpo.errors import InputError
from rpo.files.local_paths import refuse_private
from rpo.files.text import read_text, write_text
from rpo.models.loading import check_folder
from rpo.publishing.model_card import PLACEHOLDER, CardFacts, Sample, write_model_card

__all__ = ["CardFacts", "PlannedFile", "PublishPlan", "Sample", "publish", "write_model_card"]

CARD = "README.md"
"""What the Hub shows of a repository."""

TRAINING_STATE = re.compile(r"(^|/)(checkpoint-\d+|optimizer|random_states|scaler\b)|\.(pt|pth|bin|ckpt|pkl|pickle)$")
"""Paths that have no place beside published weights: state of a training run, and pickles, which can run code."""

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the library raises by which the Hub's client asks: of answers, and of connections that fail."""

_STEPS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True)
class PlannedFile:
    """A file that is uploaded: its path in the repository and its size."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class PublishPlan:
    """What publishing does, or did: `url` is set once it is done."""

    repo_id: str
    private: bool
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    """What to know or to mend before others see it."""
    url: str | None = None

    def __str__(self) -> str:
        """The plan for the terminal."""
        kind = "private" if self.private else "public"
        verb = f"uploaded to {self.url}" if self.url else f"dry run: nothing was sent; would go to {self.repo_id}"
        lines = [f"{verb} ({kind})"]
        lines += [f"  {format_size(file.size_bytes):>10}  {file.path}" for file in self.files]
        lines.append(f"  {format_size(sum(file.size_bytes for file in self.files)):>10}  in {len(self.files)} files")
        lines += [f"note: {note}" for note in self.notes]
        if not self.url:
            lines.append("to upload it, log in with `hf auth login` and publish again with --push (push=True)")
        return "\n".join(lines)


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    push: bool = False,
    private: bool = True,
    token: str | None = None,
    api: HfApi | None = None,
) -> PublishPlan:
    """Check a folder for publishing and say what would be uploaded; upload it with `push=True`.

    Args:
        folder: Holds a LoRA or a pipeline, and its model card.
        repo_id: "owner/name" on the Hub; made if it does not exist.
        token: Of the Hub; None for that of `hf auth login`.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    notes = _check_weights(folder)
    files, hidden = _files(folder)
    notes += _check_card(folder)
    refuse_private(folder, [file.path for file in files])
    notes += [f"left out, being hidden: {', '.join(hidden)}"] if hidden else []
    plan = PublishPlan(repo_id, private, files, tuple(notes))
    return carry_out(plan, folder, "model", token=token, api=api or HfApi()) if push else plan


def publishable(run: str | os.PathLike[str]) -> Path:
    """The folder of a run that is published: the LoRA or the pipeline in it, or itself if it is one.

    Raises `InputError` if there is neither.
    """
    places = [Path(run) / "lora" / WEIGHT_FILE, Path(run) / "pipeline" / "model_index.json"]
    places += [Path(run) / WEIGHT_FILE, Path(run) / "model_index.json"]
    if found := next((place.parent for place in places if place.is_file()), None):
        return found
    raise InputError(
        f"{run} holds no result: no lora/{WEIGHT_FILE} and no pipeline; expected the folder of a run that has ended, "
        "or of a LoRA; finish it with --resume, or give another folder"
    )


def format_size(size_bytes: int) -> str:
    """Bytes as people write them: `812 B`, `3.1 MiB`."""
    found = [f"{size_bytes / step:.1f} {unit}" for step, unit in _STEPS if size_bytes >= step]
    return found[0] if found else f"{size_bytes} B"


def carry_out(
    plan: PublishPlan, folder: Path, repo_type: Literal["model", "dataset"], *, token: str | None, api: HfApi
) -> PublishPlan:
    """Upload what a plan lists, with its repository named in the card.

    Raises `InputError` if the Hub refuses or cannot be reached; it may be repeated, and sends no file twice.
    """
    try:
        return _uploaded(plan, folder, repo_type, token=token, api=api)
    except (HTTP_ERROR, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of a large file, the client wraps it
        if not isinstance(cause, HTTP_ERROR):
            raise
        raise InputError(
            f"{plan.repo_id} was not uploaded whole: {cause}; expected the Hub to take it; see `hf auth whoami`, your "
            "rights and the network, and publish again: what has arrived is not sent again"
        ) from error


def _uploaded(
    plan: PublishPlan, folder: Path, repo_type: Literal["model", "dataset"], *, token: str | None, api: HfApi
) -> PublishPlan:
    url = str(api.create_repo(plan.repo_id, token=token, private=plan.private, repo_type=repo_type, exist_ok=True))
    # The Hub leaves an existing repository as visible as it is, whatever was asked for.
    if plan.private and not api.repo_info(plan.repo_id, repo_type=repo_type, token=token).private:
        raise InputError(
            f"{plan.repo_id} exists already and is public, but private=True was asked for; nothing was uploaded: give "
            "private=False, or another name"
        )
    card = folder / CARD
    write_text(card, read_text(card).replace(PLACEHOLDER, plan.repo_id))
    api.upload_folder(
        repo_id=plan.repo_id,
        folder_path=folder,
        token=token,
        repo_type=repo_type,
        allow_patterns=[glob.escape(file.path) for file in plan.files],
        commit_message=f"Upload {repo_type} with rpo",
    )
    return replace(plan, url=url)


def check_repo_id(repo_id: str) -> None:
    """Refuse what is not the name of a repository with its owner."""
    try:
        validate_repo_id(repo_id)
        fault = "" if repo_id.count("/") == 1 else "whose it is must be clear"
    except HFValidationError as error:
        fault = str(error)
    if fault:
        raise InputError(f"repo_id {repo_id!r} is no name on the Hub ({fault}); use owner/name")


def _check_weights(folder: Path) -> list[str]:
    if (folder / "model_index.json").is_file():
        check_folder(folder)
        return []
    if not (folder / WEIGHT_FILE).is_file():
        raise InputError(
            f"{folder} holds neither {WEIGHT_FILE} nor model_index.json, but there must be something to publish; give "
            "the folder that save() returned"
        )
    if inspect_lora(folder).is_portable:
        return []
    return ["alpha differs from the rank: programs that ignore the metadata apply the LoRA at another strength"]


def _check_card(folder: Path) -> list[str]:
    card = folder / CARD
    if not card.is_file():
        raise InputError(f"{folder} has no model card {CARD}, and nobody can use a model without; see write_model_card")
    data = ModelCard.load(card).data
    missing = [name for name in ("license", "base_model") if not data.get(name)]
    return [f"the card names no {name}" for name in missing]


def _files(folder: Path) -> tuple[tuple[PlannedFile, ...], list[str]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
    shown = [name for name in names if name not in hidden]
    if state := [name for name in shown if TRAINING_STATE.search(name)]:
        raise InputError(
            f"{folder} holds {len(state)} files of training state or pickles, such as {state[0]}, but only what a "
            "user of the model needs is published; save the model into a folder of its own"
        )
    return tuple(PlannedFile(name, names[name].stat().st_size) for name in shown), hidden
