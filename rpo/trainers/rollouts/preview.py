"""Previews: the same prompts from the same noise, drawn every so often, as one image grid a person can look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from PIL import Image

from rpo.models.base import DiffusionModel
from rpo.sampling.sample import generate
from rpo.trainers.online_config import RolloutConfig

PREVIEWS = "previews"
"""Where they lie in a run's folder."""

PROMPTS, IMAGES = 4, 4
"""Rows and columns of a grid."""


@final
class Preview:
    """Writes `update-000020.png` and so on: one row per prompt."""

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[str],
        config: RolloutConfig,
        folder: Path,
        *,
        every: int,
        seed: int,
    ):
        """Prepare.

        Args:
            config: The number of steps and the guidance of the rollouts; previews are drawn by their ODE.
        """
        self._model, self._prompts, self._config = model, tuple(dict.fromkeys(prompts))[:PROMPTS], config
        self._folder, self._every, self._seed = folder, every, seed

    def __call__(self, update: int) -> None:
        """Draw the grid of an update, if it is due."""
        if not self._every or update % self._every:
            return
        images = generate(
            self._model,
            self._prompts,
            seed=self._seed,
            images_per_prompt=IMAGES,
            num_steps=self._config.num_steps,
            guidance_scale=self._config.guidance_scale,
        )
        rows = [torch.cat(list(row), dim=2) for row in images.split(IMAGES)]
        pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
        self._folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self._folder / f"update-{update:06d}.png")
