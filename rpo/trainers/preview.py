"""Previews: the same prompts from the same noise, drawn every so often, as one image grid a person can look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from PIL import Image

from rpo.data.prompts import caption_of
from rpo.models.base import DiffusionModel
from rpo.sampling.sample import SolverName, generate
from rpo.types import Canvas, Images

PREVIEWS = "previews"
"""Where they lie in a run's folder."""

PROMPTS, IMAGES = 4, 4
"""Rows and columns of a grid."""

DPM_STEPS = 15
"""Of DPM-Solver++, with which a preview shows what 30 to 50 steps of others would."""


@dataclass(frozen=True)
class PreviewOf:
    """What a grid shows, and how it is drawn: by an ODE, whatever a run draws by."""

    prompts: Sequence[str]
    """Of which the first different ones are shown."""
    num_steps: int
    guidance_scale: float
    solver: SolverName = "ddim"
    canvas: Canvas | None = None
    originals: Callable[[Sequence[str]], Images | None] = lambda prompts: None
    """The images that prompts edit; of an editing model."""

    @property
    def rows(self) -> tuple[str, ...]:
        """The prompt of each row."""
        return tuple(dict.fromkeys(self.prompts))[:PROMPTS]

    @property
    def captions(self) -> tuple[str, ...]:
        """What a person reads beside each row: its prompt with what else is known of it."""
        return tuple(map(caption_of, self.rows))


@final
class Preview:
    """Writes `update-000020.png` and so on: one row per prompt, which begins with the image that is edited, if any."""

    def __init__(self, model: DiffusionModel, shown: PreviewOf, folder: Path | None, *, every: int, seed: int):
        """Prepare; without a folder they are drawn for another process, which writes them."""
        self._model, self._shown = model, shown
        self._folder, self._every, self._seed = folder, every, seed

    def __call__(self, update: int) -> None:
        """Draw the grid of an update, if it is due."""
        if update % self._every:
            return
        originals = self._shown.originals(self._shown.rows)
        images = generate(
            self._model,
            self._shown.rows,
            originals=originals,
            seed=self._seed,
            images_per_prompt=IMAGES,
            num_steps=self._shown.num_steps,
            guidance_scale=self._shown.guidance_scale,
            solver=self._shown.solver,
            canvas=self._shown.canvas,
        )
        if self._folder is None:
            return
        given = [()] * len(self._shown.rows) if originals is None else [(one,) for one in originals]
        rows = [torch.cat([*first, *row], dim=2) for first, row in zip(given, images.split(IMAGES), strict=True)]
        pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
        self._folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self._folder / f"update-{update:06d}.png")
