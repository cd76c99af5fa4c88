"""The endpoint objectives: formulas, and the settings of each."""

from typing import Annotated

from pydantic import Field

from rpo.objectives.endpoint.awm import Awm
from rpo.objectives.endpoint.bound import Bound
from rpo.objectives.endpoint.dgpo import Dgpo
from rpo.objectives.endpoint.nft import Nft
from rpo.objectives.endpoint.par import Par
from rpo.objectives.endpoint.ram import Ram
from rpo.objectives.endpoint.rebel import Rebel
from rpo.objectives.endpoint.rvm import Rvm

EndpointObjective = Annotated[Bound | Nft | Awm | Ram | Rvm | Par | Dgpo | Rebel, Field(discriminator="kind")]
"""One of them, by its `kind`."""
