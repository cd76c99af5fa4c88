"""Whether the rounds of an alignment make images worse in a way that they were not judged by.

The held-out images of every round are there already, of the same prompts and noise as the base's. Other rewards judge
them, too, and it is measured how images look and how far those of one prompt lie apart. An alarm is a number that has
surely fallen below the base's, and by enough to matter.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from rpo.devices import device_named
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOutConfig, Judged
from rpo.evaluation.image_statistics import embedder
from rpo.evaluation.watch import WatchConfig, alarming, in_words, looks_of, sure_falls
from rpo.rewards import load_rewards
from rpo.training.log import HELD_OUT


@final
class RoundWatch:
    """Compares what was judged after a round with the base."""

    def __init__(self, config: WatchConfig, judge: HeldOutConfig, *, trained: Mapping[str, float], device: str):
        """Load the held-out rewards.

        Args:
            judge: Whose reward has judged the images already.
            trained: The rewards that pairs are kept by.
            device: Where images are judged, as a configuration names it.
        """
        if both := [name for name in config.held_out if name in trained or name == judge.reward]:
            raise InputError(
                f"monitor.held_out names {both[0]}, which {'judges' if both[0] == judge.reward else 'keeps pairs'} "
                "already; expected another reward; leave it out"
            )
        self._config, self._judge, self._device = config, judge, device_named(device)
        self._rewards = load_rewards(dict.fromkeys(config.held_out, 1.0)) if config.held_out else None
        self._eyes = embedder(*self._rewards.each.values()) if self._rewards else None
        self._base: dict[str, Tensor] = {}

    def after(self, base: Judged, judged: Judged) -> dict[str, Any]:
        """What is kept of a round: the means of what is watched, and its alarms in words."""
        self._base = self._base or self._seen(base)
        seen = self._seen(judged)
        falls = sure_falls(self._base, seen)
        alarms = [in_words(name, move) for name, move in alarming(falls, spreads=self._config.alarm).items()]
        return {"watched": {name: values.nanmean().item() for name, values in seen.items()}, "alarms": alarms}

    @torch.no_grad()
    def _seen(self, judged: Judged) -> dict[str, Tensor]:
        """One number per prompt, by metric."""
        images = torch.from_numpy(judged.images).permute(0, 3, 1, 2).to(self._device).float() / 255
        per_prompt = self._judge.images_per_prompt
        scores = {f"{HELD_OUT}{self._judge.reward}": torch.from_numpy(judged.scores).to(self._device)}
        if self._rewards is not None:
            answers = self._rewards.ask(images, judged.texts, may_fail=True)
            scores |= {f"{HELD_OUT}{name}": one.values for name, one in answers.items()}
        seen = {name: values.unflatten(0, (-1, per_prompt)).nanmean(dim=1) for name, values in scores.items()}
        return seen | looks_of(images, per_prompt, eyes=self._eyes)
