"""The value V(t, x): what reward is still to be expected at a moment of a rollout (score as action, arXiv:2502.01819).

A reward that judges images says much about V already, when asked about the predicted clean latents x0_hat. So

    V = c_skip(t) r(decode(x0_hat)) + (1 - c_skip(t)) m + c_out(t) d F(x_t, x0_hat, t, prompt, r(decode(x0_hat)), m)

where F is learnt, and d is the standard deviation of the first rewards, so that F learns numbers of size one; m is what
the other images of the prompt earned, or the mean of the first rewards where there are none. At the data end c_skip = 1
and c_out = 0: there V is the reward itself, whatever F says. The term with m is ours, and that F is told of the reward
and of m: a few numbers correct both before the latents and the prompt are understood, which takes thousands of images.
Where the reward could not judge x0_hat, V is learnt alone. It is not fitted to images that could not be judged.

Fitting is regression on what came of each node: the reward less the costs still to come (trace 1), or the same with
part of the way replaced by V's own opinion, asked anew at every pass and never differentiated (trace below 1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rpo.errors import InputError
from rpo.objectives.advantages import traced_returns
from rpo.objectives.value import explained_variance, monte_carlo
from rpo.randomness import keyed_generator
from rpo.trainers.value.inputs import TIME_BINS, ValuePoints, skip_weights
from rpo.training.processes import Processes
from rpo.types import Latents, PerSample

Terminal = Callable[[Latents, Sequence[str]], PerSample]
"""The reward of clean latents: decodes, then judges."""

MAX_GRAD_NORM = 1.0


@final
class ValueEstimator:
    """A value that learns.

    Attributes:
        network: F, a function of `ValuePoints` with one number for each.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        terminal: Terminal | None = None,
        is_differentiable: bool = False,
        reward_until: float = 1.0,
        learning_rate: float = 1e-3,
        seed: int = 0,
        processes: Processes | None = None,
    ):
        """Start with V = 0 where no reward of x0_hat enters.

        Args:
            terminal: Reward of clean latents; None learns V alone.
            is_differentiable: Whether the gradient of V goes through the reward of x0_hat as well.
            reward_until: Time, 0 … 1, up to which x0_hat is worth asking about; beyond it V is learnt alone.
            processes: Who fits it together, each to its own images; those that were launched by default.
        """
        self.network = network.eval()
        self._terminal, self._is_differentiable, self._seed = terminal, is_differentiable, seed
        self._reward_until = reward_until
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
        self._mean, self._std = 0.0, 0.0
        self._fits = 0
        self._processes = processes or Processes()

    def __call__(self, points: ValuePoints) -> PerSample:
        """V of each point, in the unit of the reward."""
        reward = None if self._terminal is None else self._reward_of(points)
        is_told = self._is_asked(points) if reward is None else self._is_asked(points) & ~reward.isnan()
        skip, out = skip_weights(points.time)
        skip, out = (torch.where(is_told, part, rest) for part, rest in ((skip, 0.0), (out, 1.0)))
        expected = torch.full_like(points.time, self._mean)
        if points.baseline is not None:
            expected = torch.where(points.baseline.isnan(), expected, points.baseline)
        if reward is None:
            return (1 - skip) * expected + out * self._unit * self.network(self._standard(points, None, expected))
        reward = torch.where(is_told, reward, 0.0)
        told = (reward - self._mean) / self._unit * is_told
        learnt = self._unit * self.network(self._standard(points, told, expected))
        return skip * reward + (1 - skip) * expected + out * learnt  # at the data end exactly r: 1 r + 0 + 0

    @torch.no_grad()
    def evaluate(self, points: ValuePoints, *, batch_size: int) -> PerSample:
        """V of any number of points, without gradient, so many at once."""
        return torch.cat([self(points.select(rows)) for rows in _rows(points).split(batch_size)])

    @torch.no_grad()
    def ask_reward(self, points: ValuePoints, *, batch_size: int) -> ValuePoints:
        """The points with the reward of their x0_hat, so that it is asked once for all that follows."""
        if self._terminal is None or points.x0_reward is not None:
            return points
        asked = points.time.new_zeros(len(points))
        for rows in _rows(points)[self._is_asked(points).cpu()].split(batch_size):
            asked[rows] = self._reward_of(points.select(rows))
        return replace(points, x0_reward=asked)

    def fit(
        self,
        points: ValuePoints,
        targets: Float[Tensor, "... images"],
        judged: Bool[Tensor, " images"] | None = None,
        *,
        steps: int,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """Regress V on numbers.

        Args:
            targets: What V should be there; of several moments of the same images, moment by moment.
            judged: The images to learn from, all by default.

        Returns:
            How good V was before, on these new points; see `METRICS`.
        """
        judged = _all_of(targets) if judged is None else judged
        points = self.ask_reward(points, batch_size=batch_size)
        values = self.evaluate(points, batch_size=batch_size)
        time, values, returns = self._of_all(judged, points.time, values, targets.flatten())
        _check_finite(returns)
        self._standardise(returns)
        self._descend(points, lambda: targets, judged, steps=steps, batch_size=batch_size)
        return self._quality(time, values, returns)

    def fit_paths(
        self,
        nodes: ValuePoints,
        values: Float[Tensor, "nodes batch"],
        costs: Float[Tensor, "steps batch"],
        judged: Bool[Tensor, " batch"] | None = None,
        *,
        trace: float,
        steps: int,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """Fit V to whole rollouts.

        Args:
            nodes: All nodes of all images, node by node from noise to data.
            values: V at them before the fit, and the reward in the last row.
            judged: The images to learn from, all by default.

        Returns:
            How good V was before, on these new nodes; see `METRICS`.
        """
        judged = _all_of(values) if judged is None else judged
        nodes = self.ask_reward(nodes, batch_size=batch_size)
        returns = traced_returns(values, costs, trace=1.0).flatten()
        time, before, returns = self._of_all(judged, nodes.time[: len(returns)], values[:-1].flatten(), returns)
        _check_finite(returns)
        self._standardise(*self._of_all(judged, values[-1]))

        def targets() -> Tensor:
            latest = values
            if trace < 1:
                latest = self.evaluate(nodes, batch_size=batch_size).view_as(values)
            latest = torch.cat([latest[:-1], values[-1:]])
            return torch.cat([traced_returns(latest, costs, trace=trace), values[-1:]])

        self._descend(nodes, targets, judged, steps=steps, batch_size=batch_size)
        return self._quality(time, before, returns)

    def _of_all(self, judged: Bool[Tensor, " images"], *numbers: PerSample) -> Sequence[PerSample]:
        """What all processes have of numbers that lie moment by moment, of the judged images alone."""
        mask = judged.repeat(len(numbers[0]) // len(judged)).to(numbers[0])
        *joined, mask = self._processes.join(torch.stack([*numbers, mask]), dim=1).unbind()
        return [one[mask > 0] for one in joined]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to end in the same weights, bit for bit."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "mean": self._mean,
            "std": self._std,
            "fits": self._fits,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.network.load_state_dict(state_dict["network"])
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._mean, self._std = state_dict["mean"], state_dict["std"]
        self._fits = state_dict["fits"]

    def _standard(self, points: ValuePoints, reward: PerSample | None, baseline: PerSample) -> ValuePoints:
        """The points with these numbers, the reward in the unit of F already."""
        return replace(points, x0_reward=reward, baseline=(baseline - self._mean) / self._unit)

    @property
    def _unit(self) -> float:
        return self._std or 1.0

    def _is_asked(self, points: ValuePoints) -> Tensor:
        """Where the reward of x0_hat takes part."""
        return points.time <= (self._reward_until if self._terminal else -1.0)

    def _reward_of(self, points: ValuePoints) -> PerSample:
        """The reward of x0_hat where it takes part, and 0 elsewhere."""
        assert self._terminal is not None
        is_followed = self._is_differentiable and torch.is_grad_enabled() and points.x0_hat.requires_grad
        rewards = points.x0_reward
        if rewards is not None and not is_followed:
            return rewards  # without asking where they count, which waits for the device
        rows = _rows(points)[self._is_asked(points).cpu()]
        if rewards is None:
            rewards, some = points.time.new_zeros(len(points)), points.select(rows)
            with torch.set_grad_enabled(is_followed):
                found = self._terminal(some.x0_hat, some.prompts) if len(some) else rewards[:0]
            rewards = rewards.index_put((rows.to(rewards.device),), found)
            if is_followed and some.x0_hat.requires_grad:
                failed = found.detach().isnan()[:, None, None, None]
                some.x0_hat.register_hook(lambda slope: slope.masked_fill(failed, 0.0))  # which NaN times 0 is not
        if is_followed and len(rows) and not rewards.requires_grad:
            raise InputError(
                "the reward gives numbers without a gradient, but the slope of V goes through it; use a reward that "
                "differentiates, or value.uses_reward: false with value.sees_latents: true"
            )
        return rewards

    def _standardise(self, rewards: PerSample) -> None:
        """Take the unit of F from the first rewards that differ."""
        if self._std == 0:
            self._mean = rewards.mean().item()
            self._std = (rewards - rewards[0]).std(correction=0).item()

    @torch.enable_grad()
    def _descend(
        self,
        points: ValuePoints,
        targets: Callable[[], Tensor],
        judged: Bool[Tensor, " images"],
        *,
        steps: int,
        batch_size: int,
    ) -> None:
        """Take AdamW steps on shuffled points of all processes, with new targets at every pass."""
        queue: list[Tensor] = []
        goals, everyone = torch.empty(0), len(points) * self._processes.count
        is_judged = self._processes.join(judged.float()).cpu() > 0
        is_learnt = is_judged.repeat(everyone // len(is_judged))
        for step in range(steps):
            if not queue:
                goals = targets()
                order = torch.randperm(
                    everyone, generator=keyed_generator("value", self._seed, self._fits, step), device="cpu"
                )
                queue = list(order[is_learnt[order]].split(batch_size))
            batch = queue.pop(0)
            rows = self._own(batch, goals.shape[-1])
            self._optimizer.zero_grad()
            if len(rows):  # otherwise all points of this step are other processes'
                errors = monte_carlo(self(points.select(rows)), goals.flatten()[rows.to(goals.device)])
                ((errors / self._unit**2).sum() * self._processes.count / len(batch)).backward()
            self._processes.average_gradients(list(self.network.parameters()))
            nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._fits += 1

    def _own(self, rows: Tensor, images: int) -> Tensor:
        """Where those of all points lie that are this process's: the points of each moment are dealt by image."""
        moment, image = rows // (images * self._processes.count), rows % (images * self._processes.count)
        own = image // images == self._processes.index
        return (moment * images + image % images)[own]

    def _quality(self, time: PerSample, values: PerSample, returns: PerSample) -> dict[str, Tensor]:
        part = (time * len(TIME_BINS)).long().clamp(max=len(TIME_BINS) - 1)
        bins = {name: _explained(values[part == index], returns[part == index]) for index, name in enumerate(TIME_BINS)}
        error = ((values - returns) / self._unit).square().mean()
        return {"value/loss": error, "value/explained_variance": _explained(values, returns), **bins}


def _all_of(numbers: Float[Tensor, "... images"]) -> Bool[Tensor, " images"]:
    return torch.ones(numbers.shape[-1], dtype=torch.bool, device=numbers.device)


def _explained(values: PerSample, returns: PerSample) -> Tensor:
    return explained_variance(values, returns) if len(values) else torch.tensor(math.nan, device=values.device)


def _check_finite(returns: PerSample) -> None:
    if bad := int((~torch.isfinite(returns)).sum()):
        raise InputError(
            f"{bad} of {len(returns)} returns are not finite, but V is fitted to them; look at the rewards and at the "
            "costs of the steps"
        )


def _rows(points: ValuePoints) -> Tensor:
    return torch.arange(len(points))
