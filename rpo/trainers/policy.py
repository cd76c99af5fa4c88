"""The policy that a trainer moves and the reference it must stay near, for LoRA and for full fine-tuning alike.

With LoRA the reference is the same network with its adapters off. Full fine-tuning keeps one frozen copy of the
denoiser and puts it in the model's place for as long as the reference is asked.
"""

import copy
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rpo.adapters.lora import (
    adapter_layers,
    add_lora,
    lora_parameters,
    reference,
    refuse_adapter,
    save_lora,
    start_adapters,
    train_adapters,
    without,
)
from rpo.errors import InputError
from rpo.files.local_paths import clean_configs
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.models.distilled import ASSISTANT
from rpo.models.frozen import is_offloaded, is_quantized, recomputed
from rpo.models.plain import parts_of
from rpo.models.sharding import is_sharded, mesh_of, refuse_network, shard, whole_copy
from rpo.trainers.settings import AdapterConfig, LearningConfig
from rpo.training.processes import Processes


@final
class LoraPolicy:
    """A LoRA adapter on the model's denoiser.

    Attributes:
        model: The model it moves.
        parameters: What the optimiser updates, float32.
        starts_at_reference: Whether it is its reference before the first update: not where it starts from LoRAs and the
            reference is the base.
    """

    def __init__(self, model: Checkpoint, adapter: AdapterConfig, *, seed: int):
        """Add the adapter to `model.denoiser`, beside LoRAs that it carries, or in their place."""
        self.model, network = model, model.denoiser
        carried = start_adapters(network, model.family.denoiser)
        if ASSISTANT in carried:
            _require_denoiser_alone(model, "would stay in use when people draw; give one", only=ASSISTANT)
        kept = [name for name in carried if adapter.reference == "start" or name == ASSISTANT]
        self._start = tuple(kept)
        moved = [name for name in carried if name not in kept]
        self.starts_at_reference = not moved
        if moved:
            why = "the reference would keep, but adapter.reference is base; give adapter.reference: start, or one"
            _require_denoiser_alone(model, why)
            self.parameters = train_adapters(network, moved, beside=kept)
        else:
            targets = adapter.target_modules or model.family.lora_targets
            self.parameters = add_lora(
                network, rank=adapter.rank, alpha=adapter.alpha, target_modules=targets, seed=seed, beside=self._start
            )
        self._layers = adapter_layers(network)

    def shard(self, mesh: DeviceMesh) -> None:
        """Divide the base; every process keeps all of the adapters."""
        adapters = [one for name, one in self.model.denoiser.named_parameters() if ".lora_" in name]
        shard(self.model.denoiser, mesh, whole=adapters)

    @property
    def note(self) -> str:
        """What a plan has to say of a start from a LoRA; else nothing."""
        return f"starts from the LoRA {', '.join(self._start)}, which is the reference's, too" if self._start else ""

    def deployed(self) -> AbstractContextManager[None]:
        """Inside, `model` is as people will use it: without the assistant that undoes distillation."""
        return without(self._layers, ASSISTANT)

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `model` is the reference, without gradient: the base, with the LoRAs that the policy started from."""
        return reference(self.model.denoiser, self._layers, keep=self._start)

    def require_in_place(self) -> None:
        """Refuse to go on where the adapter is no longer in the network."""
        if [*map(id, lora_parameters(self.model.denoiser))] != [*map(id, self.parameters)]:
            raise InputError(
                "the adapter of this trainer is no longer in its pipeline: a later trainer took it over, or it was "
                "unloaded; expected it there; go on with the later one, or make a new trainer; save each before the "
                "next is made"
            )

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write a verified LoRA file; see `save_lora`."""
        return save_lora(self.model, folder)

    def help_save(self) -> None:
        """Make the forwards by which another process verifies its file."""
        with TemporaryDirectory() as aside:
            save_lora(self.model, aside)


@final
class FullPolicy:
    """All weights of the model's denoiser, with one frozen copy of how they were.

    Attributes:
        model: The model it moves.
        parameters: What the optimiser updates, float32.
    """

    def __init__(self, model: DiffusionModel):
        """Unfreeze the denoiser and keep a copy."""
        half = [p.dtype for p in model.denoiser.parameters() if p.dtype not in (torch.float32, torch.float64)]
        if half:
            raise InputError(
                f"full fine-tuning needs float32 weights, but they are {half[0]}; load the model with "
                "dtype=torch.float32 (and learning.mixed_precision: bf16), or train a LoRA"
            )
        self.model = model
        self._frozen = copy.deepcopy(model.denoiser)
        model.denoiser.requires_grad_(True)
        self.parameters: list[nn.Parameter] = list(model.denoiser.parameters())

    note, starts_at_reference = "", True

    def shard(self, mesh: DeviceMesh) -> None:
        """Divide both; a process then updates its part of every parameter."""
        for network in (self._frozen, self.model.denoiser):
            shard(network, mesh)
        self.parameters = list(self.model.denoiser.parameters())

    def require_in_place(self) -> None:
        """All weights of a network are where they are."""

    def deployed(self) -> AbstractContextManager[None]:
        """Nothing is left out."""
        return nullcontext()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, `model` is the reference: the frozen copy, without gradient."""
        policy = self.model.denoiser
        self.model.denoiser = self._frozen
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.denoiser = policy

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the whole pipeline, with its new denoiser, as a diffusers folder."""
        if not isinstance(self.model, Checkpoint):
            raise InputError(
                f"a {type(self.model).__name__} has no diffusers pipeline to write; save its denoiser's state_dict"
            )
        pipe = self.model.pipe
        if is_sharded(self.model.denoiser):
            pipe = copy.copy(pipe)
            setattr(pipe, self.model.family.denoiser, whole_copy(self.model.denoiser, is_kept=True))
        pipe.save_pretrained(folder)
        clean_configs(Path(folder))
        for file in Path(folder).rglob("*.safetensors"):  # which only their owner may read, as the library has it
            shutil.copymode(Path(folder) / "model_index.json", file)
        return Path(folder)

    def help_save(self) -> None:
        """Give this process's parts of the weights to the one that writes."""
        whole_copy(self.model.denoiser, is_kept=False)


Policy = LoraPolicy | FullPolicy


def make_policy(model: DiffusionModel, adapter: AdapterConfig, *, seed: int) -> Policy:
    """The policy that the settings describe, on the model itself."""
    is_diffusers = isinstance(model, Checkpoint)
    if not is_diffusers and (adapter.train == "lora" or adapter.gradient_checkpointing):
        raise InputError(
            f"a LoRA and gradient checkpointing are things of diffusers' networks, but the model is a "
            f"{type(model).__name__}; set adapter.train: full and adapter.gradient_checkpointing: false"
        )
    is_away = is_diffusers and is_offloaded(model.denoiser)
    if is_away and not adapter.gradient_checkpointing:
        raise InputError(
            "the denoiser is offloaded, but adapter.gradient_checkpointing is false, so that backward would need all "
            "layers on the device at once; give adapter.gradient_checkpointing: true"
        )
    if is_diffusers and adapter.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing(recomputed if is_away else None)
    if is_diffusers and adapter.train == "full":
        refuse_adapter(model.denoiser, model.family.denoiser)
        if is_away or any(map(is_quantized, model.denoiser.parameters())):
            raise InputError(
                "adapter.train: full trains all weights, but the denoiser's are quantised or offloaded; give "
                "model.frozen_base: whole, or adapter.train: lora"
            )
    if not is_diffusers or adapter.train == "full":
        return FullPolicy(model)
    return LoraPolicy(model, adapter, seed=seed)


def divide(policy: Policy, learning: LearningConfig, processes: Processes) -> None:
    """Divide the denoiser among the processes, if that is asked for, and bring what stays whole to their devices."""
    model, kind = policy.model, learning.sharding
    if kind != "none" and isinstance(policy, FullPolicy) and learning.optimizer != "adamw":
        raise InputError(
            f"learning.sharding is {kind} with adapter.train: full, whose moments are divided, too, but "
            f"learning.optimizer is {learning.optimizer}; give adamw"
        )
    if not isinstance(model, Checkpoint):
        if kind != "none":
            raise InputError(f"learning.sharding is {kind}, but a {type(model).__name__} is no pipeline; give none")
        return
    if is_sharded(model.denoiser):  # by an earlier trainer
        if kind == "none" or isinstance(policy, FullPolicy):
            raise InputError(
                "the denoiser was divided among the processes by an earlier trainer, but learning.sharding is "
                f"{kind} and adapter.train {'full' if isinstance(policy, FullPolicy) else 'lora'}; expected another "
                "LoRA with the same sharding: give these, or load the checkpoint again"
            )
        return
    if kind == "none":
        return
    refuse_network(kind, model.denoiser, processes=processes.count)
    policy.shard(mesh_of(kind, processes.device, processes.count))
    for network in parts_of(model.pipe, model.family).values():
        if network is not model.denoiser:
            network.to(processes.device)


def _require_denoiser_alone(model: Checkpoint, why: str, *, only: str = "") -> None:
    carried = {name: start_adapters(network, name) for name, network in model.text_encoders.items()}
    adapted = [name for name, found in carried.items() if (only in found if only else found)]
    if adapted:
        raise InputError(f"the LoRA adapts {' and '.join(adapted)}, too, which {why} of the denoiser alone")
