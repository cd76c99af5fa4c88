"""The adapter layer: LoRA (arXiv:2106.09685) on a diffusers network, its reference, and a file that is checked.

    W x  →  W x + (alpha / rank) B A x,    B = 0 at the start, so the first forward is the base's, bit for bit.

The reference policy of every trainer is the same network with its adapters off: no second copy of the weights.
Adapters are switched by their own flag on a collected list of layers; peft's enable/disable pair walks the whole
network each time and makes frozen adapters trainable again.

Saved files are read back into a fresh pipeline and compared on one seeded denoise before `save_lora` returns: the most
common complaint about fine-tuned LoRAs anywhere is that the file changes nothing.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from rpo.adapters.formats import formats_for
from rpo.adapters.formats.live import factors_of, layers_of, sizes_of
from rpo.adapters.formats.pattern import settings_of
from rpo.adapters.formats.read import check_fits, read_lora
from rpo.adapters.formats.verify import formats_in, load_layers, loaded
from rpo.adapters.formats.write import write_lora
from rpo.adapters.lora_file import inspect_lora
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.distilled import ASSISTANT
from rpo.models.frozen import device_of
from rpo.models.plain import fresh_pipeline, probe
from rpo.randomness import plain_defaults
from rpo.types import Latents

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Where LoRA goes in a UNet by default, as in diffusers' own scripts; a family may name more."""

ADAPTER, EARLIER = "default", "earlier"
STAGING_PREFIX = ".saving-"

AdapterHost = ModelMixin | PreTrainedModel
"""What can carry an adapter: a diffusers network or a transformers one; both add and keep it in the same way."""


def add_lora(
    network: AdapterHost,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_PROJECTIONS,
    seed: int = 0,
    beside: Sequence[str] = (),
) -> list[nn.Parameter]:
    """Freeze `network`, add a LoRA adapter to it in place, and return the adapter's parameters, which are float32.

    Args:
        network: A diffusers denoiser or a transformers text encoder.
        rank: Of the update, >= 1; 4 to 64 are usual.
        alpha: Strength; the update is scaled by alpha / rank. Equal to `rank` by default, which is the only value that
            every program that loads LoRAs agrees on.
        dropout: On the adapter's input, in [0, 1). Leave it 0 where the reference must equal the start.
        target_modules: Name endings of the layers to adapt.
        seed: Of the adapter's initial A; the global random state is left alone.
        beside: Names of the adapters that it already carries, which stay in use, frozen; see `start_adapters`.

    Raises `InputError` if there is another adapter already, no layer matches, or `rank` is not positive.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}, but a LoRA needs rank >= 1; 4 to 64 are usual")
    if not beside:
        refuse_adapter(network, type(network).__name__)
    names = [f".{name}" for name, _ in network.named_modules()]
    idle = [target for target in target_modules if not any(name.endswith(f".{target}") for name in names)]
    if idle or not target_modules:
        raise InputError(
            f"no layer of {type(network).__name__} ends in {tuple(idle)}, but target_modules is "
            f"{tuple(target_modules)}; expected name endings of layers, each of at least one; see named_modules()"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        init_lora_weights="gaussian",
    )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), plain_defaults(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # those beside
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=ADAPTER)
    trained = lora_parameters(network)
    if beside:
        use_adapters(adapter_layers(network), [*beside, ADAPTER])
        network.requires_grad_(False)
    for parameter in trained:
        parameter.data = parameter.data.to(device_of(network), torch.float32)
        parameter.requires_grad_(True)
    return trained


def train_adapters(network: AdapterHost, names: Sequence[str], *, beside: Sequence[str] = ()) -> list[nn.Parameter]:
    """Replace adapters by the one that does what they do together, to be trained; its parameters, float32.

    Those `beside` it stay in use, frozen.
    """
    factors = factors_of(network, names)
    network.delete_adapters(list(names))
    config = LoraConfig(**settings_of({layer: len(down) for layer, (down, _) in factors.items()}))
    network.add_adapter(config, adapter_name=ADAPTER)
    for name, factor in ((name, dict(network.named_modules())[name]) for name in factors):
        for part, value in zip((factor.lora_A, factor.lora_B), factors[name], strict=True):
            part[ADAPTER].weight.data = value.to(device_of(network))
    use_adapters(adapter_layers(network), [*beside, ADAPTER])
    network.requires_grad_(False)
    for parameter in lora_parameters(network):
        parameter.requires_grad_(True)
    return lora_parameters(network)


def start_adapters(network: nn.Module, name: str) -> tuple[str, ...]:
    """Names of the LoRAs that a network was handed over with, all of them in use.

    Raises `InputError` if one is merged, switched off, or no plain LoRA.
    """
    layers = adapter_layers(network)
    carried = dict.fromkeys(one for layer in layers for one in getattr(layer, "lora_A", {"another kind": None}))
    faults = {
        "is no LoRA": any(not isinstance(layer, LoraLayer) for layer in layers),
        "is merged into the weights": any(layer.merged for layer in layers),
        "is switched off": any(
            layer.disable_adapters or one not in layer.active_adapters for layer in layers for one in _own(layer)
        ),
        "is a DoRA": any(any(vars(layer).get("use_dora", {}).values()) for layer in layers),
    }
    if fault := next((fault for fault, holds in faults.items() if holds), None):
        raise InputError(
            f"an adapter of {name} {fault}; expected none, or plain LoRAs in use, which training goes on from; call "
            "pipe.unload_lora_weights(), and load the saved file if that is the start"
        )
    return tuple(carried)


def hand_over(network: AdapterHost) -> None:
    """Make room for an adapter to be trained: that of an earlier training gets a name of its own, and stays in use.

    One that was never trained, B = 0, is taken out. Nothing is computed, so that predictions keep their bits.
    """
    layers: list[Any] = [layer for layer in adapter_layers(network) if ADAPTER in _own(layer)]
    if layers and not any(layer.lora_B[ADAPTER].weight.any() for layer in layers):
        others = {name for layer in adapter_layers(network) for name in _own(layer)} - {ADAPTER}
        network.delete_adapters([ADAPTER]) if others else network.unload_lora()
    elif layers:
        number = next(number for number in count(1) if f"{EARLIER}-{number}" not in network.peft_config)
        name = f"{EARLIER}-{number}"
        network.peft_config[name] = network.peft_config.pop(ADAPTER)
        for layer in layers:
            for holder in (*vars(layer).values(), *layer._modules.values()):
                if isinstance(holder, dict | nn.ModuleDict | nn.ParameterDict) and ADAPTER in holder:
                    holder[name] = holder.pop(ADAPTER)
            layer._active_adapter = [name if one == ADAPTER else one for one in layer.active_adapters]


def _own(layer: BaseTunerLayer) -> list[str]:
    return list(getattr(layer, "lora_A", ()))


def refuse_adapter(network: nn.Module, name: str) -> None:
    """Refuse a network that carries an adapter."""
    if adapter_layers(network):
        raise InputError(
            f"{name} already carries an adapter; expected a plain network; call pipe.unload_lora_weights()"
        )


def adapter_layers(network: nn.Module) -> list[BaseTunerLayer]:
    """The layers of `network` that carry an adapter; collect them once, outside loops."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def use_adapters(layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> None:
    """Have each layer use those of the named adapters that it has; none is frozen or unfrozen."""
    for layer in layers:
        layer._active_adapter = [name for name in names if name in _own(layer)]


@contextmanager
def without(layers: Sequence[BaseTunerLayer], adapter: str) -> Iterator[None]:
    """Inside, one of the adapters in use is left out."""
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter]
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._active_adapter = was


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The trained adapter's parameters, in a fixed order."""
    named = network.named_parameters()
    return [parameter for name, parameter in named if ".lora_" in name and f".{ADAPTER}." in name]


@contextmanager
def reference(
    network: nn.Module, layers: Sequence[BaseTunerLayer] | None = None, *, keep: Sequence[str] = ()
) -> Iterator[None]:
    """Inside, `network` is the reference policy: adapters off, no gradient. Outside, it is as it was, errors or not.

    Equals the base bit for bit, and freezes or unfreezes nothing.

    Args:
        network: What `add_lora` was called on.
        layers: Its `adapter_layers`, if they have been collected already.
        keep: Adapters that stay on: those that the policy started from.

    Raises `InputError` if there is no adapter to switch off, or one is merged into the weights.

    Example:
        >>> with reference(model.denoiser):                                    # doctest: +SKIP
        ...     reference_pred = model.predict(x_t, timestep, cond)
    """
    layers = adapter_layers(network) if layers is None else layers
    if not layers:
        raise InputError(f"{type(network).__name__} carries no adapter, so it has no reference; call add_lora first")
    if any(layer.merged for layer in layers):
        raise InputError(
            "the adapter is merged into the weights, so it cannot be switched off; unmerge or unfuse it first"
        )
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            if keep:
                layer._active_adapter = [name for name in keep if name in layer.active_adapters]
            else:
                layer._disable_adapters = True
        with torch.no_grad():
            yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = was


def save_lora(model: Checkpoint, folder: str | PathLike[str], *, formats: Sequence[str] | None = None) -> Path:
    """Write the adapter as files that other programs load, and prove that they do.

    Where training started from other LoRAs, the files do what all of them do together, without an assistant. Alpha is
    the rank in all of them, whatever it was: its strength is taken into B.

    They are written beside their place, verified there (see `verify_lora`) and moved in whole, so that a crash or a
    full disk leaves older files as they were.

    Args:
        model: The live model; adapters on its denoiser, and on its CLIP text encoders if there are any, are saved.
        folder: Where to put `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` reads, and what
            `rpo.adapters.formats.write` puts beside it.
        formats: Some of `rpo.adapters.formats.FORMATS`; by default all that programs of the family read.

    Returns:
        The path of diffusers' file, or of the last that was written.

    Raises `InputError` if there is no adapter, or verification fails.
        OSError: If it cannot be written, for want of space for instance.
    """
    folder, family = Path(folder), model.family
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{STAGING_PREFIX}*"):  # of a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
    kinds = formats_for(family) if formats is None else formats
    layers, sizes = layers_of(model), sizes_of(model.pipe, [family.denoiser])
    try:
        files = write_lora(layers, staging, family, kinds, config=model.denoiser.config, sizes=sizes)
        verify_lora(model, staging)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / file, folder / file)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the LoRA was not saved ({error.strerror}; {shutil.disk_usage(folder).free} bytes are free); the adapter "
            "is still in memory and an earlier file untouched: free some space and save again",
            str(folder),
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder / files[-1]


@torch.no_grad()
def verify_lora(model: Checkpoint, folder: str | PathLike[str]) -> None:
    """Load every LoRA file of a folder into a fresh pipeline and compare one seeded denoise with the live model's.

    The fresh pipeline shares the frozen weights with the live one, so this costs no memory to speak of, and two
    forwards on one small latent beside one for each file.
    """

    def denoised(pipe: Any) -> Latents:
        return probe(pipe, model.family, model.compute_dtype, whole=False)[model.family.denoiser]

    fresh = fresh_pipeline(model.pipe, model.family, without_adapters=True)
    base_pred = denoised(fresh)
    with without(adapter_layers(model.denoiser), ASSISTANT):
        live_pred = denoised(model.pipe)
    effect = (live_pred - base_pred).abs().max().item()
    if effect == 0:
        raise InputError(
            "the adapter changes nothing: with it, a seeded denoise equals the base's bit for bit; train it before "
            "saving (an untrained LoRA has B = 0)"
        )
    # Relative to the effect: a wrong strength is off by a factor, rounding by far less.
    tolerance = effect * (1e-3 if model.compute_dtype == torch.float32 else 5e-2) + 1e-6
    for kind in formats_in(Path(folder)):
        with loaded(fresh, model.family, Path(folder), kind):
            error = (denoised(fresh) - live_pred).abs().max().item()
        if not error <= tolerance:
            raise InputError(
                f"the file does not reproduce the adapter: loaded as {kind} into a fresh pipeline it is off by "
                f"{error:.3g}, where the adapter's effect is {effect:.3g}; was the adapter changed by hand (alpha)?"
            )


def load_lora(model: Checkpoint, path: str | PathLike[str], *, name: str = "start") -> None:
    """Load a LoRA of any dialect into a checkpoint's pipeline, at full strength, beside those that it has.

    Raises `InputError` unless every layer of it is used.
    """
    file, networks = inspect_lora(path).path, (model.denoiser, *model.text_encoders.values())
    layers, _ = read_lora(path, model.family, model.denoiser.config)
    check_fits(layers, sizes_of(model.pipe, [model.family.denoiser, *model.text_encoders]), file, model.family.name)
    carried = list(
        dict.fromkeys(one for network in networks for layer in adapter_layers(network) for one in _own(layer))
    )
    load_layers(model.pipe, model.family, layers, name=name)
    for network in networks:
        use_adapters(adapter_layers(network), [*carried, name])
