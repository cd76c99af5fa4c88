"""Where a run lies: a folder of this disk, or any address that fsspec knows ("s3://bucket/run", "memory://run").

A file is there whole or not at all: on a disk it is written beside its place and renamed, an object store puts whole
objects by itself. Nothing is ever appended to, and nothing is locked.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rpo.errors import InputError
from rpo.files.partial import SUFFIX, sweep
from rpo.files.whole import written_whole


@final
class Store:
    """The files of a run, by their names within it.

    Attributes:
        address: As it was given.
        folder: The folder on this disk; None for another address.
        is_shared: Whether other processes see it; what is in memory they do not.
    """

    def __init__(self, address: str | Path) -> None:
        """Name the place; nothing is made before something is written."""
        self.address = str(address)
        files: Any
        try:
            files, root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{self.address} cannot be used as the place of a run ({error}); expected a folder, or an address that "
                "fsspec knows; install its library (s3:// needs `pip install 'rpo[s3]'`), or correct the address"
            ) from error
        self._files, self._root = files, root.rstrip("/")
        self.folder = Path(root) if isinstance(files, LocalFileSystem) else None
        self.is_shared = "memory" not in ([files.protocol] if isinstance(files.protocol, str) else files.protocol)

    def place(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """What a file holds; a `FileNotFoundError` if there is none."""
        return self._files.cat_file(self._path(name))

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """What several files hold, without those that there are not; an object store is asked for all at once."""
        paths = {self._path(name): name for name in names}
        found = self._files.cat(list(paths), on_error="omit") if paths else {}
        return {paths[path]: data for path, data in found.items()}

    def reader(self, name: str) -> Any:
        """A file to read here and there of."""
        return self._files.open(path=self._path(name), mode="rb")

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, whole."""
        path = self._path(name)
        if self.folder is None:
            self._files.pipe_file(path, data)
            return
        with written_whole(Path(path)) as partial:
            partial.write_bytes(data)

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        try:
            self._files.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def remove_if_empty(self, folder: str) -> None:
        """Take a folder of a disk away if nobody has anything in it; elsewhere there are no folders."""
        if self.folder is not None:
            with suppress(OSError):
                Path(self._path(folder)).rmdir()

    def names(self, folder: str) -> list[str]:
        """Last names of what a folder holds, in their order, without files in the making; none if it is not there."""
        self._files.invalidate_cache()  # others write meanwhile
        try:
            found = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if not name.endswith(SUFFIX))

    def sweep(self, folder: str, *, is_deep: bool = False) -> None:
        """Take away what killed writers have left half-written; only a disk has such files."""
        if self.folder is not None:
            sweep(Path(self._path(folder)), is_deep=is_deep)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")
