"""The files that a set may name: regular files inside its own folder, and nothing that would have to be fetched.

A set is somebody else's. What its lines name is read, decoded, and copied into exports, which are published; so a name
must not lead out of the folder, be it by "..", by a path from the root or by a symbolic link. The one link that may is
the hub cache's: there the files of a snapshot are links to the blobs of the same repository.
"""

import os
import stat
from functools import lru_cache
from pathlib import Path

from rpo.errors import InputError


def own_file(folder: Path, name: str) -> Path:
    """The file that a line or cell of a set names, relative to its folder."""
    if "://" in name:
        raise InputError(f"{name!r} is an address, and nothing is fetched; expected a file; download it first")
    if "\0" in name:
        raise InputError(f"{name!r} holds a NUL character; expected a file name; mend or remove the record")
    if Path(name).is_absolute():
        raise InputError(
            f"{name!r} is a path from the root; expected one relative to {folder}; put the file there and name it so"
        )
    path = folder / name
    if not is_own(folder, path):
        raise InputError(f"{name!r} leads out of the set's folder {folder}; expected a file inside; put it there")
    return path


def is_own(folder: Path, path: Path) -> bool:
    """Whether a path lies in a folder once all links are followed, or among the blobs of the folder's hub snapshot."""
    real = os.path.realpath(path)
    is_within = any(real == home or real.startswith(os.path.join(home, "")) for home in _homes(folder.absolute()))
    return is_within and not os.path.islink(real)  # which it is only if links go in a circle


@lru_cache(maxsize=8)
def _homes(folder: Path) -> tuple[str, ...]:
    home = Path(os.path.realpath(folder))
    snapshots = [above.parent for above in (home, *home.parents) if above.parent.name == "snapshots"]
    return (str(home), *(str(one.parent / "blobs") for one in snapshots))


def is_hidden(name: str) -> bool:
    """Whether a name is one that systems and editors leave behind: ._1.png, .DS_Store, __MACOSX, .ipynb_checkpoints."""
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file; a pipe or a device might never end."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError(f"it is {kind}, not a regular file")
    return Path(path).read_bytes()
