"""Many runs of one script: each a process on one core with a log, each result a file that is whole or not there."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpo.files.text import read_text, write_text


def on_one_core(script: str, words: Sequence[str], log: Path) -> None:
    """Run `script` with these words in a process of one thread.

    Args:
        script: A Python file.
        words: Its command line.
        log: What it prints is added to this file.

    Raises:
        subprocess.CalledProcessError: It failed; the log says why.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("a", encoding="utf-8") as out:
        subprocess.run([sys.executable, script, *words], check=True, stdout=out, stderr=out, env=os.environ | threads)


def read(file: Path) -> dict[str, Any] | None:
    """A result, or None where its run has not finished."""
    return json.loads(read_text(file)) if file.is_file() else None


def write(file: Path, content: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    write_text(temporary, json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)
