"""Everything here is Any: what the library declares is not what it returns."""

from typing import Any

def __getattr__(name: str) -> Any: ...
