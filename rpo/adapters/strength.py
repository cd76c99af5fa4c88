"""How strongly the adapters of a checkpoint count, for a while.

    W x  →  W x + strength · (alpha / rank) B A x

in every layer of every network that carries one, text encoders too. At strength 1 nothing is changed; at 0 the adapter
is left out, so that the base computes alone, bit for bit.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer

from rpo.adapters.lora import adapter_layers
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint


@contextmanager
def at_strength(model: Checkpoint, strengths: Mapping[str, float]) -> Iterator[None]:
    """Inside, the named adapters count so much; those that are not named stay as they are, as do all afterwards.

    Args:
        model: With adapters, see `rpo.adapters.lora.load_lora`.
        strengths: By name; a negative one does the opposite.

    Raises `InputError` if a strength is not finite, or no layer carries such an adapter.
    """
    networks = (model.denoiser, *model.text_encoders.values())
    layers: list[Any] = [one for network in networks for one in adapter_layers(network) if isinstance(one, LoraLayer)]
    carried = {name for layer in layers for name in layer.scaling}
    for name, strength in strengths.items():
        if name not in carried or not math.isfinite(strength):
            raise InputError(
                f"adapter {name!r} is to have strength {strength:g}; expected a finite number, for one of "
                f"{', '.join(sorted(carried)) or 'no adapters'}; load it first, or give another number"
            )
    before = [(dict(layer.scaling), layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name for name in layer.active_adapters if strengths.get(name) != 0]
            layer.scaling.update({name: one * strengths.get(name, 1.0) for name, one in layer.scaling.items()})
        yield
    finally:
        for layer, (scaling, active) in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
            layer._active_adapter = active
