"""One of several processes that share out the cells of a study: torchrun starts them, and each trains by itself.

To trainers, several processes make one run. So what the launcher says is taken out of the environment, before anything
is imported that reads it, and of several GPUs a process sees its own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GPUS = "CUDA_VISIBLE_DEVICES"


@contextmanager
def on_its_own() -> Iterator[tuple[int, int]]:
    """Inside, nobody knows of other processes; gives the number of this one, and how many there are."""
    before = dict(os.environ)
    said = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    if int(said.get("LOCAL_WORLD_SIZE", "1")) > 1:
        local = int(said["LOCAL_RANK"])
        listed = os.environ.get(_GPUS, "")
        os.environ[_GPUS] = listed.split(",")[local % len(listed.split(","))] if listed else str(local)
    try:
        yield int(said.get("RANK", "0")), int(said.get("WORLD_SIZE", "1"))
    finally:
        os.environ.clear()
        os.environ.update(before)
