"""Several rewards under one name, where a single one is asked for: to order pairs, to choose, to judge.

    mixture:shapes-clip=0.05,shapes=1       score = 0.05 · shapes-clip + 1 · shapes

Rewards are on scales of their own. With one over its spread between images of a prompt as weight, each counts alike.
"""

import math

from rpo.errors import InputError

MIXTURE = "mixture"
"""What its name begins with."""


def weights_of(parts: str) -> dict[str, float]:
    """The names and weights of what stands behind the colon.

    Example:
        >>> weights_of("shapes-clip=0.05,shapes=1")
        {'shapes-clip': 0.05, 'shapes': 1.0}
    """
    found: dict[str, float] = {}
    for part in parts.split(","):
        name, _, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in found or not math.isfinite(weight):
            raise InputError(
                f"the reward 'mixture:{parts}' has the part {part!r}; expected NAME=WEIGHT, each name once; give such "
                "as mixture:shapes-clip=0.05,shapes=1"
            )
        found[name] = weight
    return found
