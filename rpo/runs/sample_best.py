"""Of each prompt the best of several images, for `rpo sample --best-of`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.evaluation.side_by_side import Drawn, Row
from rpo.models.checkpoint import Checkpoint
from rpo.rewards import Reward, score
from rpo.sampling.sample import image_generator
from rpo.sampling.select import How, best_of_n, by_drafts
from rpo.sampling.stepwise import PotentialJudge, by_potential
from rpo.types import Images, PerSample


def rows_of_candidates(prompts: Sequence[str], images: int, seed: int, n: int) -> list[Row]:
    """So many images of each prompt, each the best of n seeds that are its own, from its seed on."""
    return [Row(prompt, seed + number * n) for prompt in prompts for number in range(images)]


def draw_best(
    model: Checkpoint,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    n: int,
    how: How,
    *,
    draft_steps: int | None = None,
    looks: Sequence[int] = (),
    progress: str | None = None,
) -> Iterator[tuple[Row, Drawn]]:
    """Draw every row n times, from its seed and the following ones, and keep the best.

    Args:
        rewards: The first one chooses; all score what was chosen.
        n: Seeds to choose from; 2 or more.
        how: How an image is drawn.
        draft_steps: Steps of the drafts that are chosen from; nothing chooses from whole images.
        looks: Steps after which images are dropped by what the first reward sees in them.

    Yields:
        The prompt and the seed that was chosen, with its image.
    """
    (name, first), *_ = rewards.items()
    judge = judge_of(name, first)
    own = replace(how, noise_of=lambda row, number: image_generator(rows[row].seed + number, 0, 0))
    texts = [row.prompt for row in rows]
    if looks:
        found = by_potential(model, texts, judge_on_the_way(name, first), n, own, looks=looks, progress=progress)
    elif draft_steps is None:
        found = best_of_n(model, texts, judge, n, own, progress=progress)
    else:
        found = by_drafts(model, texts, judge, n, own, draft_steps=draft_steps, progress=progress)
    scored = {name: score(one, found.images, texts, name=name).tolist() for name, one in rewards.items()}
    pixels = to_pixels(found.images)
    for number, row in enumerate(rows):
        chosen = Row(row.prompt, row.seed + int(found.chosen[number]))
        yield chosen, Drawn(number, 0, pixels[number], {name: values[number] for name, values in scored.items()})


def judge_on_the_way(name: str, reward: Reward) -> PotentialJudge:
    """A reward that can be asked before an image is finished; any other is refused."""
    if not isinstance(reward, PotentialJudge):
        raise InputError(
            f"the first reward is {name}, which judges finished images alone; expected one that can look at images on "
            "their way, such as shapes-potential; leave out --look-after, or choose among drafts"
        )
    return reward


def judge_of(name: str, reward: Reward) -> Callable[[Images, Sequence[str]], PerSample]:
    """A reward as what chooses; its answers are checked."""
    return lambda images, prompts: score(reward, images, prompts, name=name)
