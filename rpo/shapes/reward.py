"""The verifier of the shapes world as a reward: how nearly an image shows its prompt, or whether it does.

The verifier runs on the CPU and takes 1.2 ms for an image of 64 x 64: 64 images cost less than 0.1 s on one core, a
small part of what sampling them does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rpo.rewards.base import RewardError
from rpo.shapes.verifier import Verdict, mark_of, verify
from rpo.types import Images, PerSample


@dataclass(frozen=True)
class ShapesReward:
    """The verdict on each image of a shapes prompt, as a number in [0, 1].

    Example:
        >>> from rpo.shapes.world import Scene, SceneObject, render
        >>> image = torch.tensor(render(Scene((SceneObject("circle", "red", 32, 32, 9),)))).permute(2, 0, 1) / 255
        >>> ShapesReward()(torch.stack([image, image]), ["a red circle", "a red square"])
        tensor([1.0000, 0.3000])
    """

    kind: Literal["graded", "strict", "critic"] = "graded"
    """`graded` gives credit for what is nearly right, so that images of one prompt can be told apart early on; `strict`
    is 1 if the prompt holds and 0 otherwise, which is what accuracy counts; `critic` is the mark that the critic of
    shapes gives, a whole number from 1 to 10, in tenths."""

    is_differentiable: ClassVar[bool] = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Judge every image by its own prompt."""
        on_cpu = images.detach().cpu()
        verdicts: list[Verdict] = []
        for index, (image, prompt) in enumerate(zip(on_cpu, prompts, strict=True)):
            try:
                verdicts.append(verify(image, prompt))
            except ValueError as error:
                raise RewardError(str(error), indices=[index], batch_size=len(images)) from error
        return torch.tensor([self._number(verdict) for verdict in verdicts], device=images.device)

    def _number(self, verdict: Verdict) -> float:
        if self.kind == "critic":
            return mark_of(verdict) / 10
        return verdict.score if self.kind == "graded" else float(verdict.holds)


GRADED = ShapesReward("graded")
STRICT = ShapesReward("strict")
CRITIC = ShapesReward("critic")
