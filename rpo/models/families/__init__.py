"""The families of pipelines that rpo trains: one line of this table, one file beside it."""

from collections.abc import Iterable

from rpo.models.base import Family
from rpo.models.families.chroma import Chroma
from rpo.models.families.flux1 import Flux1
from rpo.models.families.flux1_kontext import Flux1Kontext
from rpo.models.families.flux2_klein import Flux2Klein
from rpo.models.families.instruct_pix2pix import InstructPix2Pix
from rpo.models.families.krea2 import Krea2
from rpo.models.families.lumina2 import Lumina2
from rpo.models.families.masked_tokens import MaskedTokens
from rpo.models.families.pixart_sigma import PixArtSigma
from rpo.models.families.qwen_image import QwenImage
from rpo.models.families.qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from rpo.models.families.sana import Sana
from rpo.models.families.sd3 import StableDiffusion3
from rpo.models.families.sdxl import StableDiffusionXL
from rpo.models.families.stable_diffusion import StableDiffusion
from rpo.models.families.z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    InstructPix2Pix(),
    StableDiffusionXL(),
    StableDiffusion3(),
    Flux1(),
    Flux1Kontext(),
    Chroma(),
    Flux2Klein(),
    QwenImage(),
    QwenImageEdit(),
    QwenImageEditPlus(),
    Krea2(),
    ZImage(),
    Lumina2(),
    Sana(),
    PixArtSigma(),
    MaskedTokens(),
)
"""The first is what a single file is taken for that no other family claims."""


def family_named(pipeline: str) -> Family | None:
    """The family of a pipeline class of diffusers."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def family_of_file(tensors: Iterable[str]) -> Family:
    """The family of a single-file checkpoint with tensors of these names."""
    names = list(tensors)
    for family in FAMILIES[1:]:
        if family.single_file_key and any(family.single_file_key in name for name in names):
            return family
    return FAMILIES[0]
