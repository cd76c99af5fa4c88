"""Settings that come from the environment are used as they are and written down as they were written.

`${oc.env:NAME}` may stand for a secret. So its value carries the reference along, and whatever is kept (`run.yaml`,
manifests, cards) has the reference. A comparison of two runs compares the values, or a hash of them.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any, final

from omegaconf import DictConfig, OmegaConf

_REFERENCE = re.compile(r"\$\{\s*oc\.env\s*:")
_OTHER_RESOLVER = re.compile(r"\$\{(?!\s*oc\.env\s*:)[^{}]*:")


@final
class FromEnvironment(str):
    """A text out of the environment; `written` is the reference that it came from, which is also what it shows."""

    written: str

    def __new__(cls, value: str, written: str) -> "FromEnvironment":
        """Join a value and its reference."""
        made = super().__new__(cls, value)
        made.written = written
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What copies are made of."""
        return str(self), self.written

    @property
    def digest(self) -> str:
        """A hash of the value, salted with where it came from."""
        return hashlib.sha256(f"{self.written}\0{self}".encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        """The reference, for messages."""
        return repr(self.written)


def replaced(value: Any, how: Callable[[Any], Any]) -> Any:
    """Plain data with something else in the place of every value in its mappings and lists."""
    if isinstance(value, dict):
        return {name: replaced(one, how) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(one, how) for one in value)
    return how(value)


def as_written(value: Any) -> Any:
    """Plain data with references in the place of what came from the environment."""
    return replaced(value, lambda one: one.written if isinstance(one, FromEnvironment) else one)


def as_compared(value: Any) -> Any:
    """As `as_written`, with a hash of each value behind its reference, so that another environment is another text."""
    shown = {place: f"{place} (sha256 {digest})" for place, digest in digests(value).items()}
    return replaced(value, lambda one: shown[one.written] if isinstance(one, FromEnvironment) else one)


def digests(value: Any) -> dict[str, str]:
    """The hash of each value that came from the environment, by its reference."""
    found: dict[str, str] = {}
    replaced(value, lambda one: isinstance(one, FromEnvironment) and found.setdefault(one.written, one.digest))
    return found


def resolved(tree: DictConfig) -> Any:
    """The values of a configuration; texts that came from the environment are `FromEnvironment`."""

    def kept(one: Any) -> Any:  # references to the environment are escaped, so that they come out as they are
        is_plain = isinstance(one, str) and not _OTHER_RESOLVER.search(one)
        return _REFERENCE.sub(r"\\\g<0>", one) if is_plain else one

    raw: Any = OmegaConf.to_container(tree, resolve=False)
    written = OmegaConf.to_container(OmegaConf.create(replaced(raw, kept)), resolve=True)
    return _joined(OmegaConf.to_container(tree, resolve=True), written, raw)


def _joined(value: Any, written: Any, raw: Any) -> Any:
    if isinstance(value, dict) and isinstance(written, dict):
        inner = raw if isinstance(raw, dict) else {}
        return {name: _joined(one, written.get(name), inner.get(name)) for name, one in value.items()}
    if isinstance(value, list) and isinstance(written, list) and len(value) == len(written):
        inner = raw if isinstance(raw, list) and len(raw) == len(value) else [None] * len(value)
        return [_joined(*three) for three in zip(value, written, inner, strict=True)]
    if not isinstance(value, str):
        return value
    if isinstance(written, str) and written != value:
        return FromEnvironment(value, written)
    is_decoded = isinstance(raw, str) and _REFERENCE.search(raw) is not None  # its text was read as YAML in between
    return FromEnvironment(value, raw) if is_decoded else value
