"""Drawing the images that are going to be criticised, each with a generator of its own.

Image k of prompt i is a function of (checkpoint, LoRA, seed, i, k) and of the settings of sampling alone, whatever is
drawn beside it (but for float error), by DDIM or DPM-Solver++.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from PIL import Image

from rpo.adapters.loading import load_model
from rpo.adapters.lora_file import inspect_lora
from rpo.curation.curate_config import SHARD, SourceConfig
from rpo.curation.sources import Planned, SourcePlan, cut_to_shards, planned
from rpo.data.pixels import to_pixels
from rpo.data.prompts import read_prompts
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.models.frozen import LIBRARY
from rpo.models.usual import usual_guidance, usual_steps
from rpo.sampling.sample import image_generator, sample, solving


def plan_generation(config: SourceConfig, shard: int = SHARD) -> SourcePlan:
    """The plan of images that are to be drawn.

    Args:
        shard: Records of a shard, about.
    """
    prompts = read_prompts(config.prompts, seed=config.seed)
    drawer = Drawer(config)

    def items() -> Iterator[Planned]:
        for prompt, caption in enumerate(prompts[: config.limit]):
            group = ""
            for image in range(config.images_per_prompt):
                origin = {"kind": "generated", "seed": config.seed, "prompt": prompt, "image": image}
                key = f"generated/{drawer.fingerprint}/{config.seed}/{prompt}/{image}"
                item = planned(caption, origin, key, f"prompt {prompt} of {config.prompts}")
                group = group or item.id
                yield replace(item, group=group)

    identity = {
        "kind": "generate",
        "model": config.model.source,
        "fingerprint": drawer.fingerprint,
        "lora": Path(config.model.lora or "").name,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "images_per_prompt": str(config.images_per_prompt),
        "seed": str(config.seed),
        "num_steps": str(drawer.num_steps),
        "solver": config.solver,
        "eta": str(config.eta),
        "guidance_scale": str(drawer.guidance_scale),
    }
    return SourcePlan(cut_to_shards(items(), shard), identity, drawer, False)


@final
class Drawer:
    """Draws planned images; the checkpoint goes to its device when the first is drawn.

    Attributes:
        fingerprint: Changes with anything in the checkpoint or the LoRA.
        num_steps, guidance_scale: Those of the settings, or the pipeline's own.
    """

    def __init__(self, config: SourceConfig) -> None:
        """Read the checkpoint, on the CPU, to know its fingerprint: a run that has its images needs no more of it."""
        self._config = config
        self._named = config.model.deployed
        on_cpu = replace(self._named, device="cpu", attention="sdpa", compile=False, frozen_base="whole")
        refuse_editor(model := load_model(on_cpu), "what is drawn for pairs")
        self.num_steps = usual_steps(model, config.num_steps)
        self.guidance_scale = usual_guidance(model, config.guidance_scale)
        parts = [model.fingerprint("denoiser"), model.fingerprint("vae"), model.fingerprint("text")]
        parts += [self._named.frozen_base] if self._named.frozen_base in LIBRARY else []
        if config.model.lora is not None:
            parts.append(inspect_lora(config.model.lora).key)
        self.fingerprint = hashlib.sha256("/".join(parts).encode()).hexdigest()
        is_for_cpu = config.model.device == "cpu" or (config.model.device == "auto" and not torch.cuda.is_available())
        is_as_wanted = is_for_cpu and replace(self._named, device="cpu") == on_cpu
        self._model = model if is_as_wanted else None

    def __call__(self, items: Sequence[Planned]) -> list[Image.Image]:
        """The images of some records."""
        config, model = self._config, self._ready()
        places = [(int(item.origin["prompt"]), int(item.origin["image"])) for item in items]
        with torch.no_grad():
            grid, kernel = solving(model, self.num_steps, solver=config.solver, eta=config.eta)
            trajectory = sample(
                model,
                model.encode_prompts([item.caption for item in items]),
                grid,
                kernel,
                guidance_scale=self.guidance_scale,
                generators=[image_generator(config.seed, prompt, image) for prompt, image in places],
            )
            return [Image.fromarray(pixels) for pixels in to_pixels(model.decode(trajectory.x_0))]

    def _ready(self) -> Checkpoint:
        if self._model is None:
            self._model = load_model(self._named)
        return self._model
