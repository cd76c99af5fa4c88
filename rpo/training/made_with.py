"""What a run is made with beside its settings, kept in its folder: whoever repeats it is told what is different now.

Code and libraries decide a run's last bits, the machine its kernels, and what it learns from everything. All of it is
text by the name that a person knows, so that a difference is two words: what was, and what is.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.files.whole import write_whole
from rpo.training.resume import versions

MADE_WITH = "made_with.json"
"""The file in a run's folder."""


@dataclass(frozen=True)
class MadeWith:
    """What a run is made with."""

    settings: str
    """Name of the class of its settings, which tells the command."""
    versions: Mapping[str, str]
    code: Mapping[str, str]
    """Of rpo itself: a hash of its files, and the commit where they are from one."""
    machine: Mapping[str, str]
    learns_from: Mapping[str, str]
    """Hashes of checkpoint, data and prompts, and every setting that counts."""
    resumed_with: tuple[Mapping[str, str], ...] = ()
    """What was different when it was continued, if anything was."""

    def differences(self, now: "MadeWith") -> dict[str, str]:
        """What is different now, by name: "was OLD, is NEW". Another commit of the same code is no difference."""
        told: dict[str, str] = {}
        for part in ("learns_from", "versions", "code", "machine"):
            before, after = getattr(self, part), getattr(now, part)
            changed = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
            if part != "code" or "rpo's files" in changed:
                told |= {name: f"was {_shown(before, name)}, is {_shown(after, name)}" for name in changed}
        return told


def made_with(settings: str, learns_from: Mapping[str, str], *, processes: int = 1) -> MadeWith:
    """What a run that begins now is made with."""
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "kernels of the CPU": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "processes": str(processes),
    }
    found = {"python": platform.python_version(), **versions()}
    return MadeWith(settings, found, _code(), machine, dict(learns_from))


def keep_made_with(folder: Path, now: MadeWith) -> None:
    """Write it when a run begins; when one is continued, note what has become different."""
    if (folder / MADE_WITH).exists():
        begun = read_made_with(folder)
        changed = replace(begun, learns_from={}).differences(replace(now, learns_from={}))
        if not changed or changed in begun.resumed_with:
            return
        now = replace(begun, resumed_with=(*begun.resumed_with, changed))
    write_whole(folder / MADE_WITH, json.dumps(asdict(now), indent=1, ensure_ascii=False) + "\n")


def read_made_with(folder: Path) -> MadeWith:
    """What a run was made with.

    Raises `InputError` if its folder does not say.
    """
    file = folder / MADE_WITH
    if not file.is_file():
        raise InputError(
            f"{folder} has no {MADE_WITH}; expected that of a run of `rpo train`, `rpo align` or `rpo quickstart`, "
            "which write it; give its folder"
        )
    try:
        found: dict[str, Any] = json.loads(read_text(file))
        return MadeWith(**{**found, "resumed_with": tuple(found["resumed_with"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error}); expected what its run wrote; restore it") from error


def _shown(values: Mapping[str, str], name: str) -> str:
    return values.get(name) or "not told"


def _code() -> dict[str, str]:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return {"rpo's files": digest.hexdigest()[:16], "rpo's commit": _commit(package)}


def _commit(package: Path) -> str:
    """The commit that the package is checked out from or was installed from; empty where there is none."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=package, capture_output=True, check=True, timeout=30)
        return found.stdout.decode("utf-8", errors="replace").strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # or it lies in the checkout of something else
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        noted = distribution("rpo").read_text  # no file's: the library's own, always in UTF-8
        told = json.loads(noted("direct_url.json") or "{}")  # PEP 610
        return str(told.get("vcs_info", {}).get("commit_id", ""))
    except (PackageNotFoundError, ValueError):
        return ""
