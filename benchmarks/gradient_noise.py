"""Which steps of a path tell a policy gradient anything: signal and noise of the gradient, step by step, on `shapes`.

    python benchmarks/gradient_noise.py --rollouts 60

Rollouts of the unmoved policy are independent draws of the same gradient, so their mean tells its length and their
spread its noise. Three advantages are compared on the same draws: the group's (GRPO), the change of the value (noise
falls with what is still open), and GAE between value and return. The value is the reward of the predicted clean image,
trusted as far as it was right at that time in the rollouts before. Prints a table and one JSON object.
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rpo.models.checkpoint import Checkpoint
from rpo.objectives.advantages import gae
from rpo.rewards import load_reward
from rpo.shapes.prompts import sample_prompts
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.settings import RolloutConfig
from rpo.trainers.rollouts.steps import replayed
from rpo.trainers.settings import AdapterConfig
from rpo.trainers.trainer import Trainer
from rpo.trainers.value.inputs import others_mean, value_nodes

TRAIN_PROMPTS = 512
TRACE = 0.9
MOVED = 0.01
"""Size of the adapter's B, which starts at 0 and would leave A without a gradient."""


@dataclass
class Moments:
    """Running mean and spread of a vector for every step, and of their sum over some of them."""

    count: int = 0
    total: Tensor | None = None
    squares: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Take in one rollout's gradients, [steps, parameters]."""
        self.count += 1
        self.total = gradients.clone() if self.total is None else self.total + gradients
        square = (gradients**2).sum(dim=1)
        self.squares = square if self.squares is None else self.squares + square

    def result(self) -> tuple[list[float], list[float]]:
        """(variance, squared length of the mean without its bias) of every step."""
        assert self.total is not None and self.squares is not None
        mean_square = (self.total**2).sum(dim=1) / self.count**2
        variance = (self.squares - self.count * mean_square) / (self.count - 1)
        return variance.tolist(), (mean_square - variance / self.count).tolist()


def advantages(rollout: Rollout, said: Tensor, trust: Tensor) -> dict[str, Tensor]:
    """[steps, images] of each kind.

    Args:
        rollout: What was drawn.
        said: Reward of the predicted clean image, [nodes, images].
        trust: How far it counts at each node, 0 … 1; the rest is what the group earned.
    """
    others = others_mean(rollout.rewards, rollout.group)
    assert others is not None
    values = others + trust[:, None] * (said - others)
    values[-1] = rollout.rewards
    costs = torch.zeros_like(values[1:])
    return {
        "group": (rollout.rewards - others).expand_as(costs),
        "value difference": gae(values, costs, trace=0.0),
        f"GAE {TRACE:g}": gae(values, costs, trace=TRACE),
    }


class Trust:
    """How far the reward of the predicted image foretells the reward, by node: a regression within groups."""

    def __init__(self, nodes: int):
        """Start with the end of the path alone."""
        self._both, self._own = torch.zeros(nodes), torch.full((nodes,), 1e-6)
        self._both[-1] = self._own[-1]

    def __call__(self) -> Tensor:
        """The coefficients so far."""
        return (self._both / self._own).clamp(0, 1)

    def learn(self, rollout: Rollout, said: Tensor) -> None:
        """Take in a rollout, after it has been judged."""
        others = others_mean(rollout.rewards, rollout.group)
        assert others is not None
        centred = said - others
        self._both += (centred * (rollout.rewards - others)).sum(dim=1)
        self._own += (centred**2).sum(dim=1)


def measure(collector: Collector, num_rollouts: int, num_steps: int) -> tuple[dict[str, Moments], Trust]:
    """The gradient of every step for every kind of advantage, over that many rollouts."""
    run, verifier = collector.run, load_reward("shapes")
    found: dict[str, Moments] = {}
    trust, started = Trust(num_steps + 1), time.perf_counter()
    for index in range(num_rollouts):
        rollout = collector.draw(index)
        steps, images = collector.steps(rollout), rollout.num_images
        nodes = value_nodes(run.model, rollout, range(num_steps + 1))
        with torch.no_grad():
            said = verifier(run.model.decode(nodes.x0_hat), nodes.prompts).view(-1, images)
        worth = advantages(rollout, said, trust())
        trust.learn(rollout, said)
        gradients: dict[str, list[Tensor]] = {name: [] for name in worth}
        for step in range(num_steps):
            part = steps.select(torch.arange(images) + images * step)
            _, transition = replayed(run.model, part, collector.kernel, guidance_scale=1.0)
            log_prob = transition.log_prob(part.x_s)
            for name, advantage in worth.items():
                loss = -(advantage[step] * log_prob).mean()
                parts = torch.autograd.grad(loss, run.policy.parameters, retain_graph=True)
                gradients[name].append(torch.cat([gradient.flatten() for gradient in parts]))
        if index > 0:  # the first rollout had no trust to go by
            for name, rows in gradients.items():
                found.setdefault(name, Moments()).add(torch.stack(rows))
        print(f"rollout {index + 1} of {num_rollouts}, {time.perf_counter() - started:.0f} s", flush=True)
    return found, trust


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=60, help="each of 64 images")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    model = Checkpoint.load("shapes")
    rollout_config = RolloutConfig(num_steps=args.steps, spacing="uniform", guidance_scale=1.0)
    config = GRPOConfig(rollout=rollout_config, adapter=AdapterConfig(rank=8), output="runs/gradient_noise")
    prompts = list(dict.fromkeys(prompt.text for prompt in sample_prompts("train", TRAIN_PROMPTS, seed=0)))
    algorithm = GRPO("shapes", prompts, config)
    run = Trainer(model, algorithm).run
    generator = torch.Generator().manual_seed(0)
    for parameter in run.policy.parameters:
        if not bool(parameter.any()):
            parameter.data = MOVED * torch.randn(parameter.shape, generator=generator)
    found, trust = measure(algorithm.collector, args.rollouts, args.steps)
    results = {name: moments.result() for name, moments in found.items()}
    for name, (variance, signal) in results.items():
        print(f"\n{name}\n| step | share of the variance | signal / noise |\n|---|---|---|")
        for step, (noise, square) in enumerate(zip(variance, signal, strict=True)):
            ratio = square / noise if noise > 0 else float("nan")
            print(f"| {step} | {noise / sum(variance):.3f} | {ratio:+.4f} |")
    print(json.dumps({"rollouts": args.rollouts, "trust": trust().tolist(), **results}))


if __name__ == "__main__":
    main()
