"""What a resumed run must have in common with the one that it continues; asked before anything is touched.

A run is what it learns from and how: its checkpoints hold its identity, plain text by the name that a person knows, and
whatever differs is refused. The versions of the libraries are there too: another one is only said.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from rpo.errors import InputError
from rpo.files.lock import sole_owner
from rpo.interrupts import ended_in_order
from rpo.training.checkpoint import (
    RUN,
    checkpoint_path,
    checkpoints,
    read_part,
    remedy_for,
    update_of,
    verify_checkpoint,
)
from rpo.training.log import METRICS_FILE
from rpo.training.loop_config import LoopConfig, check_unchanged, plain, refuse_changed
from rpo.training.processes import Processes

Identity = Mapping[str, str]

_LIBRARIES = ("rpo", "torch", "diffusers", "transformers", "peft", "accelerate")


@contextmanager
def claimed(
    folder: Path, loop: LoopConfig, identity: Identity, processes: Processes, *, resume: bool
) -> Iterator[None]:
    """Inside, the folder is this run's own, and may be written to; SIGTERM and SIGHUP end it as Ctrl-C does."""
    # What is shown and logged may be the main process's alone.
    shared = {name: str(one) for name, one in plain(loop).items() if name not in ("progress", "trackers")}
    processes.require_same({**identity, **shared, "resume": str(resume)})
    with ExitStack() as held:
        error: Exception | None = None
        if processes.is_main:
            try:
                held.enter_context(sole_owner(folder))
                if resume:
                    _check_same(folder, loop, identity, processes.count)
                else:
                    refuse_used(folder)
            except (OSError, ValueError) as caught:
                error = caught
        processes.fail_together(error)
        held.enter_context(ended_in_order())
        yield


def refuse_used(folder: Path) -> None:
    """Refuse a folder that holds a run already; one that ended before its first update left nothing to keep."""
    metrics = folder / METRICS_FILE
    if (metrics.exists() and metrics.stat().st_size > 0) or any(folder.glob("checkpoint-*")):
        raise InputError(
            f"{folder} already holds a run; expected a new folder: choose another, or pass resume=True to continue it"
        )


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the last bits of a run."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _check_same(folder: Path, loop: LoopConfig, identity: Identity, processes: int) -> None:
    for path in checkpoints(folder)[-1:]:
        verify_checkpoint(path, only=RUN)
        run = read_part(path, RUN)
        if run["update"] != update_of(path):
            raise InputError(
                f"{path} holds the state after {run['update']} updates; expected what its name says: rename it to "
                f"{checkpoint_path(folder, run['update']).name}, or {remedy_for(path)}"
            )
        # What a person gave comes before what was worked out from it, such as the micro-batches of an update.
        refuse_changed(identity, run.get("identity", {}), str(path))
        check_unchanged(loop, run["loop"], str(path), same_processes=run["processes"] == processes)
        if run["update"] > loop.updates:
            raise InputError(
                f"{path} is past the end, updates={loop.updates}; expected updates={run['update']} or more: raise "
                "updates, or delete the later checkpoints"
            )
        before = run.get("versions", {})
        changed = [f"{name} {before.get(name)} → {now}" for name, now in versions().items() if before.get(name) != now]
        if changed:
            tqdm.write(f"resumed with other versions, so the last bits may differ: {', '.join(changed)}")
