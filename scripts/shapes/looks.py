"""What a judge of potential learns from: looks at images on their way, and what became of them.

A look is the image that a generator is about to draw: x̂₀ after some step, decoded, or of tokens the half-filled grid
with its likeliest ones. Kept of it are its embedding by `shapes-clip`, that of its prompt, the time in [0, 1], and what
the verifier says of it and of the finished image. Looks are drawn and written part by part; what is there is not drawn
again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from rpo import shapes
from rpo.files.whole import written_whole
from rpo.models.checkpoint import Checkpoint
from rpo.process.diffusion import diffusion_of
from rpo.sampling.sample import Keep, image_generator, sample, solving
from rpo.shapes.potential import SOURCES
from rpo.shapes.prompts import KINDS, Prompt
from rpo.shapes.proxy import REWARD
from rpo.shapes.verifier import verify_all

PART = 64

GENERATORS = {
    "shapes": (shapes.NUM_STEPS, shapes.GUIDANCE_SCALE),
    "shapes-tokens": (shapes.TOKENS_NUM_STEPS, shapes.TOKENS_GUIDANCE_SCALE),
}
assert tuple(GENERATORS) == SOURCES
"""Steps and guidance with which each is meant to be drawn from."""


@dataclass(frozen=True)
class Looks:
    """Rows that lie beside each other are of one trajectory, the finished image last, whose time is 0."""

    image: Tensor
    """[looks, dims], of unit length."""
    text: Tensor
    """[looks, dims], of unit length."""
    time: Tensor
    """[looks], 1 at the noise end."""
    says_right: Tensor
    """Whether the verifier accepts what is seen."""
    is_right: Tensor
    """Whether it accepts the finished image."""
    kind: Tensor
    """Of the prompt, as its place in `KINDS`."""
    source: Tensor
    """The generator, as its place in `GENERATORS`."""

    def select(self, rows: Tensor) -> "Looks":
        """Some of them; a row may repeat."""
        return Looks(*(getattr(self, field.name)[rows] for field in fields(self)))


def joined(parts: Sequence[Looks]) -> Looks:
    """All of them."""
    return Looks(*(torch.cat([getattr(one, field.name) for one in parts]) for field in fields(Looks)))


def draw_looks(folder: Path, source: str, prompts: Sequence[Prompt], *, seed: int, each: int | None = None) -> Looks:
    """Draw an image of every prompt, and look at some of its steps.

    Args:
        folder: Where parts are kept.
        source: A key of `GENERATORS`.
        seed: Of noise and looks; number k has the same whatever is drawn beside it.
        each: Looks on the way, at steps drawn at random; nothing is all steps.
    """
    model, parts = None, list[Looks]()
    for start in tqdm(range(0, len(prompts), PART), desc=f"{folder.name} of {source}", unit="part", dynamic_ncols=True):
        file = folder / f"{source}-{start:05d}.safetensors"
        if not file.is_file():
            model = model or Checkpoint.load(source)
            found = _drawn(model, source, prompts[start : start + PART], seed=seed, first=start, each=each)
            with written_whole(file) as partial:
                save_file({field.name: getattr(found, field.name) for field in fields(found)}, partial)
        parts.append(Looks(**load_file(file)))
    return joined(parts)


@torch.no_grad()
def _drawn(
    model: Checkpoint, source: str, prompts: Sequence[Prompt], *, seed: int, first: int, each: int | None
) -> Looks:
    num_steps, guidance = GENERATORS[source]
    texts = [prompt.text for prompt in prompts]
    grid, kernel = solving(model, num_steps, solver="ddim", eta=shapes.ETA)
    drawn = sample(
        model,
        model.encode_prompts(texts),
        grid,
        kernel,
        guidance_scale=guidance,
        generators=[image_generator(seed, first + row, 0) for row in range(len(texts))],
        keep=Keep(predictions=True),
    )
    assert drawn.predictions is not None
    diffusion = diffusion_of(model.prediction_type)
    x_0_hat = torch.stack(
        [diffusion.x0_hat(drawn.predictions[k], drawn.latents[k], grid[k]) for k in range(num_steps)] + [drawn.x_0]
    )
    picked = [_steps(num_steps, each, image_generator(seed, first + row, 1)) for row in range(len(texts))]
    rows = torch.tensor([row for row, steps in enumerate(picked) for _ in steps])
    steps = torch.cat(picked)
    images = torch.cat([model.decode(part).float() for part in x_0_hat[steps, rows].split(PART)])
    said = torch.tensor([one.holds for one in verify_all(images, [prompts[row] for row in rows.tolist()])])
    is_last = steps == num_steps
    time = torch.where(is_last, 0.0, grid.timestep[steps].float() / model.num_train_timesteps)
    kinds = torch.tensor([KINDS.index(prompt.kind) for prompt in prompts])
    return Looks(
        REWARD.embed_images(images),
        REWARD.embed_texts(texts, images.device)[rows],
        time,
        said,
        said[is_last][rows],
        kinds[rows],
        torch.full_like(rows, list(GENERATORS).index(source)),
    )


def _steps(num_steps: int, each: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of an image are looked at, in order, and the end."""
    some = torch.randperm(num_steps, generator=generator)[:each].sort().values
    return torch.cat([some, torch.tensor([num_steps])])
