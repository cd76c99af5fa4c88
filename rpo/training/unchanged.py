"""What a resumed run must have in common with the one that it continues, kept inside its checkpoints."""

from collections.abc import Mapping
from typing import final


@final
class Unchanged:
    """Values that are saved with a run and refused on resume when they differ; one of `fit`'s `state` objects."""

    def __init__(self, values: Mapping[str, str]) -> None:
        """Keep the values of this session.

        Args:
            values: By the name that a person knows them by.
        """
        self._values = dict(values)

    def state_dict(self) -> dict[str, str]:
        """What is saved."""
        return self._values

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Compare with what was saved.

        Raises:
            ValueError: Naming what changed, from what to what.
        """
        names = sorted(self._values.keys() | state_dict.keys())
        changed = [
            f"{name} from {state_dict.get(name)} to {self._values.get(name)}"
            for name in names
            if state_dict.get(name) != self._values.get(name)
        ]
        if changed:
            raise ValueError(
                f"the run cannot be resumed: its settings changed ({'; '.join(changed)}); resume it with the "
                "settings it was started with, or train into another folder"
            )
