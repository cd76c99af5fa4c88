"""Selection on the way: n images of a prompt begin, and those that will hardly be the best are not drawn to the end.

    pruning     after some steps, the best few of each prompt go on, by what they are about to become
    potential   at each look: not clear yet → go on; clear, and no potential → drop; of those that came to the end, the
                best (PARM, arXiv:2501.13926)

What an image is about to become is x̂₀, decoded from the network's output at x_t; of tokens, the grid with the likeliest
ones in its empty places. No prompt loses all its images: the one with the most potential stays. Nobody is asked about
an image that is the only one left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.process.diffusion import diffusion_of
from rpo.sampling.sample import noise_of, solving
from rpo.sampling.select import How, Judge, Selected, at_once, check_count, decoded, forwards, in_parts, slices
from rpo.sampling.step import predict, transition
from rpo.types import Images, PerSample

CLEAR, PROMISING = 0.75, 0.5
"""From where on an image is clear enough to be judged, and has potential."""


@dataclass(frozen=True)
class Assessment:
    """What can be told of images on their way, each number in [0, 1]."""

    clear: PerSample
    """How likely what is seen of it tells the finished image; ½ is luck."""
    potential: PerSample
    """How likely the finished image is right."""


@runtime_checkable
class PotentialJudge(Protocol):
    """A reward that can be asked before an image is finished."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """How good finished images are, as any reward."""
        ...

    def assess(self, images: Images, prompts: Sequence[str], time: float) -> Assessment:
        """What can be told of images on their way, by what each is about to become.

        Args:
            time: In [0, 1], 1 at the noise end.
        """
        ...


@dataclass(frozen=True)
class _Seen:
    """Images that somebody looks at, of prompts that have several left."""

    images: Images
    prompts: list[str]
    prompt: Int[Tensor, " images"]
    """Place of each one's prompt, rising."""
    time: float


_Look = Callable[[_Seen], tuple[PerSample, Bool[Tensor, " images"]]]
"""From images to their scores, and which go on: of every prompt one at least."""


def by_pruning(
    model: DiffusionModel,
    prompts: Sequence[str],
    judge: Judge,
    n: int,
    how: How,
    *,
    stages: Mapping[int, int],
    progress: str | None = None,
) -> Selected:
    """Draw n images of each prompt at once, and on the way go on with the best few.

    Args:
        judge: Asked at every stage about what each image that is left is about to become, by its `assess` where it has
            one, and about the images where several come to the end.
        n: Candidates of a prompt; 2 or more.
        how: How the images are drawn; not by DPM-Solver++, whose steps remember those before.
        stages: After so many steps, how many images of a prompt go on: {8: 4, 12: 2}.
        progress: Label of a progress bar; None for none.
    """
    check_count("n", n, least=2)
    _check_looks(list(stages), how, f"stages are {dict(stages)}")
    left = [n, *stages.values()]
    if not all(0 < now < before for before, now in zip(left, left[1:], strict=False)):
        raise InputError(
            f"stages are {dict(stages)} of {n} images; expected fewer images after each; give such as "
            f"{{{max(1, how.num_steps // 2)}: {max(1, n // 2)}}}"
        )
    looks = {step: partial(_best_few, judge, kept) for step, kept in stages.items()}
    part = partial(_drawn, model, judge, n, looks)
    return in_parts(model, prompts, n, how, part, progress)


def by_potential(
    model: DiffusionModel,
    prompts: Sequence[str],
    judge: PotentialJudge,
    n: int,
    how: How,
    *,
    looks: Sequence[int],
    clear: float = CLEAR,
    promising: float = PROMISING,
    progress: str | None = None,
) -> Selected:
    """Draw n images of each prompt at once, and drop on the way what is clear and has no potential.

    Args:
        judge: Asked at every look about what each image that is left is about to become, and about the images where
            several come to the end.
        n: Candidates of a prompt; 2 or more.
        how: How the images are drawn; not by DPM-Solver++, whose steps remember those before.
        looks: After so many steps somebody looks: [8, 12, 16].
        clear: From where on an image is clear.
        promising: From where on it has potential: 0 drops nothing, 1 all but the best of what is clear.
        progress: Label of a progress bar; None for none.
    """
    check_count("n", n, least=2)
    _check_looks(looks, how, f"looks are {list(looks)}")
    look = partial(_promising, judge, clear, promising)
    part = partial(_drawn, model, judge, n, dict.fromkeys(looks, look))
    return in_parts(model, prompts, n, how, part, progress)


def _best_few(judge: Judge | PotentialJudge, kept: int, seen: _Seen) -> tuple[PerSample, Bool[Tensor, " images"]]:
    if isinstance(judge, PotentialJudge):
        scores = judge.assess(seen.images, seen.prompts, seen.time).potential.float().cpu()
    else:
        scores = judge(seen.images, seen.prompts).float().cpu()
    return scores, _places(scores, seen.prompt) < kept


def _promising(
    judge: PotentialJudge, clear: float, promising: float, seen: _Seen
) -> tuple[PerSample, Bool[Tensor, " images"]]:
    said = judge.assess(seen.images, seen.prompts, seen.time)
    scores, is_clear = said.potential.float().cpu(), said.clear.float().cpu() >= clear
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise InputError(
            f"potential is {scores.tolist()} at time {seen.time:g}; expected numbers in [0, 1]; mend the judge"
        )
    is_dropped = is_clear & (scores < promising)
    return scores, ~is_dropped | (_places(scores, seen.prompt) == 0)


def _places(scores: PerSample, prompt: Int[Tensor, " images"]) -> Int[Tensor, " images"]:
    """The place of each image among those of its prompt, 0 the best; of equals the earlier one comes first."""
    order = scores.argsort(descending=True, stable=True)
    order = order[prompt[order].argsort(stable=True)]
    counts = prompt.bincount()
    places = torch.empty_like(prompt)
    places[order] = torch.arange(len(prompt)) - (counts.cumsum(0) - counts)[prompt[order]]
    return places


@torch.no_grad()
def _drawn(
    model: DiffusionModel, judge: Judge, n: int, looks: Mapping[int, _Look], prompts: Sequence[str], how: How
) -> Selected:
    """All images of some of the prompts at once, a row each as long as it is left."""
    size = at_once(model, how)
    grid, kernel = solving(model, how.num_steps, solver=how.solver, spacing=how.spacing, eta=how.eta, canvas=how.canvas)
    prompt, number = torch.arange(len(prompts)).repeat_interleave(n), torch.arange(n).repeat(len(prompts))
    scores, evaluations, judged = torch.zeros(len(prompt)), 0, 0
    cond = model.encode_prompts(list(prompts)).select(prompt)
    generators = [how.generator(*job) for job in zip(prompt.tolist(), number.tolist(), strict=True)]
    noise = noise_of(model, generators, grid.num_steps, how.canvas)
    diffusion = diffusion_of(model.prediction_type)
    x_t = diffusion.start(noise[0])
    for step in range(grid.num_steps):
        t, s = grid[step], grid[step + 1]
        parts = [(x_t[rows], cond.select(rows)) for rows in slices(len(x_t), size)]
        said = torch.cat([predict(model, x, t, told, guidance_scale=how.guidance_scale) for x, told in parts])
        evaluations += len(x_t) * forwards(model, how)
        asked = (prompt.bincount()[prompt] > 1).nonzero().flatten()
        if (look := looks.get(step + 1)) is not None and len(asked):
            rows = asked.to(x_t.device)
            images = decoded(model, diffusion.x0_hat(said[rows], x_t[rows], t), size)
            time = float(t.timestep) / model.num_train_timesteps
            texts = [prompts[int(one)] for one in prompt[asked]]
            is_kept = torch.ones(len(prompt), dtype=torch.bool)
            scores[asked], is_kept[asked] = look(_Seen(images, texts, prompt[asked], time))
            judged += len(asked)
            prompt, number, scores = prompt[is_kept], number[is_kept], scores[is_kept]
            rows = is_kept.nonzero().flatten().to(x_t.device)
            x_t, said, cond, noise = x_t[rows], said[rows], cond.select(rows), noise[:, rows]
        x_t = transition(model, said, x_t, t, s, kernel).sample(noise[step + 1])
    images = decoded(model, x_t, size)
    asked = (prompt.bincount()[prompt] > 1).nonzero().flatten()
    if len(asked):
        scores[asked] = judge(images[asked], [prompts[int(one)] for one in prompt[asked]]).float().cpu()
    best = _places(scores, prompt) == 0
    return Selected(images[best], number[best], scores[best], evaluations, judged + len(asked))


def _check_looks(steps: Sequence[int], how: How, given: str) -> None:
    if how.solver == "dpm_solver":
        raise InputError(
            "solver is dpm_solver, whose steps remember those before them, but images are left out on the way; give "
            'solver "ddim", or choose by drafts'
        )
    if not steps or list(steps) != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] < how.num_steps:
        raise InputError(
            f"{given} in {how.num_steps} steps; expected steps from 1 to {how.num_steps - 1} that rise; give such as "
            f"{max(1, how.num_steps // 2)}"
        )
