"""A LoRA in no program's dialect, and how one that lies in a file is told apart.

    W x  →  W x + B A x          A: rank x in, B: out x rank, or convolution kernels of these channels

The strength alpha / rank is taken into B, so that alpha = rank: the one value on which all programs agree, with or
without a note of alpha, and with rsLoRA's alpha / sqrt(rank) no longer in sight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rpo.errors import InputError

Layers = dict[str, tuple[Tensor, Tensor]]
"""A and B by the part of the pipeline and diffusers' name of the layer, as in "unet.mid_block.….to_q"."""

Sizes = Mapping[str, tuple[int, int]]
"""How many numbers the layers of a network put out and take in, by the same names."""

ENDINGS = {
    ".lora.down.weight": ".lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora_down.weight": ".lora_up.weight",
}
"""How the two factors are told apart: in diffusers, in its text encoders, in peft, in some Qwen files, in kohya's."""

ALPHA = ".alpha"

OTHER_KINDS = {
    "LoKr": (".lokr_",),
    "LoHa": (".hada_",),
    "OFT": (".oft_",),
    "GLoRA": (".a1.weight", ".b1.weight"),
    "IA3": (".on_input",),
    "a LoRA with a core tensor (CP decomposition)": (".lora_mid.",),
    "whole differences of weights": (".diff", ".diff_b"),
}
"""Adapters that are no pairs of factors, by what their tensors' names hold."""

DORA = (".dora_scale", ".lora_magnitude_vector")


@dataclass(frozen=True)
class Stored:
    """The factors of a file by the name that it has for each layer, and alpha where it states one."""

    factors: Layers
    alphas: Mapping[str, float]
    is_dora: bool


def stored(tensors: Mapping[str, Tensor], where: object) -> Stored:
    """Sort the tensors of a LoRA file; all of them must have a meaning."""
    refuse_other_kinds(tensors, where)
    factors: Layers = {}
    for down, up in ENDINGS.items():
        stems = [name.removesuffix(down) for name in tensors if name.endswith(down)]
        factors |= {one: (tensors[one + down], tensors[one + up]) for one in stems if one + up in tensors}
    marked = [name for name in tensors if any(mark in name for mark in DORA)]
    alphas = {name.removesuffix(ALPHA): float(one) for name, one in tensors.items() if name.endswith(ALPHA)}
    known = {stem + ending for stem in factors for ending in (*ENDINGS, *ENDINGS.values(), ALPHA)}
    refuse_unknown([name for name in tensors if name not in known and name not in marked], where)
    return Stored(factors, alphas, bool(marked))


def refuse_other_kinds(names: Iterable[str], where: object) -> None:
    """Refuse a file of another kind of adapter, by its name."""
    for kind, marks in OTHER_KINDS.items():
        if found := [name for name in names if any(mark in name for mark in marks)]:
            raise InputError(
                f"{where} is {kind}: it holds {found[0]}; expected a LoRA, of two factors for each layer; convert it "
                "with the program that made it, or give another"
            )


def refuse_unknown(names: list[str], where: object) -> None:
    """Name the first tensors that nobody knows what to do with."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""  # noqa: PLR2004 - enough to know the kind by
        raise InputError(
            f"{where} holds {', '.join(names[:3])}{more}, which belong to no layer that is known; expected the names "
            "of diffusers, peft, kohya or ComfyUI for the base's own layers: give another file, or the checkpoint that "
            "it belongs to"
        )


def strengthened(factors: tuple[Tensor, Tensor], strength: float) -> tuple[Tensor, Tensor]:
    """The factors with a strength taken into B, which is then float32."""
    down, up = factors
    return (down, up) if strength == 1 else (down, up.float() * strength)
