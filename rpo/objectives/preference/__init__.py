"""The preference objectives: formulas, and the settings of each."""

from typing import Annotated

from pydantic import Field

from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.objectives.preference.mapo import Mapo

Objective = Annotated[Dpo | Kto | Mapo, Field(discriminator="kind")]
"""One of them, by its `kind`."""
