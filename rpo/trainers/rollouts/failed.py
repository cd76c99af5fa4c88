"""Images that a reward could not judge, which it says by NaN: they are left out and counted, and too many end the run.

Such an image is in no mean and no spread, V is not fitted to it, and it has no gradient. The loss is a mean over the
images that were judged, here of all processes, whatever micro-batches their steps are in:

    loss = 1/J Σ_judged loss_i = mean over all N images of c_i loss_i,        c_i = N/J, and 0 where the score failed

With several rewards an image fails where any of them does. An image that is left alone in its group is compared with
nothing: its advantage is 0, as where all rewards of a group are equal.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from rpo.rewards.answers import Answered, RewardError
from rpo.rewards.base import has_evidence, save_evidence, traced
from rpo.types import Images, PerSample


@final
class FailedScores:
    """Counts what the rewards of a run could not judge.

    Attributes:
        most: The share of a rollout's images that may fail.
        evidence: Where images and prompts of failures are kept: of each reward's first, and of those that end the run.
    """

    def __init__(self, most: float, *, join: Callable[[Tensor], Tensor] | None = None, evidence: Path | None = None):
        """Prepare.

        Args:
            join: From a tensor of this process to those of all, along its first dimension; alone without.
        """
        self.most, self.evidence = most, evidence
        self._join = join or (lambda own: own)

    def counts(self, answers: Mapping[str, Answered], images: Images, prompts: tuple[str, ...]) -> PerSample:
        """What each image counts in a mean over those of all processes, c of the formula above.

        Args:
            answers: Of each reward, by name; the images and prompts are those of this process.

        Raises:
            RewardError: More failed than may; on every process.
        """
        failed = torch.stack([one.values.isnan() for one in answers.values()], dim=1)
        everyone = self._join(failed.float()) > 0
        total, num_failed = len(everyone), int(everyone.any(dim=1).sum())
        if num_failed / total > self.most:
            raise self._error(answers, failed, everyone, images, prompts)
        for name, own in zip(answers, failed.T, strict=True):
            if self.evidence is not None and own.any() and not has_evidence(self.evidence, name):
                indices = own.nonzero().flatten().tolist()
                problem = f"returned nan{_why(answers[name], indices)}; the image was left out"
                with suppress(OSError):  # a full disk is no reason to stop
                    save_evidence(self.evidence, images, prompts, name=name, indices=indices, problem=problem)
        return ~failed.any(dim=1) * (total / (total - num_failed))

    def _error(
        self,
        answers: Mapping[str, Answered],
        failed: Bool[Tensor, "images rewards"],
        everyone: Bool[Tensor, "every_image rewards"],
        images: Images,
        prompts: tuple[str, ...],
    ) -> RewardError:
        """Of the reward that failed most; with its images where this process has some."""
        names, worst = list(answers), int(everyone.sum(dim=0).argmax())
        of_worst, of_any, total = int(everyone[:, worst].sum()), int(everyone.any(dim=1).sum()), len(everyone)
        indices = failed[:, worst].nonzero().flatten().tolist()
        told = f"returned nan for {of_worst} of {total} images{_why(answers[names[worst]], indices)}"
        told += f", with the other rewards {of_any}" if of_any > of_worst else ""
        problem = (
            f"{told}, of which rollout.max_failed lets {int(self.most * total)} fail; expected a finite float32 number "
            "for the others; make the reward finite on more images, or raise rollout.max_failed, then resume"
        )
        if not indices:
            return RewardError(f"reward {names[worst]!r}: {problem}. The images are those of another process")
        error = RewardError(problem, indices=indices, batch_size=len(images))
        return traced(error, images, prompts, name=names[worst], evidence=self.evidence)


def _why(answered: Answered, indices: list[int]) -> str:
    """What the reward says of the first image that it could not judge."""
    told = [answered.failures[index] for index in indices if index in answered.failures]
    return f" ({told[0]})" if told else ""
