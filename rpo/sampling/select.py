"""Selection at test time: the best of several images of a prompt, at less than the price of all of them.

    best of n   draw n images, judge them, take the best                              n T forwards
    drafts      draw all n in few steps, judge, render the best in full               n D + k T
    on the way  draw n at once, judge what each is about to become, drop the worse    those still there, over the steps

with T steps of an image and D of a draft; twice that with guidance. A draft tells its image as far as the sampler is
deterministic: at eta 0 few steps and many end near each other, ancestral noise parts them. The last way goes on with
the path itself, whatever the sampler: see `rpo.sampling.stepwise`. All take one of the images that `generate` would
draw, by its number.

A judge can be wrong, and the best of many by it is where it is wrong most: judge the choice by another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.sampling.sample import SolverName, SpacingName, image_generator, images_at_once, sample, solving
from rpo.sampling.step import has_negative
from rpo.types import Canvas, Images, Latents, PerSample

Judge = Callable[[Images, Sequence[str]], PerSample]
"""What says how good images are, by their prompts; higher is better."""

NoiseOf = Callable[[int, int], torch.Generator]
"""(prompt, number of the image) → the generator of its noise."""


@dataclass(frozen=True)
class How:
    """How an image is drawn; see `generate`."""

    num_steps: int = 50
    guidance_scale: float = 7.5
    eta: float = 0.0
    solver: SolverName = "ddim"
    spacing: SpacingName = "checkpoint"
    canvas: Canvas | None = None
    batch_size: int | None = None
    """Images at once; nothing is as `images_at_once` has it."""
    seed: int = 0
    noise_of: NoiseOf | None = None
    """Nothing is that of `image_generator` with the seed."""

    def generator(self, prompt: int, number: int) -> torch.Generator:
        """That of an image's noise."""
        return self.noise_of(prompt, number) if self.noise_of else image_generator(self.seed, prompt, number)


@dataclass(frozen=True)
class Selected:
    """One image of each prompt, and what it cost."""

    images: Images
    """[prompts, 3, height, width] in [0, 1], on the CPU in float32."""
    chosen: Int[Tensor, " prompts"]
    """The number of each among the candidates of its prompt."""
    scores: PerSample
    """What the judge said when it chose it: of the image, of its draft, or of what it was about to become."""
    evaluations: int
    """States that went through the denoiser."""
    judged: int
    """Images that the judge was asked about."""


def best_of_n(
    model: DiffusionModel, prompts: Sequence[str], judge: Judge, n: int, how: How, *, progress: str | None = None
) -> Selected:
    """The best of n whole images of each prompt.

    Args:
        judge: Asked about n images of each prompt.
        n: Candidates of a prompt; 2 or more.
        how: How each is drawn.
        progress: Label of a progress bar; None for none.
    """
    return by_drafts(model, prompts, judge, n, how, draft_steps=how.num_steps, progress=progress)


def by_drafts(
    model: DiffusionModel,
    prompts: Sequence[str],
    judge: Judge,
    n: int,
    how: How,
    *,
    draft_steps: int,
    rendered: int = 1,
    progress: str | None = None,
) -> Selected:
    """Choose among n drafts of each prompt, and render the chosen seeds in full.

    Args:
        judge: Asked about n drafts of each prompt, and about what is rendered where that is several.
        n: Candidates of a prompt; 2 or more.
        how: How the image is drawn.
        draft_steps: Steps of a draft; where they are those of the image, the best draft is the image.
        rendered: The best drafts of a prompt that are rendered, of which the best is taken.
        progress: Label of a progress bar; None for none.
    """
    check_count("n", n, least=2)
    check_count("draft_steps", draft_steps, most=how.num_steps)
    check_count("rendered", rendered, most=n)

    def part(texts: Sequence[str], how: How) -> Selected:
        drafts, candidates = replace(how, num_steps=draft_steps), torch.arange(n).repeat(len(texts), 1)
        images = _drawn(model, texts, candidates, drafts)
        scores, judged = _scores(judge, images, texts, n), len(images)
        evaluations = len(images) * draft_steps * forwards(model, how)
        if draft_steps == how.num_steps:
            return _best(images, scores, candidates, evaluations, judged)
        best = scores.topk(rendered, dim=1)
        images, scores = _drawn(model, texts, best.indices, how), best.values
        evaluations += len(images) * how.num_steps * forwards(model, how)
        if rendered > 1:
            scores, judged = _scores(judge, images, texts, rendered), judged + len(images)
        return _best(images, scores, best.indices, evaluations, judged)

    return in_parts(model, prompts, n, how, part, progress)


@dataclass(frozen=True)
class Corrected:
    """Images after some rounds of correction."""

    images: Images
    scores: PerSample
    is_corrected: Bool[Tensor, " images"]
    """Whether an edit was found better."""


def corrected(
    images: Images,
    prompts: Sequence[str],
    correct: Callable[[Images, Sequence[str], int], Images],
    judge: Judge,
    *,
    rounds: int = 1,
) -> Corrected:
    """Edit images by what is wrong with them, and keep each edit that is better: Rich Preference at test time.

    Args:
        images: One per prompt, in [0, 1].
        correct: From images, prompts and the number of the round to what was made of each image: itself, where nothing
            is to be done.
        judge: Says whether an edit is better than its image; equal keeps the image.
        rounds: How often; an image that was not bettered in a round is given as it is to the next.
    """
    scores = judge(images, prompts).cpu()
    images, before = images.clone(), scores
    for number in range(rounds):
        edits = correct(images, prompts, number)
        found = judge(edits, prompts).cpu()
        better = found > scores
        images[better] = edits[better].to(images)
        scores = torch.where(better, found, scores)
    return Corrected(images, scores, scores > before)


def in_parts(
    model: DiffusionModel,
    prompts: Sequence[str],
    n: int,
    how: How,
    part: Callable[[Sequence[str], How], Selected],
    progress: str | None,
) -> Selected:
    """All prompts, so many at a time that their candidates are one batch; each keeps its noise."""
    size, found = max(1, at_once(model, how) // n), list[Selected]()
    with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=progress is None, dynamic_ncols=True) as bar:
        for rows in slices(len(prompts), size):
            first = rows.start
            own = replace(how, noise_of=lambda prompt, number, first=first: how.generator(first + prompt, number))
            found.append(part(prompts[rows], own))
            bar.update(len(prompts[rows]))
    return Selected(
        torch.cat([one.images for one in found]),
        torch.cat([one.chosen for one in found]),
        torch.cat([one.scores for one in found]),
        sum(one.evaluations for one in found),
        sum(one.judged for one in found),
    )


def _drawn(model: DiffusionModel, prompts: Sequence[str], numbers: Tensor, how: How) -> Images:
    """Those images of each prompt, [prompts * candidates, 3, height, width], on the CPU."""
    jobs = [(prompt, number) for prompt, row in enumerate(numbers.tolist()) for number in row]
    images = list[Images]()
    for rows in slices(len(jobs), at_once(model, how)):
        batch = jobs[rows]
        asked = list(dict.fromkeys(prompt for prompt, _ in batch))
        read = model.encode_prompts([prompts[prompt] for prompt in asked])
        grid, kernel = solving(
            model, how.num_steps, solver=how.solver, spacing=how.spacing, eta=how.eta, canvas=how.canvas
        )
        trajectory = sample(
            model,
            read.select(torch.tensor([asked.index(prompt) for prompt, _ in batch])),
            grid,
            kernel,
            guidance_scale=how.guidance_scale,
            generators=[how.generator(*job) for job in batch],
            canvas=how.canvas,
        )
        images.append(model.decode(trajectory.x_0).float().cpu())
    return torch.cat(images)


def decoded(model: DiffusionModel, latents: Latents, size: int) -> Images:
    """The images of states, on the CPU."""
    return torch.cat([model.decode(latents[rows]).float().cpu() for rows in slices(len(latents), size)])


def _scores(judge: Judge, images: Images, prompts: Sequence[str], each: int) -> Tensor:
    """What the judge says, [prompts, each]."""
    return judge(images, [prompt for prompt in prompts for _ in range(each)]).float().cpu().view(-1, each)


def _best(images: Images, scores: Tensor, numbers: Tensor, evaluations: int, judged: int) -> Selected:
    """By scores and numbers [prompts, candidates]; of equals the first."""
    place = scores.argmax(dim=1)
    rows = torch.arange(len(scores))
    each = images.unflatten(0, scores.shape)
    return Selected(each[rows, place], numbers[rows, place], scores[rows, place], evaluations, judged)


def forwards(model: DiffusionModel, how: How) -> int:
    """States that go through the denoiser for a step of one image."""
    return 2 if has_negative(model, how.guidance_scale) else 1


def at_once(model: DiffusionModel, how: How) -> int:
    """Images that are drawn together."""
    return how.batch_size or images_at_once(how.canvas or model.canvas)


def slices(count: int, size: int) -> list[slice]:
    """So many things, in parts of that size."""
    return [slice(start, start + size) for start in range(0, count, size)]


def check_count(name: str, given: int, *, least: int = 1, most: int | None = None) -> None:
    """Refuse a number out of range."""
    if given < least or (most is not None and given > most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {given}; expected {expected}; change it")
