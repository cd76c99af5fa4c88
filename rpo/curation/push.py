"""A curated data set on the Hugging Face Hub: a plan first, an upload only when asked for.

The plan lists every file that would be sent, and nothing else is sent.
"""

import glob
from dataclasses import replace
from pathlib import Path

from huggingface_hub import DatasetCard, HfApi

from rpo.curation.card import CARD
from rpo.curation.export import MARK
from rpo.model_card import PLACEHOLDER
from rpo.publish import PlannedFile, PublishPlan, check_repo_id


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
        folder: Written by `export`.
        repo_id: "owner/name" on the Hub; made if it does not exist.
        push: Really upload.
        private: Whether only its owner may see the repository.
        token: Of the Hub; None for that of `hf auth login`.
        api: The client to upload with; None for the Hub's own.

    Returns:
        The plan, with the address of the repository if it was carried out.

    Raises:
        ValueError: The folder is no export, the name is no repository's, or the repository is public already and
            `private` was asked for.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not (folder / MARK).is_file() or not (folder / CARD).is_file():
        raise ValueError(f"{folder} is no exported data set; expected {MARK} and {CARD} in it; run `rpo curate export`")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    files = tuple(PlannedFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    notes = [] if DatasetCard.load(folder / CARD).data.get("license") else ["the card names no license"]
    plan = PublishPlan(repo_id, private, files, tuple(notes))
    return _carry_out(plan, folder, token, api or HfApi()) if push else plan


def _carry_out(plan: PublishPlan, folder: Path, token: str | None, api: HfApi) -> PublishPlan:
    url = str(api.create_repo(plan.repo_id, token=token, private=plan.private, repo_type="dataset", exist_ok=True))
    # The Hub leaves an existing repository as visible as it is, whatever was asked for.
    if plan.private and not api.dataset_info(plan.repo_id, token=token).private:
        raise ValueError(
            f"{plan.repo_id} exists already and is public, but private=True was asked for; nothing was uploaded: give "
            "private=False, or another name"
        )
    card = folder / CARD
    card.write_text(card.read_text("utf-8").replace(PLACEHOLDER, plan.repo_id), "utf-8")
    api.upload_folder(
        repo_id=plan.repo_id,
        folder_path=folder,
        token=token,
        repo_type="dataset",
        allow_patterns=[glob.escape(file.path) for file in plan.files],
        commit_message="Upload data set with rpo",
    )
    return replace(plan, url=url)
