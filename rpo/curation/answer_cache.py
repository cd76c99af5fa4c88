"""Answers on disk, so that a question is asked once: a file each, named by the sha256 of everything that decides it.

A file appears whole by an atomic rename and is never changed, so any number of processes and machines can share the
folder. A file that cannot be read (a power cut) counts as absent and is written again.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rpo.curation.answers import Reply
from rpo.curation.chat import Question
from rpo.files import name_full_disk
from rpo.text import write_text


class AnswerCache:
    """A folder of replies.

    Example:
        >>> cache = AnswerCache(Path("cache"), {"model": "llava", "temperature": "0"})
        >>> cache.save(Question("What is this?", ()), Reply("a fox"))
        >>> cache.load(Question("What is this?", ())).text
        'a fox'
    """

    def __init__(self, folder: Path, asked: Mapping[str, str]) -> None:
        """Use a folder, which is made when there is something to keep."""
        self.folder = folder
        self._asked = json.dumps(dict(asked), sort_keys=True)

    def load(self, question: Question) -> Reply | None:
        """What was answered, if the question was asked before."""
        try:
            return Reply(**json.loads(self._path(question).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None

    def save(self, question: Question, reply: Reply) -> None:
        """Keep an answer."""
        path = self._path(question)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(unfinished, json.dumps(asdict(reply), ensure_ascii=False))
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise name_full_disk(error, path) from error

    def _path(self, question: Question) -> Path:
        digest = hashlib.sha256(self._asked.encode())
        # Pixels and not the bytes of a file: the same image may be compressed in many ways.
        for image in question.images:
            digest.update(f"\0{image.mode}{image.size}\0".encode() + image.tobytes())
        schema = question.answer.model_json_schema() if question.answer else None
        digest.update(f"\0{json.dumps(schema, sort_keys=True)}\0{question.text}".encode())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.json"
