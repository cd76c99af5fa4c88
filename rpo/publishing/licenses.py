"""Under which licence a model stands that is derived from another: the same, as far as it is known or told."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rpo.files.text import lines, read_text


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


def license_of_base(base: str | None) -> License | None:
    """The licence of a checkpoint: known, or as the card in its folder says; nothing where neither tells."""
    if not base or base in LICENSES:
        return LICENSES.get(base or "")
    card = Path(base) / "README.md"
    if not card.is_file():
        return None
    told = _header(read_text(card))
    return License(told["license"], told.get("license_name"), told.get("license_link")) if "license" in told else None


def _header(card: str) -> Mapping[str, str]:
    header = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    told = lines(header.group(1)) if header else []
    pairs = (line.partition(":") for line in told if re.match(r"license(_name|_link)?:", line))
    return {key: value.strip().strip("\"'") for key, _, value in pairs if value.strip()}
