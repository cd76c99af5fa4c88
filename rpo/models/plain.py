"""A plain pipeline computes what its weights and configurations say; anything else on it is refused before training.

What is trained under a switch, a wrapper or a patch is an adapter to that, and the saved file is loaded by people who
have none. What diffusers can switch is named with the call that undoes it; all else is found by a probe: a fresh
pipeline of the same parts against the live one, on one small latent.
"""

from collections.abc import Callable, Mapping, Sized
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from rpo.errors import InputError
from rpo.models import latents as autoencoder
from rpo.models.base import ORIGINAL, Family
from rpo.models.execution import call, embedded
from rpo.models.frozen import device_of, is_offloaded, offload, quantized_like
from rpo.models.sharding import divided_like

PROBE_SIDE, IMAGE_LATENT_SIDE = 16, 4
"""Sides of the latents that the UNet and the VAE are probed with: small, but they pass every level."""

PROBE_PROMPT = "a dog"
_FREEU = ("s1", "s2", "b1", "b2")


def parts_of(pipe: Any, family: Family) -> dict[str, nn.Module]:
    """The networks of a pipeline by name: denoiser, autoencoder, and the text encoders that it has."""
    names = (*family.parts, *family.text_encoders)
    return {name: pipe.components[name] for name in names if pipe.components[name] is not None}


def refuse_altered(pipe: Any, family: Family) -> None:
    """Refuse a pipeline to which something known was done: a switch, a wrapper, a hook, a patch."""
    devices: dict[str, str] = {}
    for part, network in parts_of(pipe, family).items():
        for find in (_compiled, partial(_of_another_class, family), _switched, _hooked_or_patched):
            if (fault := find(part, network)) is not None:
                raise InputError(f"{fault[0]}; expected the plain network, for that is what others load: {fault[1]}")
        places = {device_of(network)} if is_offloaded(network) else {one.device for one in network.parameters()}
        for device in sorted(map(str, places)):
            devices[part if device != "meta" else f"{part} (not loaded)"] = device
    if len(set(devices.values())) > 1 or "meta" in devices.values():
        told = ", ".join(f"{part} on {device}" for part, device in devices.items())
        raise InputError(f"the pipeline's parts lie apart ({told}); expected one device: call pipe.to(DEVICE)")
    family.refuse(pipe)


def refuse_strange(pipe: Any, family: Family, compute_dtype: torch.dtype) -> None:
    """Refuse a pipeline that computes something else than a fresh one of the same weights; adapters count as parts."""
    fresh = _outcome(lambda: fresh_pipeline(pipe, family), family, compute_dtype)
    live = _outcome(lambda: pipe, family, compute_dtype)
    # Rounding of other kernels, memory formats and sliced attention is far below, what is switched on far above.
    dtypes = {compute_dtype, *(network.dtype for network in parts_of(pipe, family).values())}
    tolerance = 1e-3 if dtypes <= {torch.float32, torch.float64} else 5e-2
    for part, wanted in fresh.items():
        if not wanted.isfinite().all():
            raise InputError(
                f"the pipeline's {part} gives numbers that are not finite on a plain input (the autoencoder computes "
                f"in {pipe.components[family.autoencoder].dtype}, the denoiser in {compute_dtype}): it overflows; load "
                "the checkpoint with dtype=torch.bfloat16, or one whose autoencoder was mended for float16"
            )
        error = (live[part] - wanted).abs().max().item()
        if not error <= tolerance * max(wanted.abs().max().item(), 1e-3):
            raise InputError(
                f"the pipeline's {part} does not compute what its weights and configuration say: it is off by "
                f"{error:.3g} from a fresh one with the same weights; something was switched on or patched (a hook, "
                "token merging, another attention processor): undo it, or load the checkpoint again"
            )


def fresh_pipeline(pipe: Any, family: Family, *, without_adapters: bool = False) -> Any:
    """A pipeline of new networks on the same weights, with nothing that was done to the old ones.

    Parts with adapters are shared as they are, or come fresh, too, as their base.
    """
    options = {name: value for name, value in pipe.config.items() if name not in pipe.components and name[0] != "_"}
    parts = dict(pipe.components) | dict.fromkeys(pipe._optional_components) | options | dict(family.load_options)
    for part in family.text_encoders:  # which some families count among the optional ones
        for name in (part, part.replace("text_encoder", "tokenizer")):
            parts[name] = pipe.components[name]
    for part, network in parts_of(pipe, family).items():
        is_adapted = any(".base_layer." in name for name, _ in network.named_parameters())  # in use or not
        if without_adapters or not is_adapted:
            parts[part] = _fresh(network)
    return type(pipe)(**parts)


def probe_side(pipe: Any, family: Family) -> int:
    """Side of the smallest latents that are worth a look: as many as the denoiser's levels need."""
    levels = pipe.components[family.denoiser].config.get("block_out_channels") or ()
    return max(PROBE_SIDE, 2 ** max(0, len(levels) - 1)) if isinstance(levels, Sized) else PROBE_SIDE


@torch.no_grad()
def probe(pipe: Any, family: Family, compute_dtype: torch.dtype, *, whole: bool = True) -> Mapping[str, Tensor]:
    """What each part puts out for one fixed small input, float32; if not `whole`, the denoiser alone."""
    vae = pipe.components[family.autoencoder]
    side, channels = probe_side(pipe, family), family.latent_channels(pipe)
    generator = torch.Generator("cpu").manual_seed(0)
    x_t = torch.randn(1, channels, side, side, generator=generator, dtype=torch.float32, device="cpu")
    # A compiled network would be compiled for a size that nobody asks for again.
    with torch.compiler.set_stance("force_eager"), autoencoder.widened(vae, is_on=family.widens_autoencoder):
        pixels = side * family.cell(pipe)
        grey = torch.full((1, 3, pixels, pixels), 0.5, device=vae.device) if family.edits == "always" else None
        embedding = embedded(family, pipe, [PROBE_PROMPT], vae.device, grey)
        timestep = torch.full((1,), family.schedule(pipe).num_train_timesteps // 2)
        noise_pred = call(
            family, pipe, pipe.components[family.denoiser], x_t, timestep, embedding, compute_dtype=compute_dtype
        )
        if not whole:
            return {family.denoiser: noise_pred}
        latents = x_t[:, :, :IMAGE_LATENT_SIDE, :IMAGE_LATENT_SIDE]
        image = family.decode(pipe, latents.to(vae.device))
        encoded, _ = family.encode(pipe, image.clamp(0, 1))
    texts = torch.cat([one.flatten() for name, one in embedding.items() if name != ORIGINAL])
    return {
        ", ".join(name for name in family.text_encoders if pipe.components[name] is not None): texts.float(),
        family.denoiser: noise_pred,
        family.autoencoder: torch.cat([image.flatten(), encoded.flatten()]).float(),
    }


def _outcome(make: Callable[[], Any], family: Family, compute_dtype: torch.dtype) -> Mapping[str, Tensor]:
    try:
        return probe(make(), family, compute_dtype)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the pipeline does not run on a prompt and a latent alone ({type(error).__name__}: {reason}); expected a "
            "plain text-to-image pipeline whose weights fit its configurations: load the checkpoint again"
        ) from error


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the note of what was left at its default, which may have been set since."""
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def _fresh(network: Any) -> nn.Module:
    config = network.config
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), no_init_weights():
        fresh = type(network).from_config(_stated(config)) if isinstance(config, Mapping) else type(network)(config)
    divided_like(network, fresh)
    shared = tuple(f"{name}." for name in quantized_like(network, fresh))
    state = {name.replace(".base_layer", ""): tensor for name, tensor in network.state_dict().items()}
    # Fused projections stay in a network after they were unfused, without a part in what it computes.
    used = [name for name in fresh.state_dict() if name in state and not name.startswith(shared)]
    fresh.load_state_dict({name: state[name] for name in used}, assign=True, strict=not shared)
    buffers = {name.replace(".base_layer", ""): tensor for name, tensor in network.named_buffers()}
    for name, _ in fresh.named_buffers():
        if name not in state:  # one that no file has
            owner, _, last = name.rpartition(".")
            fresh.get_submodule(owner).register_buffer(last, buffers[name], persistent=False)
    if is_offloaded(network):
        offload(fresh, device_of(network))
    return fresh.eval()


Fault = tuple[str, str] | None
"""What was done to a part, and what to do."""


def _compiled(part: str, network: nn.Module) -> Fault:
    wrapped = [name for name, _ in network.named_modules() if name.split(".")[-1] == "_orig_mod"]
    if not wrapped:
        return None
    inner = wrapped[0].removesuffix("_orig_mod").rstrip(".")
    place = f"pipe.{part}.{inner}".rstrip(".")
    return (
        f"{place} is wrapped by torch.compile, which renames its parameters",
        f"unwrap it with {place} = {place}._orig_mod; to compile, call {place}.compile() afterwards, which does so in "
        "place, or load with compile_denoiser=True (model.compile: true in a file)",
    )


def _of_another_class(family: Family, part: str, network: nn.Module) -> Fault:
    needed = family.parts.get(part)
    if needed is None or any(one.__name__ == needed for one in type(network).__mro__):
        return None
    return (
        f"the pipeline's {part} is a {type(network).__name__}, but {needed} is needed",
        f"hand over the network itself (of a wrapper: pipe.{part} = pipe.{part}.module), or load the checkpoint's own",
    )


def _switched(part: str, network: Any) -> Fault:
    if part.startswith("text_encoder"):
        return None
    processors = {type(getattr(module, "processor", None)).__name__ for module in network.modules()}
    blocks = network.up_blocks if part == "unet" else ()
    if any(vars(block).get(name) is not None for block in blocks for name in _FREEU):
        return "FreeU is switched on (enable_freeu)", "call pipe.disable_freeu(), and switch it on again afterwards"
    if any("Fused" in name for name in processors):
        return (
            f"the attention projections of pipe.{part} are fused (fuse_qkv_projections), so that to_q, to_k and to_v "
            "have no part in what it computes",
            f"call pipe.unfuse_qkv_projections() (or pipe.{part}.unfuse_qkv_projections())",
        )
    if any(name.startswith("IPAdapter") for name in processors):
        return f"pipe.{part} has an IP-Adapter, which wants an image beside the prompt", "call pipe.unload_ip_adapter()"
    return None


def _hooked_or_patched(part: str, network: nn.Module) -> Fault:
    is_ours = is_offloaded(network)  # rpo's own hooks, which replace forwards
    for name, module in network.named_modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and registry.hooks and not is_ours:
            return (
                f"pipe.{part} has diffusers' hooks {', '.join(registry.hooks)} at '{name}'",
                "load the checkpoint again and leave out enable_layerwise_casting, enable_group_offload or caching; "
                "dtype=torch.bfloat16 and model.frozen_base save memory, too",
            )
        if vars(module).get("_hf_hook") is not None:
            return (
                f"pipe.{part} is moved about by accelerate's hooks (offloading, device_map)",
                'call pipe.remove_all_hooks() and pipe.to("cuda"), or load it without device_map and offloading',
            )
    for name, module in network.named_modules():
        if "forward" in vars(module) and not (is_ours and "_diffusers_hook" in vars(module)):
            return (
                f"the forward of pipe.{part}{name and '.' + name} was replaced by hand (token merging, tiling, "
                "caching, a wrapper)",
                "remove the patch with the library that made it, or load the checkpoint again",
            )
    return None
