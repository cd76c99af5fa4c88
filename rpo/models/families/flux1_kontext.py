"""FLUX.1 Kontext [dev] (arXiv:2506.15742): FLUX.1 [dev] that reads the image to edit after its own tokens."""

from typing import final

from rpo.models.base import Edits
from rpo.models.families.flux1 import Flux1


@final
class Flux1Kontext(Flux1):
    """The family of `FluxKontextPipeline`; Flux1 shows its network what it edits."""

    name = "FLUX.1 Kontext [dev]"
    pipelines: tuple[str, ...] = ("FluxKontextPipeline",)
    single_file_key = ""  # a file of it cannot be told from one of FLUX.1
    edits: Edits = "always"
