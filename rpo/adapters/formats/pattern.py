"""How peft describes an adapter: rank and alpha, and the layers where they are others."""

import math
import re
from collections.abc import Mapping
from typing import Any


def settings_of(ranks: Mapping[str, int]) -> dict[str, object]:
    """Of an adapter of alpha = rank, by layer; those of another rank than most are told apart."""
    usual = max(ranks.values())
    pattern = {layer: rank for layer, rank in ranks.items() if rank != usual}
    values = {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern}
    return values | {"target_modules": sorted(ranks), "lora_bias": False, "use_dora": False}


def strength_of(layer: str, rank: int, settings: Mapping[str, Any], alpha: float | None) -> float:
    """By what a layer's B A is multiplied: alpha / rank, with rsLoRA alpha / sqrt(rank); 1 where nothing is said."""
    if settings:
        pattern = settings.get("alpha_pattern") or {}
        matching = (one for key, one in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        alpha = next(matching, settings.get("lora_alpha", rank))
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
