"""A plain Python function as a reward: it may answer with a tensor, an array or a list of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rpo.rewards.checks import per_sample
from rpo.types import Images, PerSample


@dataclass(frozen=True)
class FunctionReward:
    """What `function` says of the images and prompts, as one number per image on the images' device.

    Example:
        >>> import torch
        >>> longest_prompt_wins = FunctionReward(lambda images, prompts: [len(prompt) for prompt in prompts])
        >>> longest_prompt_wins(torch.zeros(2, 3, 8, 8), ["a cat", "a large cat"])
        tensor([ 5., 11.])
    """

    function: Callable[[Images, Sequence[str]], Tensor | NDArray[np.generic] | Sequence[float]]
    """Takes images [batch, 3, height, width] in [0, 1] and one prompt per image; higher is better."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Call the function; a gradient that its answer has is kept."""
        answer = self.function(images, prompts)
        values = per_sample(answer, len(images)).float().to(images.device)
        return answer.float() if isinstance(answer, Tensor) and answer.requires_grad else values
