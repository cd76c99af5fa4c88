"""Under which licence a model stands that is derived from another: the same, as far as it is known or told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from rpo.models.packaged import PACKAGED, expression_of


@dataclass(frozen=True)
class License:
    """As the header of a card on the Hub has it."""

    id: str
    name: str | None = None
    """With `link`, for the id "other"."""
    link: str | None = None


def _own(name: str, repository: str) -> License:
    return License("other", name, f"https://huggingface.co/{repository}/blob/main/LICENSE.md")


_SD35 = "stabilityai-ai-community"

LICENSES = {
    "CompVis/stable-diffusion-v1-4": License("creativeml-openrail-m"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": License("creativeml-openrail-m"),
    "stabilityai/stable-diffusion-xl-base-1.0": License("openrail++"),
    "stabilityai/stable-diffusion-3.5-medium": _own(_SD35, "stabilityai/stable-diffusion-3.5-medium"),
    "stabilityai/stable-diffusion-3.5-large": _own(_SD35, "stabilityai/stable-diffusion-3.5-large"),
    "black-forest-labs/FLUX.1-dev": _own("flux-1-dev-non-commercial-license", "black-forest-labs/FLUX.1-dev"),
    "black-forest-labs/FLUX.1-Kontext-dev": _own(
        "flux-1-dev-non-commercial-license", "black-forest-labs/FLUX.1-Kontext-dev"
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": License("apache-2.0"),
    "Qwen/Qwen-Image": License("apache-2.0"),
    "Qwen/Qwen-Image-Edit": License("apache-2.0"),
    "Tongyi-MAI/Z-Image": License("apache-2.0"),
    "lodestones/Chroma1-HD": License("apache-2.0"),
    "Alpha-VLLM/Lumina-Image-2.0": License("apache-2.0"),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": License("openrail++"),
}
"""Of well-known bases."""

OF_THE_PACKAGE = License("apache-2.0")
"""Of the checkpoints that come with it."""


def license_of_base(base: str | None, *, expression: str = "") -> License | None:
    """The licence of a checkpoint: known, or as the card in its folder says; nothing where neither tells.

    Args:
        expression: Python that gives its folder, as those that come with the package have.
    """
    if expression and expression in map(expression_of, PACKAGED):
        return OF_THE_PACKAGE
    if not base or base in LICENSES:
        return LICENSES.get(base or "")
    card = Path(base) / "README.md"
    try:
        told: dict[str, Any] = (metadata_load(card) or {}) if card.is_file() else {}
    except (ValueError, YAMLError):  # a header that is none tells nothing; `publish` says that no licence is named
        return None
    if not (licence := told.get("license")):
        return None
    return License(str(licence), told.get("license_name"), told.get("license_link"))
