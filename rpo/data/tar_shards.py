"""WebDataset: tar files in which the members of one key are one pair, read by their place and never unpacked.

The key of `dir/000123.chosen.png` is `dir/000123`, its column `chosen`. Columns of images are read where they lie when
somebody asks for them; `.json` has further columns, and `.txt` or `.caption` the prompt.
"""

import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rpo.data.image_facts import stamp_of
from rpo.data.own_files import is_hidden
from rpo.errors import InputError
from rpo.files.text import decode_text
from rpo.files.whole import parse_line

_TEXTS = ("txt", "caption", "text")
_BLOCK = 512  # of a tar file: a header, and the zeros after the last member


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar file, read when it is called."""

    path: Path
    name: str
    start: int
    size: int

    def __call__(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) != self.size:
            raise InputError(f"{self.path} ends within {self.name}; expected a whole tar file; fetch it again")
        return data


@stamp_of.register
def _(member: TarMember) -> str:
    shard = stamp_of(member.path)
    return shard and f"{shard}|{member.start}|{member.size}"


def tar_rows(path: Path) -> Iterator[tuple[str, Callable[[], Mapping[str, object]]]]:
    """Name and reader of each key, in the order of their first members; looks at headers only."""
    keys: dict[str, list[TarMember]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse() and not is_hidden(member.name):
                    place = TarMember(path, member.name, member.offset_data, member.size)
                    keys.setdefault(_split(member.name)[0], []).append(place)
            _require_end(path, archive.offset)
    except tarfile.TarError as error:
        raise InputError(
            f"{path}: no whole tar file ({error}); expected a shard of WebDataset; fetch it again"
        ) from error
    for key, members in keys.items():
        yield (name := f"{path.name}:{key}"), partial(_row, members, name)


def _require_end(path: Path, offset: int) -> None:
    """Refuse a shard that is cut where a member ends, which a reader of tar files takes for its end.

    A whole one ends in blocks of zeros; what follows them, as in shards that were joined, would not be read either.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if len(block := file.read(_BLOCK)) < _BLOCK:
            raise tarfile.ReadError(f"it is cut at byte {offset}")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {offset}")
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"there is more behind its end, at byte {offset}; unpack joined shards")


def _split(name: str) -> tuple[str, str]:
    """Key and column of a member: the name up to the first dot of its last part, and what follows."""
    folder, slash, last = name.rpartition("/")
    key, _, column = last.partition(".")
    return f"{folder}{slash}{key}", column


def _row(members: list[TarMember], name: str) -> Mapping[str, object]:
    row: dict[str, object] = {}
    for member in members:
        column = _split(member.name)[1].lower()
        if column == "json":
            found = parse_line(decode_text(member(), f"{name} (json)"), f"{name} (json)")
        elif column in _TEXTS:
            found = {"prompt": decode_text(member(), f"{name} ({column})").strip()}
        else:
            found = {column.rpartition(".")[0] or column: member}
        if twice := sorted(found.keys() & row.keys()):
            raise InputError(f"{name}: has {twice[0]} twice; expected one member for each; mend or remove the key")
        row |= found
    return row
