"""What each prompt has earned lately: the baseline of DDPO (arXiv:2305.13301, §4.2)."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, final

import torch

from rpo.types import PerSample


@final
class PromptHistory:
    """The last rewards of every prompt; a prompt with few of them is compared with the whole rollout."""

    def __init__(self, size: int):
        """Start without a past; half of `size` rewards is what a prompt needs before its own mean and spread count."""
        self._size, self._min_count = size, max(2, size // 2)
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, rewards: PerSample, prompts: Sequence[str], *, eps: float = 1e-4) -> PerSample:
        """Remember a rollout, then say how each reward stands out from its prompt's past; the rollout is part of it.

        NaN is what could not be judged: it is not remembered, and stands out by 0.
        """
        judged = [(row, prompts[row], value) for row, value in enumerate(rewards.tolist()) if not math.isnan(value)]
        for _, prompt, reward in judged:
            self._rewards.setdefault(prompt, deque(maxlen=self._size)).append(reward)
        everything = torch.tensor([reward for _, _, reward in judged])
        result = torch.zeros(len(rewards))
        for row, prompt, reward in judged:
            past = torch.tensor(list(self._rewards[prompt]))
            known = past if len(past) >= self._min_count else everything
            result[row] = (reward - known.mean()) / (known.std(correction=0) + eps)
        return result.to(rewards)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {str(prompt): list(rewards) for prompt, rewards in self._rewards.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._rewards = {prompt: deque(rewards, maxlen=self._size) for prompt, rewards in state_dict.items()}
