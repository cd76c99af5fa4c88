"""Which records this process does, and the locks that keep two processes from doing the same.

Process i of n does the records whose group, read as a number, leaves the remainder i when divided by n; so processes
need not talk to each other, and may be on several machines with one file system. A process holds its part alone, and
while it runs no other split of the same folder may run: 1 of 2 and 1 of 3 have records in common.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

from filelock import FileLock

from rpo.errors import InputError
from rpo.run_lock import is_taken, taken


@dataclass(frozen=True)
class Share:
    """Part `index` of `count`.

    Example:
        >>> Share(1, 4).owns("0000000000000005")
        True
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a part that there is not."""
        if not 0 <= self.index < self.count:
            raise InputError(
                f"part {self.index} of {self.count}; expected 0 to {max(self.count - 1, 0)} of at least 1; with 4 "
                "processes the parts are 0/4, 1/4, 2/4 and 3/4"
            )

    def owns(self, group: str) -> bool:
        """Whether the records of a group are this share's."""
        return int(group, 16) % self.count == self.index


def share_of(part: str, environment: Mapping[str, str]) -> Share:
    """The share that a configuration asks for, or else the one that torchrun or accelerate gave this process.

    Args:
        part: "0/4" for the first of four; empty to look into the environment.
    """
    if not part:
        return Share(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found:
        raise InputError(f"part is {part!r}; expected INDEX/COUNT; write part=0/4 for the first of four")
    return Share(int(found[1]), int(found[2]))


@final
class ShareLock:
    """Holds a share of a folder until it is closed; the system lets go of it when the process dies."""

    def __init__(self, folder: Path, share: Share) -> None:
        """Take the share."""
        folder.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        with FileLock(folder / "gate.lock"):
            _refuse_other_splits(folder, share)
            self._held.enter_context(
                taken(
                    folder / f"part-{share.index}-of-{share.count}.lock",
                    f"part {share.index} of {share.count} of {folder.parent} is in use",
                    "wait until it has ended, or give each process a part of its own: part=0/2 and part=1/2",
                )
            )

    def close(self) -> None:
        """Let go of the share."""
        self._held.close()


def _refuse_other_splits(folder: Path, share: Share) -> None:
    for other in sorted(folder.glob("part-*-of-*.lock")):
        count = other.stem.rpartition("-")[2]
        if count != str(share.count) and is_taken(other):
            raise InputError(
                f"processes that share {folder.parent} in {count} parts are at work, and part {share.index} of "
                f"{share.count} has records in common with theirs; expected one number of parts at a time; wait until "
                "they have ended"
            )
