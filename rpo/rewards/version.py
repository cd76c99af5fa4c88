"""Which version of a reward it was that judged: two numbers of one name can be compared if these are equal.

Of a reward that has weights it is a hash of them, and of what prepares images and texts for them, wherever they lie; of
any other, a hash of the file of code that it is from. What a reward of rpo's own imports is of rpo's version. One that
is served elsewhere has the version that it has there.
"""

import hashlib
import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from rpo.rewards.function import FunctionReward
from rpo.types import Images


@runtime_checkable
class Versioned(Protocol):
    """A reward that knows its own version."""

    def version(self) -> str:
        """Changes with anything that decides its scores; loads the weights."""
        ...


@runtime_checkable
class EmbedsImages(Protocol):
    """A reward that sees images by a learned embedding."""

    def embed_images(self, images: Images) -> Tensor:
        """Unit embeddings [batch, dim], for comparing images with each other."""
        ...


def version_of(reward: Any) -> str:
    """What to hold two judgements against: "weights …" or "code …"."""
    if isinstance(reward, FunctionReward | partial):
        return version_of(reward.func if isinstance(reward, partial) else reward.function)
    if isinstance(reward, Versioned):
        return reward.version()
    try:
        file = inspect.getsourcefile(reward if inspect.isroutine(reward) else type(reward))
    except TypeError:  # built in
        file = None
    return f"code {_short(Path(file).read_bytes())}" if file and Path(file).is_file() else f"{reward!r}"


def version_of_weights(networks: Mapping[str, nn.Module], **prepares: object) -> str:
    """The version of a reward with these networks, whose images and texts are prepared so."""
    from rpo.models.fingerprint import hash_network  # not at the top: naming a reward loads no model library

    hashes = [hash_network(network, {}, {"name": name}) for name, network in networks.items()]
    return f"weights {_short(repr([*hashes, sorted(prepares.items())]).encode())}"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
