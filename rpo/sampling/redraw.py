"""Reflection for models that draw tokens (PARM++, arXiv:2501.13926): what a critique names is masked and drawn again.

    image → places at fault → their tokens masked, the others kept → the steps that are left for so many masks

An image enters the walk of its generator at the first step where no more is masked than in it; so a small fault costs
few steps. The tokens of an image are those of the autoencoder, nearest to it. Whether what comes out is better is for a
judge to say (`rpo.sampling.select.corrected`). Latents have an editor for that (`rpo.curation.correct`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.process.categorical import MASK, TOKENS, is_masked
from rpo.process.diffusion import diffusion_of
from rpo.randomness import keyed_generator
from rpo.sampling.sample import noise_of, solving
from rpo.sampling.select import How, at_once, forwards, slices
from rpo.sampling.step import predict, transition
from rpo.types import Images, Latents

Faults = Callable[[Images, Sequence[str]], Bool[Tensor, "images height width"]]
"""The pixels that a critique names, of each image; none where nothing is wrong."""

COVERED = 0.5
"""Share of a token's pixels at fault from which on it is drawn again."""


@final
class Remasking:
    """From images to what the generator makes of them once the places at fault are empty.

    Attributes:
        redrawn: How many images were drawn again so far.
        evaluations: States that went through the denoiser.
    """

    def __init__(self, model: DiffusionModel, faults: Faults, how: How, *, seed: int = 0) -> None:
        """Take who draws and who names places.

        Args:
            how: How grids are filled; `num_steps` are those of a whole one.
            seed: Of the noise, which is a function of it, the round and the image's place.
        """
        if diffusion_of(model.prediction_type).is_gaussian:
            raise InputError(
                "only tokens can be masked and drawn again, but this model draws latents; expected a masked-token "
                "generator; take an editor, as `rpo.curation.correct` does"
            )
        self._model, self._faults, self._how, self._seed = model, faults, how, seed
        self.redrawn = self.evaluations = 0

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[str], number: int) -> Images:
        """What was made of each image: itself where nothing is at fault.

        Args:
            images: RGB in [0, 1], one per prompt.
            number: Of the round.
        """
        faults, found = self._faults(images, prompts), images.clone()
        wrong = faults.flatten(1).any(dim=1).nonzero().flatten()
        for rows in (wrong[part] for part in slices(len(wrong), at_once(self._model, self._how))):
            generators = [keyed_generator("remasking", self._seed, number, int(row)) for row in rows]
            own = replace(self._how, noise_of=lambda row, _, made=generators: made[row])
            states = self._model.encode_moments(images[rows])[0]
            texts = [prompts[int(row)] for row in rows]
            states, evaluations = redraw(self._model, states, _cells(faults[rows], states), texts, own)
            found[rows] = self._model.decode(states).to(found)
            self.evaluations += evaluations
        self.redrawn += len(wrong)
        return found


def redraw(
    model: DiffusionModel, states: Latents, places: Bool[Tensor, "images h w"], prompts: Sequence[str], how: How
) -> tuple[Latents, int]:
    """Draw some places of whole grids again.

    Args:
        states: Without masks.
        places: Which; at least one of each grid.
        how: `num_steps` are those of a whole grid; the noise is that of image 0 of each prompt.

    Returns:
        Whole grids, and the states that went through the denoiser.
    """
    grid, kernel = solving(model, how.num_steps, solver=how.solver, spacing=how.spacing, eta=how.eta, canvas=how.canvas)
    noise = noise_of(model, [how.generator(row, 0) for row in range(len(states))], grid.num_steps, how.canvas)
    x_t, cond = states.clone(), model.encode_prompts(list(prompts))
    x_t[:, TOKENS] = torch.where(places.to(x_t.device), float(MASK), x_t[:, TOKENS])
    share, evaluations = is_masked(x_t).float().mean(dim=1), 0
    for step in range(grid.num_steps):
        t, s = grid[step], grid[step + 1]
        rows = ((t.sigma <= share + 1e-6) | (step == grid.num_steps - 1)).nonzero().flatten()
        if len(rows):
            said = predict(model, x_t[rows], t, cond.select(rows), guidance_scale=how.guidance_scale)
            evaluations += len(rows) * forwards(model, how)
            x_t[rows] = transition(model, said, x_t[rows], t, s, kernel).sample(noise[step + 1, rows])
    return x_t, evaluations


def _cells(faults: Bool[Tensor, "images height width"], states: Latents) -> Bool[Tensor, "images h w"]:
    """The tokens at fault: those covered by half, and the most covered one of each image."""
    height, width = states.shape[2:]
    covered = functional.adaptive_avg_pool2d(faults[:, None].float(), (height, width))[:, 0]
    most = covered.amax(dim=(1, 2), keepdim=True)
    return covered >= most.clamp_max(COVERED)
