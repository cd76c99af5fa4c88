"""What a run will need, before any weight is read: parameters, memory, disk, and the cost of an update.

Only configurations are read. The denoiser, the text encoders and the autoencoder run once on fake tensors of the real
sizes, so that operations are counted and memory is followed, and nothing is computed. Memory grows in proportion to the
rows of a call, which one row is measured for. What kernels take for a moment, the allocator's gaps and the CUDA context
(about half a GiB) come on top.

Costs are in U, one latent through the denoiser forward.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rpo.adapters.lora import add_lora
from rpo.errors import InputError
from rpo.models.base import ORIGINAL
from rpo.models.config import HALF_TYPES
from rpo.models.execution import call
from rpo.models.frozen import LIBRARY, fetched_bytes, planned_bytes
from rpo.models.latents import images_per_slope, recomputed
from rpo.models.loading import quantized_parts
from rpo.models.plain import parts_of
from rpo.models.sharding import divided_bytes, refuse_settings
from rpo.models.unloaded import DEPENDS_ON_CONTENT, pretend, unloaded_pipeline
from rpo.runs.price import counts
from rpo.runs.train_config import DPORunConfig, RewardGradientRunConfig
from rpo.trainers.checks.footprint import Footprint, footprint
from rpo.trainers.checks.memory import readable_bytes
from rpo.training.loop_config import LoopConfig
from rpo.training.optimizer import MOMENTS
from rpo.types import Canvas, Embedding

Config = Any
"""The settings of a run, of whatever algorithm; see `rpo.runs.train_config`."""

WEIGHT_AND_GRADIENT = 4 + 4  # bytes per trained parameter


@dataclass(frozen=True)
class Plan:
    """What was counted; bytes unless said."""

    parts: dict[str, tuple[int, int]]
    """Parameters and bytes of each part."""
    fetched: int | None
    """Bytes of the denoiser that are on the device at once, if it is offloaded or divided."""
    shared_by: int
    """Processes that have a part each of a denoiser, and of what is trained of it."""
    waiting: tuple[str, ...]
    """Parts that leave the device while updates run."""
    moments: int
    """Bytes of the optimiser per trained parameter."""
    trained: int
    """Parameters that an update moves."""
    canvas: Canvas
    forward: Footprint
    """Of one latent through the denoiser, without gradient."""
    update: Footprint
    """Of one latent through it and back."""
    encode: Footprint
    """Of one image to its latents."""
    decode: Footprint
    """Of one latent to its image."""
    slope: Footprint | None
    """Of the reward's slope by the latent of one image, the reward model apart; None where it is not asked for."""
    rows: int
    """Latents in one call of an update."""
    drawn: int
    """Latents in one call while drawing."""
    decoded: int
    """Images that the autoencoder draws at once."""
    cost: float
    """Of one update, in U: drawing, reference and training."""
    updates: int
    guided: bool
    """Whether guidance costs a second latent."""

    def weights(self, *away: str) -> int:
        """Bytes on the device of all parts but those."""
        denoiser = next(iter(self.parts))
        sizes = {name: size for name, (_, size) in self.parts.items() if name not in away}
        return sum((sizes if self.fetched is None else sizes | {denoiser: self.fetched}).values())

    @property
    def own(self) -> int:
        """Parameters that an update moves on one process: all of an adapter, its part of a denoiser."""
        is_whole = self.trained < next(iter(self.parts.values()))[0]
        return self.trained if is_whole else -(-self.trained // self.shared_by)

    @property
    def backward(self) -> float:
        """Forward and backward of one latent, in U."""
        return self.update.flops / self.forward.flops

    @property
    def peaks(self) -> dict[str, int]:
        """The most that is held at once, by what is going on."""
        rest = self.weights() + self.own * 4
        trained = self.own * (WEIGHT_AND_GRADIENT + self.moments)
        running = self.weights(*self.waiting) + trained
        decoding = self.weights(*(name for name in self.waiting if name != "vae")) + trained
        found = {"at rest": rest, "encoding an image": rest + self.encode.peak}
        if self.drawn:
            found[f"drawing, {self.drawn} latents at once"] = running + self.drawn * self.forward.peak
            found[f"decoding {self.decoded} images"] = decoding + self.decoded * self.decode.peak
        if self.slope:
            followed = images_per_slope(self.canvas.height * self.canvas.width)
            found[f"the slope of {followed} images"] = decoding + followed * self.slope.peak
        return found | {f"an update, {self.rows} latents at once": running + self.rows * self.update.peak}

    @property
    def peak(self) -> int:
        """The largest of them."""
        return max(self.peaks.values())

    def __str__(self) -> str:
        """A table for a person."""
        wide = max(map(len, (*self.parts, *self.peaks)))
        lines = [f"at {self.canvas} px", "", "parameters"]
        lines += [
            f"  {name:{wide}}  {count:>14,}  {readable_bytes(size)}" for name, (count, size) in self.parts.items()
        ]
        lines += [f"  {'trained':{wide}}  {self.trained:>14,}", "", "memory, the most at once"]
        lines += [f"  {name:{wide}}  {readable_bytes(size)}" for name, size in self.peaks.items()]
        lines += [f"  ({', '.join(self.waiting)} wait on the CPU while updates run)"] if self.waiting else []
        held = "so does the denoiser, but for the block that computes", "the denoiser lies in parts, but for two blocks"
        lines += [] if self.fetched is None else [f"  ({held[self.shared_by > 1]})"]
        total = self.cost * self.updates
        lines += [
            "",
            "cost (U: one latent through the denoiser, forward)",
            f"  {'U':{wide}}  {self.forward.flops / 1e12:.3g} TFLOP",
            f"  {'forward and backward':{wide}}  {self.backward:.2f} U",
            f"  {'an update':{wide}}  {self.cost:,.0f} U, {self.cost * self.forward.flops / 1e12:,.3g} TFLOP",
            f"  {f'{self.updates:,} updates':{wide}}  {total:,.0f} U, {total * self.forward.flops / 1e15:,.3g} PFLOP",
            "",
            "disk",
            f"  {'result':{wide}}  {readable_bytes(self.trained * 4)}",
            f"  {'a checkpoint':{wide}}  {readable_bytes(self.trained * (4 + self.moments))}, of which "
            f"{LoopConfig.keep_checkpoints} are kept",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Counted:
    """What was counted on the networks of a run, however many latents it takes at once and wherever weights lie."""

    trained: int
    canvas: Canvas
    forward: Footprint
    update: Footprint
    encode: Footprint
    decode: Footprint
    slope: Footprint | None


Known = dict[tuple[Any, ...], Counted]
"""What was counted, by all that it depends on."""


def plan(config: Config, *, processes: int = 1, known: Known | None = None) -> Plan:
    """Count what a run needs, each of `processes` if they share a denoiser; takes up to a minute, and a gigabyte.

    What is `known` is not counted again, and what is counted is added: for plans of one checkpoint.
    """
    model, known = config.model, {} if known is None else known
    _refuse(config, processes)
    pipe, family = unloaded_pipeline(model.source, dtype=getattr(torch, model.dtype), revision=model.revision)
    networks: dict[str, Any] = dict(parts_of(pipe, family))
    small = dict(quantized_parts(family, pipe.config)) if model.frozen_base in LIBRARY else {}
    parts = {
        name: (
            sum(weights.numel() for weights in one.parameters()),
            planned_bytes(one, model.frozen_base if name in small else "whole"),
        )
        for name, one in networks.items()
    }
    fetched = _fetched(config, networks[family.denoiser], processes)
    depends_on = (
        *(model.source, model.revision, model.dtype, config.learning.mixed_precision),
        *(repr(config.adapter), repr(_size(config)), isinstance(config, RewardGradientRunConfig)),
    )
    if depends_on not in known:
        known[depends_on] = _counted(pipe, family, config)
    found = known[depends_on]
    is_alone = isinstance(config, DPORunConfig) and config.encode_ahead
    is_guided = family.guidance == "cfg"
    return Plan(
        parts,
        fetched,
        1 if config.learning.sharding == "none" else processes,
        tuple(name for name in parts if name != family.denoiser) if is_alone else (),
        MOMENTS[config.learning.optimizer],
        *(found.trained, found.canvas, found.forward, found.update, found.encode, found.decode, found.slope),
        *counts(config, found.canvas, found.update.flops / found.forward.flops, guided=is_guided),
        config.learning.updates,
        is_guided,
    )


def _counted(pipe: Any, family: Any, config: Config) -> Counted:
    """Of networks on the meta device, which come out trained and fake."""
    model, adapter, denoiser = config.model, config.adapter, pipe.components[family.denoiser]
    if adapter.train == "lora":
        family.enable_lora(pipe)
        add_lora(denoiser, rank=adapter.rank, target_modules=adapter.target_modules or family.lora_targets)
    else:
        denoiser.requires_grad_(True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for network in parts_of(pipe, family).values():
        pretend(network, mode)
    canvas = _canvas(pipe, family, config)
    shape = family.latent_channels(pipe), *(side // family.cell(pipe) for side in canvas)
    compute_dtype = getattr(torch, HALF_TYPES.get(config.learning.mixed_precision) or model.dtype)
    with mode:
        latent, time, image = torch.randn(1, *shape), torch.full((1,), 500), torch.rand(1, 3, *canvas)
    embedding = _embedding(pipe, family, mode, getattr(torch, model.dtype))
    if family.edits == "always":
        embedding = {**embedding, ORIGINAL: latent}

    def forward() -> Any:
        return call(family, pipe, denoiser, latent, time, embedding, compute_dtype=compute_dtype)

    with torch.no_grad():
        drawing = footprint(forward)
        with mode:
            encoding = footprint(lambda: family.encode(pipe, image))
            decoding = footprint(lambda: family.decode(pipe, latent))
    slope = _slope(pipe, family, latent, mode, config)
    if adapter.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        denoiser.train()
    updating = footprint(lambda: forward().square().mean().backward())
    trained = sum(one.numel() for one in denoiser.parameters() if one.requires_grad)
    return Counted(trained, canvas, drawing, updating, encoding, decoding, slope)


def _fetched(config: Config, denoiser: Any, processes: int) -> int | None:
    if config.learning.sharding != "none":
        return divided_bytes(denoiser, processes)
    return fetched_bytes(denoiser) if config.model.frozen_base == "offload" else None


def _refuse(config: Config, processes: int) -> None:
    """Refuse what training would refuse after weights were loaded: to divide them, or train all in half precision."""
    if processes < 1:
        raise InputError(f"processes is {processes}, but one at least makes the run; give 1 or more, or leave it out")
    model, divided = config.model, "none" if config.learning.sharding == "none" else "full"  # hybrid: on each machine
    refuse_settings(divided, processes=processes, frozen_base=model.frozen_base, is_compiled=model.compile)
    if config.adapter.train == "full" and config.model.dtype != "float32":
        raise InputError(
            f"adapter.train: full needs float32 weights, but model.dtype is {config.model.dtype}; give model.dtype: "
            "float32 (and learning.mixed_precision: bf16), or adapter.train: lora"
        )


def _embedding(pipe: Any, family: Any, mode: FakeTensorMode, dtype: torch.dtype) -> Embedding:
    """Of a prompt as long as the family takes; a mask is no fake, for some networks look where a prompt ends."""
    if family.text_sees:
        raise InputError(
            f"{family.name} cannot be planned: what its text encoders take depends on the image that is edited; "
            "expected another family: run `rpo train` with learning.updates=1, and watch the device's memory"
        )
    try:
        with mode, torch.no_grad():
            found = family.embed(pipe, ["a"], torch.device("cpu"))
    except DEPENDS_ON_CONTENT:
        length, width = family.context(pipe).max_length, pipe.text_encoder.config.get_text_config().hidden_size
        with mode:
            found = {"tokens": torch.zeros(1, length, width, dtype=dtype), "mask": torch.ones(1, length)}
    if "mask" in found:
        return found | {"mask": torch.ones(found["mask"].shape, dtype=torch.bool)}
    return found


def to_fit(config: Config, memory: float, *, processes: int = 1, known: Known | None = None) -> tuple[list[str], Plan]:
    """The usual changes, in their order, with which a run needs no more than so many bytes; and its plan.

    Networks are counted anew only where a change makes them compute otherwise; see `plan` for what is `known`.

    Raises `InputError` if all of them are not enough.
    """
    changes: dict[str, Any] = {}
    known = {} if known is None else known
    found = plan(config, processes=processes, known=known)
    for key, value in CHANGES:
        if found.peak <= memory:
            break
        changed = config if key in _not_for(config, processes) else _with(config, key, value)
        if (
            changed != config
            and (smaller := plan(changed, processes=processes, known=known)).peak < WORTHWHILE * found.peak
        ):
            config, found = changed, smaller
            changes[key] = value
    if found.peak > memory:
        raise InputError(
            f"the run needs {readable_bytes(found.peak)} with all of {', '.join(map(_told, CHANGES))}, but there are "
            f"{readable_bytes(memory)}; expected less: take a smaller checkpoint or resolution, or a larger card"
        )
    return [_told(one) for one in changes.items()], found


def _not_for(config: Any, processes: int) -> set[str]:
    """The changes that this run cannot have."""
    is_divided, is_full = config.learning.sharding != "none", config.adapter.train == "full"
    held = {"model.frozen_base": is_divided or is_full, "model.dtype": is_full, "learning.sharding": processes == 1}
    return {key for key, is_held in held.items() if is_held}


def _with(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    if not hasattr(config, name):
        return config
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def _told(change: tuple[str, Any]) -> str:
    return f"{change[0]}: {'true' if change[1] is True else change[1]}"


def bytes_of(text: str) -> float:
    """From "12GB" to bytes, GB being 1024³ as cards have it."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in ("GB", "MB") or not number.replace(".", "", 1).isdigit():
        raise InputError(f"--memory is {text!r}, but a number with its unit is needed; give 12GB, 24GB or 80GB")
    return float(number) * 1024 ** (3 if unit == "GB" else 2)


CHANGES: tuple[tuple[str, Any], ...] = (
    ("encode_ahead", True),
    ("model.dtype", "bfloat16"),
    ("learning.micro_batch", 1),
    ("rollout.batch_size", 1),
    ("preview_every", 0),
    ("learning.optimizer", "adamw8bit"),
    ("adapter.gradient_checkpointing", True),
    ("learning.sharding", "full"),
    ("model.frozen_base", "int8"),
    ("model.frozen_base", "nf4"),
    ("model.frozen_base", "offload"),
)
"""What makes a run smaller, from what costs least to what costs most."""

WORTHWHILE = 0.98
"""A change that leaves more of the peak than this is not made."""


def _size(config: Config) -> Any:
    return config.resolution if isinstance(config, DPORunConfig) else config.rollout.resolution


def _canvas(pipe: Any, family: Any, config: Any) -> Canvas:
    size = _size(config)
    if size is None:
        height, width = family.native(pipe)
        return Canvas(height * family.cell(pipe), width * family.cell(pipe))
    return Canvas(size, size) if isinstance(size, int) else Canvas(*size)


def _slope(pipe: Any, family: Any, latent: Tensor, mode: FakeTensorMode, config: Config) -> Footprint | None:
    """Of an image's decoding there and back, for those who need it."""
    if not isinstance(config, RewardGradientRunConfig):
        return None
    with mode, recomputed(pipe) if config.adapter.gradient_checkpointing else nullcontext():
        followed = latent.clone().requires_grad_()
        return footprint(lambda: family.decode(pipe, followed).square().mean().backward())
