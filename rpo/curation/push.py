"""A curated data set on the Hugging Face Hub: a plan first, an upload only when asked for.

The plan lists every file that would be sent, and nothing else is sent.
"""

from pathlib import Path

from huggingface_hub import DatasetCard, HfApi

from rpo.curation.export import MARK
from rpo.errors import InputError
from rpo.local_paths import refuse_private
from rpo.publishing.publish import CARD, PlannedFile, PublishPlan, carry_out, check_repo_id


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    push: bool = False,
    private: bool = True,
    token: str | None = None,
    api: HfApi | None = None,
) -> PublishPlan:
    """Say what uploading an exported data set would send; upload it with `push=True`.

    Args:
        repo_id: "owner/name" on the Hub; made if it does not exist.
        token: Of the Hub; None for that of `hf auth login`.
        api: The client to upload with; None for the Hub's own.

    Returns:
        The plan, with the address of the repository if it was carried out.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not (folder / MARK).is_file() or not (folder / CARD).is_file():
        raise InputError(f"{folder} is no exported data set; expected {MARK} and {CARD} in it; run `rpo curate export`")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    files = tuple(PlannedFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    refuse_private(folder, [file.path for file in files])
    notes = [] if DatasetCard.load(folder / CARD).data.get("license") else ["the card names no license"]
    plan = PublishPlan(repo_id, private, files, tuple(notes))
    return carry_out(plan, folder, "dataset", token=token, api=api or HfApi()) if push else plan
