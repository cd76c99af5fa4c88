"""Whether a GPU computes what the processor does: a step of the sampler, and a DPO loss with its gradient, by family.

Pipelines are tiny, of the real classes, with random weights, and compute in float32 without TF32. Noise and times are
the same, for they are drawn on the processor.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_part import Note, Setting
from torch import Tensor

from rpo.models.checkpoint import Checkpoint
from rpo.objectives.preference.dpo import Dpo
from rpo.process.diffusion import diffusion_of
from rpo.sampling.sample import image_generator, noise_of
from rpo.sampling.step import predict, transition
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.settings import AdapterConfig, LearningConfig
from rpo.trainers.trainer import Trainer

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red circle", "a house"]
GUIDANCE = 3.0

TOLERANCES = {"prediction": 1e-3, "x_s": 1e-3, "log_prob": 1e-3, "loss": 1e-3, "gradient": 1e-2}
"""Of what is compared: largest difference by the largest number; of a gradient, lengths."""


def families() -> dict[str, Any]:
    """A builder of a tiny pipeline by family, those of the tests."""
    sys.path.insert(0, str(ROOT))
    from tests.contracts.families import FAMILIES  # noqa: PLC0415
    from tests.tiny_amused import tiny_amused  # noqa: PLC0415

    return {**FAMILIES, "masked_tokens": tiny_amused}


def parity(setting: Setting, note: Note) -> None:
    """Compare, family by family."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name, build in families().items():
        try:
            note(name, compared(build, setting.where))
        except Exception as error:
            note(name, {"is_equal": False, "error": f"{type(error).__name__}: {error}"})


def compared(build: Any, device: torch.device) -> dict[str, Any]:
    """How far both are apart, and whether that is rounding."""
    here = answers(build, torch.device("cpu"), None)
    there = answers(build, device, here)
    apart = {name: _apart(name, here[name], there[name]) for name in TOLERANCES if name in here}
    return {**apart, "is_equal": all(size <= TOLERANCES[name] for name, size in apart.items())}


def answers(build: Any, device: torch.device, others: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """A step and a loss, on the processor again.

    Args:
        build: Makes the pipeline.
        device: Where to compute.
        others: Those of the first device, whose step the second one is asked about.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Checkpoint(build().to(device)), DPO(coloured_pairs(), _config(folder)))
        with torch.no_grad():
            for index, parameter in enumerate(trainer.run.policy.parameters):  # off its start, where B is 0
                generator = torch.Generator().manual_seed(index)
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
        found = _step(trainer.run.model, others) | _loss(trainer)
    return {name: one.detach().float().cpu() for name, one in found.items()}


@torch.no_grad()
def _step(model: Any, others: dict[str, Tensor] | None) -> dict[str, Tensor]:
    grid, diffusion = model.grid(4), diffusion_of(model.prediction_type)
    noise = noise_of(model, [image_generator(0, index, 0) for index in range(len(PROMPTS))], 1)
    x_t, cond = diffusion.start(noise[0]), model.encode_prompts(PROMPTS)
    said = predict(model, x_t, grid[0], cond, guidance_scale=GUIDANCE)
    drawn = transition(model, said, x_t, grid[0], grid[1], diffusion.kernel("ddim", 1.0))
    x_s = drawn.sample(noise[1])
    asked = x_s if others is None else others["state"].to(x_s)
    found = {"prediction": said, "log_prob": drawn.log_prob(asked), "state": x_s}
    return found | ({"x_s": x_s} if diffusion.is_gaussian else {})  # tokens are drawn or not: no rounding of one


def _loss(trainer: Trainer) -> dict[str, Tensor]:
    algorithm = trainer.algorithm
    algorithm.prepare()
    loss = algorithm.loss(next(algorithm.batches(0))).loss
    loss.backward()
    every = [one.grad for one in trainer.run.policy.parameters if one.grad is not None]
    return {"loss": loss, "gradient": torch.cat([one.flatten() for one in every])}


def _apart(name: str, here: Tensor, there: Tensor) -> float:
    if name == "gradient":
        return float((here - there).norm() / here.norm())
    return float((here - there).abs().max() / here.abs().max().clamp_min(1e-12))


def _config(folder: str) -> DPOConfig:
    return DPOConfig(
        objective=Dpo(beta=100.0),
        adapter=AdapterConfig(rank=4),
        pairs_per_update=2,
        preview_every=0,
        preflight=False,
        output=folder,
        learning=LearningConfig(updates=1, micro_batch=2, progress=False),
    )


def coloured_pairs(count: int = 2, side: int = 64) -> Any:
    """Pairs of images in flat patches, which take no time to pack and unpack, whatever their size."""
    import numpy as np  # noqa: PLC0415

    from rpo.data.preference import PreferencePair, encode_png, pair_set  # noqa: PLC0415

    patches = np.random.default_rng(0).integers(0, 256, (count, 2, 8, 8, 3), dtype=np.uint8)
    images = patches.repeat(side // 8, axis=2).repeat(side // 8, axis=3)
    pairs = [
        PreferencePair(f"prompt {index}", encode_png(chosen), encode_png(rejected), name=f"pair {index}")
        for index, (chosen, rejected) in enumerate(images)
    ]
    return pair_set(pairs, origin="benchmark")
