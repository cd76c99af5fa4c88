"""Tensors on disk under a key, in one SQLite file that survives being killed at any moment.

A write is one transaction: after a crash each tensor is there whole or not at all, and several processes on one machine
can use the file at once. Rows are never changed: a key stands for everything that determines its tensor. Each has a
checksum, and one that a disk has damaged is dropped when it is read, so that it is missing and made again.
SQLite's shared log does not work across machines: on a network disk, give each machine its own folder.
"""

import errno
import os
import sqlite3
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.files.whole import name_full_disk

_LAYOUT = 2  # of the table; stored in the file, so that another layout is refused and not misread
_WAIT_SECONDS = 120.0  # for another process that is writing
_PAUSE_SECONDS = 0.05
_KEYS_PER_QUERY = 500  # SQLite's oldest limit on variables is 999
_PAGE_BYTES = 16384  # tensors are tens of KiB; the default of 4096 chains many overflow pages
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class TensorStore:
    """A file of tensors, each under a key of bytes.

    Example:
        >>> store = TensorStore(Path("cache/latents.sqlite"))
        >>> store.save({b"key": torch.zeros(2, 4)})
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file."""
        self.path = path
        self._process = os.getpid()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            # Callers take turns by a lock of their own, so that another thread may use the connection.
            self._connection = sqlite3.connect(path, _WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            self._connection.text_factory = lambda text: text.decode(errors="replace")  # a damaged one, too
            self._prepare()

    def present(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of the keys have a tensor."""
        return {row[0] for row in self._select("key", keys)}

    def load(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The tensors of those keys that have one; damaged ones are dropped, with a warning."""
        rows = list(self._select("*", keys))
        damaged = [(key,) for key, *tensor, checksum in rows if _checksum(key, *tensor) != checksum]
        if damaged:
            with self._named_errors(), self._transaction():
                self._connection.executemany("DELETE FROM tensors WHERE key = ?", damaged)
            warnings.warn(
                f"{self.path}: {len(damaged)} entries are damaged and are made again; see whether the disk is sound",
                stacklevel=2,
            )
        return {key: _unpack(*tensor) for key, *tensor, _ in rows if (key,) not in damaged}

    def save(self, tensors: Mapping[bytes, Tensor]) -> None:
        """Keep tensors, all of them or, if that fails, none; a key that is there already keeps what it has."""
        packed = {key: _pack(tensor) for key, tensor in tensors.items()}
        rows = [(key, *tensor, _checksum(key, *tensor)) for key, tensor in packed.items()]
        with self._named_errors(), self._transaction():
            self._connection.executemany("INSERT OR IGNORE INTO tensors VALUES (?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _prepare(self) -> None:
        self._connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        self._turn_to_wal()
        self._connection.execute("PRAGMA synchronous=NORMAL")  # in WAL mode a power cut loses the last writes at most
        with self._transaction():
            (layout,) = self._connection.execute("PRAGMA user_version").fetchone()
            if layout not in (0, _LAYOUT):
                raise InputError(
                    f"{self.path} has layout {layout}; expected layout {_LAYOUT}, of this version of rpo; "
                    "delete the file (it will be filled again) or use another folder"
                )
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS tensors "
                "(key BLOB PRIMARY KEY, dtype TEXT, shape TEXT, data BLOB, checksum INT)"
            )
            self._connection.execute(f"PRAGMA user_version={_LAYOUT}")

    def _turn_to_wal(self) -> None:
        """Set the journal's mode, for which SQLite itself does not wait while another process opens the file."""
        last = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _select(self, columns: str, keys: Sequence[bytes]) -> Iterator[tuple]:
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            query = f"SELECT {columns} FROM tensors WHERE key IN ({','.join('?' * len(some))})"
            with self._named_errors():
                yield from self._connection.execute(query, some)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has rolled back by itself when the disk is full
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        if os.getpid() != self._process:
            raise InputError(
                f"{self.path} was opened by process {self._process} and is used by process {os.getpid()}; "
                "expected one process, or SQLite damages the file; open it again after forking"
            )
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.DatabaseError) -> Exception:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            return name_full_disk(OSError(errno.ENOSPC, str(error)), self.path)
        if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return InputError(
                f"{self.path} is damaged or no cache file ({error}); expected one that rpo wrote; "
                "delete the file: it will be filled again"
            )
        return OSError(errno.EIO, f"{self.path}: {error}; see whether the disk is sound, and has room")


def _pack(tensor: Tensor) -> tuple[str, str, bytes]:
    if str(tensor.dtype) not in _DTYPES:
        raise InputError(f"a tensor is {tensor.dtype}; expected {', '.join(_DTYPES)}; convert it before storing")
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), ",".join(map(str, tensor.shape)), data


def _checksum(key: bytes, dtype: object, shape: object, data: object) -> int:
    """Of a whole row; damage may change the types of its cells, too."""
    return zlib.crc32(data if isinstance(data, bytes) else b"", zlib.crc32(f"{key!r} {dtype} {shape}".encode()))


def _unpack(dtype: str, shape: str, data: bytes) -> Tensor:
    sizes = [int(size) for size in shape.split(",") if size]
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(sizes)
