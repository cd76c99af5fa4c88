"""Which files Python opens, whoever asks, and how many JSON texts it reads."""

import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LISTENERS: list[list[str]] = []


def _hear(event: str, args: tuple) -> None:
    if event == "open" and _LISTENERS and isinstance(args[0], str | bytes | Path):
        name = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
        for names in _LISTENERS:
            names.append(name)


sys.addaudithook(_hear)


@contextmanager
def opened_images(folder: Path) -> Iterator[list[str]]:
    """Inside, the list that is given grows; afterwards it holds the sorted names of PNG files below the folder."""
    names: list[str] = []
    _LISTENERS.append(names)
    try:
        yield names
    finally:
        _LISTENERS.remove(names)
        found = [Path(name) for name in names if name.endswith(".png")]
        names[:] = sorted(path.name for path in found if path.resolve().is_relative_to(folder.resolve()))


class Counted:
    """Counts the files that are opened and the lines that are parsed."""

    def __init__(self, monkeypatch):
        self.opened, self.parsed = Counter(), 0
        open_path, load = pathlib.Path.open, json.loads

        def counting_open(path, *args, **kwargs):
            self.opened[path.name] += 1
            return open_path(path, *args, **kwargs)

        def counting_load(text, *args, **kwargs):
            self.parsed += 1
            return load(text, *args, **kwargs)

        monkeypatch.setattr(pathlib.Path, "open", counting_open)
        monkeypatch.setattr(json, "loads", counting_load)
