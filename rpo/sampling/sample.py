"""The one sampler: `sample` draws trajectories, `generate` images.

Its step is that of `rpo.sampling.step`, which trainers replay. Each image has a generator of its own, seeded by (seed,
prompt, image): it is the same image whatever batch it is drawn in, and `pipe(prompt, generator=image_generator(...))`
starts from its noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rpo.devices import uploaded
from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.solvers import BlackBoxSolver
from rpo.process.continuous import grid_at, uniform_times
from rpo.process.diffusion import diffusion_of
from rpo.process.transition import Kernel
from rpo.randomness import keyed_generator
from rpo.sampling.step import has_negative, predict, predict_negative, transition
from rpo.types import Canvas, Conditioning, Grid, Images, Output, Trajectory

SolverName = Literal["ddim", "dpm_solver"]
SpacingName = Literal["checkpoint", "uniform"]


def image_generator(seed: int, prompt_index: int, image_index: int) -> torch.Generator:
    """The generator of one image, on the CPU so that every device draws the same noise.

    Args:
        seed: Of the whole run.
        prompt_index: Which prompt of the run.
        image_index: Which image of that prompt.
    """
    return keyed_generator(seed, prompt_index, image_index)


@dataclass(frozen=True)
class Keep:
    """What `sample` keeps beside the latents, for a trainer that would otherwise compute it again."""

    predictions: bool = False
    """The guided outputs of the network: one more latent per step."""

    live_steps: frozenset[int] = frozenset()
    """Steps whose forward keeps its graph, for a backward without a second forward; activations stay in memory."""

    negatives: bool = False
    """The outputs under the negative conditioning, computed apart from the prompt's and left out of the graph, so that
    training can leave that branch where it was: with half of the batch, each branch is what training repeats."""


@torch.no_grad()
def sample(
    model: DiffusionModel,
    cond: Conditioning,
    grid: Grid,
    kernel: Kernel,
    *,
    guidance_scale: float,
    generators: Sequence[torch.Generator],
    keep: Keep | None = None,
    canvas: Canvas | None = None,
) -> Trajectory:
    """Draw one trajectory per row of `cond`, from pure noise to data.

    Costs `num_steps` denoiser forwards per image, twice that with guidance. Nothing in the loop waits for the device:
    all noise is drawn first, into the tensor that the trajectory then overwrites.

    Args:
        model: The checkpoint.
        cond: One row per image.
        grid: Nodes from noise to data; see `model.grid`.
        kernel: The reverse step, such as `Ddim(eta=1.0)`.
        guidance_scale: 1 is no guidance.
        generators: One per image; see `image_generator`.
        keep: What to keep for a trainer; nothing by default.
        canvas: Size of the images; by default the checkpoint's own.

    Raises:
        ValueError: If the number of generators is not the number of images.
    """
    if len(generators) != len(cond):
        raise InputError(
            f"{len(generators)} generators were given for {len(cond)} images; give one generator per row of cond"
        )
    keep = keep or Keep()
    latents = noise_of(model, generators, grid.num_steps, canvas)
    latents[0] = diffusion_of(model.prediction_type).start(latents[0])
    log_probs = torch.empty(grid.num_steps, len(cond), dtype=torch.float32, device=model.device)
    parts_branches = keep.negatives and has_negative(model, guidance_scale)
    predictions: Tensor | None = None
    negatives: Tensor | None = None
    live: dict[int, Output] = {}
    for step in range(grid.num_steps):
        x_t, t, s = latents[step], grid[step], grid[step + 1]
        if step in keep.live_steps:
            x_t = x_t.clone()  # a trained first layer needs its input again, and `latents` is written to until then
        negative_pred = predict_negative(model, x_t, t, cond) if parts_branches else None
        with torch.set_grad_enabled(step in keep.live_steps):
            noise_pred = predict(model, x_t, t, cond, guidance_scale=guidance_scale, negative_pred=negative_pred)
        if step in keep.live_steps:
            live[step] = noise_pred
        if keep.predictions:
            predictions = _kept(predictions, noise_pred.detach(), step, grid.num_steps)
        if negative_pred is not None:
            negatives = _kept(negatives, negative_pred, step, grid.num_steps)
        drawn = transition(model, noise_pred.detach(), x_t, t, s, kernel)
        latents[step + 1] = drawn.sample(latents[step + 1])  # the noise that waited there
        log_probs[step] = drawn.log_prob(latents[step + 1])
    return Trajectory(latents, log_probs, cond, grid, predictions, negatives, live)


def noise_of(
    model: DiffusionModel, generators: Sequence[torch.Generator], num_steps: int, canvas: Canvas | None = None
) -> Float[Tensor, "nodes batch c h w"]:
    """All the noise of one trajectory per generator."""
    shape = num_steps + 1, *model.latent_shape(canvas)
    noise = [torch.randn(shape, generator=one, dtype=torch.float32, device="cpu") for one in generators]
    return uploaded(torch.stack(noise, dim=1), model.device)


def _kept(outputs: Tensor | None, output: Output, step: int, num_steps: int) -> Tensor:
    if outputs is None:
        outputs = output.new_empty(num_steps, *output.shape)
    outputs[step] = output
    return outputs


def solving(
    model: DiffusionModel,
    num_steps: int,
    *,
    solver: SolverName,
    spacing: SpacingName = "checkpoint",
    eta: float,
    canvas: Canvas | None = None,
) -> tuple[Grid, Kernel]:
    """The grid and the kernel of one call of `sample`; a model of tokens has one, which every solver stands for.

    Args:
        solver: DDIM, or DPM-Solver++ (second order and deterministic), which remembers its steps.
        spacing: Where the steps of DDIM lie: as the checkpoint's scheduler has it, or evenly in time.
    """
    diffusion = diffusion_of(model.prediction_type)
    if not diffusion.is_gaussian:
        return model.grid(num_steps, canvas), diffusion.kernel(solver, 1.0)
    if solver == "dpm_solver":
        if eta != 0 or spacing != "checkpoint":
            raise InputError(
                f"solver is dpm_solver with eta {eta:g} and spacing {spacing!r}, but it is an ODE solver with steps of "
                'its own; give eta 0 and spacing "checkpoint", or solver "ddim"'
            )
        multistep = BlackBoxSolver(model, num_steps, canvas=canvas)
        return multistep.grid, multistep
    if spacing == "uniform":
        return grid_at(model.process, uniform_times(model.process, num_steps), device=model.device), diffusion.kernel(
            solver, eta
        )
    return model.grid(num_steps, canvas), diffusion.kernel(solver, eta)


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    seed: int,
    images_per_prompt: int = 1,
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    eta: float = 0.0,
    solver: SolverName = "ddim",
    spacing: SpacingName = "checkpoint",
    batch_size: int | None = None,
    canvas: Canvas | None = None,
    originals: Images | None = None,
    first: tuple[int, int] = (0, 0),
    progress: str | None = None,
) -> Images:
    """Images of every prompt, on the CPU in float32, those of one prompt beside each other.

    Args:
        model: The checkpoint.
        prompts: Encoded batch by batch.
        seed: With it, image k of prompt i is always the same.
        num_steps: Denoising steps; 20 to 50 are usual.
        guidance_scale: 1 is no guidance; 7.5 is usual for Stable Diffusion.
        eta: 0 is deterministic DDIM, 1 ancestral sampling.
        solver: See `solving`; DPM-Solver++ needs half of the steps.
        spacing: See `solving`.
        batch_size: Images at once, by default as `images_at_once` has it; changes no image (but for float error).
        canvas: Size of the images; by default the checkpoint's own.
        originals: The image that each prompt edits, as large as the canvas, in [0, 1]; for an editing model.
        first: Numbers of the first prompt and of its first image: those of a part of a larger set have its noise.
        progress: Label of a progress bar; None for none.

    Raises:
        ValueError: If the solver cannot have that noise level or spacing.
    """
    jobs = [(prompt, image) for prompt in range(len(prompts)) for image in range(images_per_prompt)]
    bar = tqdm(total=len(jobs), desc=progress, unit="image", disable=progress is None, dynamic_ncols=True)
    images = torch.empty(0, dtype=torch.float32)
    batch_size = batch_size or images_at_once(canvas or model.canvas)
    for start in range(0, max(len(jobs), 1), batch_size):  # without prompts, encoding refuses them
        batch = jobs[start : start + batch_size]
        grid, kernel = solving(model, num_steps, solver=solver, spacing=spacing, eta=eta, canvas=canvas)
        trajectory = sample(
            model,
            _encoded(model, prompts, [prompt for prompt, _ in batch], originals),
            grid,
            kernel,
            guidance_scale=guidance_scale,
            generators=[image_generator(seed, first[0] + prompt, first[1] + image) for prompt, image in batch],
            canvas=canvas,
        )
        decoded = model.decode(trajectory.x_0)
        if start == 0:
            images = torch.empty(len(jobs), *decoded.shape[1:], dtype=torch.float32)
        images[start : start + batch_size] = decoded
        bar.update(len(batch))
    bar.close()
    return images


def images_at_once(canvas: Canvas) -> int:
    """Images that are drawn together when nobody says how many: 64 small ones, 16 of 512 px, 4 of 1024."""
    return max(1, min(64, 16 * 512 * 512 // (canvas.height * canvas.width)))


def _encoded(model: DiffusionModel, prompts: Sequence[str], rows: list[int], originals: Images | None) -> Conditioning:
    texts = [prompts[row] for row in rows]
    return model.encode_prompts(texts) if originals is None else model.encode_prompts(texts, originals=originals[rows])
