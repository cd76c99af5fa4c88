"""What a run is made of, as far as it decides the result: a resumed run must be made of the same."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rpo.data.prompts import metadata_of
from rpo.from_environment import as_compared
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.models.fingerprint import describe_schedule, hash_network, is_of_checkpoint
from rpo.publishing.publish import CardFacts
from rpo.training.resume import versions

OTHER_BASE = (
    "The base that this LoRA was trained on is **not** the checkpoint named here: its denoiser has other weights, as "
    "after a LoRA was fused into it. On that checkpoint this file is only a part of the model: join it with what was "
    "fused (`rpo.adapters.stack.stack_loras`), or publish the fused base, too."
)


def base_identity(model: DiffusionModel) -> dict[str, str]:
    """The parts of a checkpoint that count, as text by name; ask before anything is trained."""
    found = {"prediction_type": str(model.prediction_type), **describe_schedule(model.scheduler_config)}
    if not isinstance(model, Checkpoint):
        return found | {"base.denoiser": hash_network(model.denoiser, {}, {})[:16]}
    return found | model.identity()


def lora_preparation(model: DiffusionModel) -> tuple[str, ...]:
    """Lines of Python after which the stock pipeline, as `pipe`, loads a LoRA; most need none."""
    return model.family.lora_preparation if isinstance(model, Checkpoint) else ()


def card_of(
    model: DiffusionModel, method: str, config: Any, *, is_lora: bool, identity: Mapping[str, str] | None = None
) -> CardFacts:
    """What a trainer knows of what it trained, for the model card.

    Args:
        is_lora: Whether the base stays, so that the file needs it.
        identity: What identifies its data.
    """
    name, is_other = "", False
    if isinstance(model, Checkpoint):
        name = model.name
        is_other = bool(name) and is_lora and is_of_checkpoint(model.denoiser, name, model.family.denoiser) is False
    return CardFacts(
        base_model=name or None,
        preparation=lora_preparation(model),
        edits=isinstance(model, Checkpoint) and model.family.edits == "always",
        method=method,
        description=OTHER_BASE if is_other else "",
        identity=identity or {},
        settings=asdict(config),
        versions=versions(),
    )


def settings_identity(config: Any, free: Collection[str]) -> dict[str, str]:
    """Every setting as text, those of a section as "section.name"; without sections and settings that are free."""
    values = {name: value for name, value in as_compared(asdict(config)).items() if name not in free}
    sections = {name: value if isinstance(value, dict) else {"": value} for name, value in values.items()}
    found = {f"{name}.{key}".rstrip("."): str(one) for name, part in sections.items() for key, one in part.items()}
    return {name: text for name, text in found.items() if name not in free}


def prompts_identity(prompts: Sequence[str]) -> dict[str, str]:
    """Prompts in their order, with what else is known of them."""
    known = [metadata_of(prompt) for prompt in prompts]
    more = "\n" + json.dumps(known, sort_keys=True) if any(known) else ""
    digest = hashlib.sha256(("\n".join(prompts) + more).encode()).hexdigest()
    return {"prompts": f"{len(prompts)} ({digest[:12]})"}
