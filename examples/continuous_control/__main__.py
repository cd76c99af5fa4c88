"""Learn to control a noisy state in continuous time by three policy gradients, where the best policy is known exactly.

    python -m examples.continuous_control --folder runs/control

CPG and CPPO see states and rewards only. They are compared with the closed-form optimum, and CPPO's two penalties on
the distance from the old policy, C √KL and C KL, with each other.
"""

import argparse
from pathlib import Path

import torch

from examples.continuous_control.lq import LinearPolicy, LinearQuadratic, objective, optimal_policy
from examples.continuous_control.policy_gradient import ControlConfig, Method, Update, learn
from rpo.files.text import write_text
from rpo.reports.charts import Chart, Mark, Series, draw_figure

METHODS: dict[Method, str] = {"cpg": "CPG", "cppo_sqrt": "CPPO, √KL", "cppo_linear": "CPPO, linear KL"}


def main(arguments: list[str] | None = None) -> None:
    """Learn by every method, print how far from the optimum it ends, and draw the way there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/control"), help="where the figure goes")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--updates", type=int, default=80, help="policy updates of each method")
    parser.add_argument("--paths", type=int, default=2000, help="simulated paths per update; fewer are noisier")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # several would only wait for each other on tensors of a few thousand numbers

    problem = LinearQuadratic()
    start, best = LinearPolicy.of(slope=0.0, intercept=0.0, variance=1.0), optimal_policy(problem)
    best_value = float(objective(problem, best))
    print(f"{'':16}    slope  intercept  variance      value")
    print(f"{'closed form':16}{numbers(best)}{best_value:11.5f}")

    runs: dict[str, list[Update]] = {}
    for method, name in METHODS.items():
        config = ControlConfig(method=method, seed=args.seed, updates=args.updates, paths=args.paths)
        runs[name] = list(learn(problem, start, config))
        last = runs[name][-1]
        print(f"{name:16}{numbers(last.policy)}{last.value:11.5f}   farthest off: {distance(last.policy, best):.2%}")

    args.folder.mkdir(parents=True, exist_ok=True)
    figure = args.folder / "continuous_control.svg"
    write_text(figure, draw_figure(charts(runs, float(objective(problem, start)), best_value)))
    print(f"figure: {figure}")


def numbers(policy: LinearPolicy) -> str:
    """The three numbers of a policy, as a table row."""
    return f"{float(policy.slope):9.4f}{float(policy.intercept):11.4f}{float(policy.variance):10.4f}"


def distance(policy: LinearPolicy, best: LinearPolicy) -> float:
    """The largest relative error among slope, intercept and variance."""
    pairs = [(policy.slope, best.slope), (policy.intercept, best.intercept), (policy.variance, best.variance)]
    return max(abs(float(learnt) / float(exact) - 1) for learnt, exact in pairs)


def charts(runs: dict[str, list[Update]], start_value: float, best_value: float) -> list[Chart]:
    """How good the policy became, and how far each update went."""
    values, steps = [], []
    for name, run in runs.items():
        x = tuple(float(update) for update in range(len(run) + 1))
        values.append(Series(name, x, (start_value, *(update.value for update in run)), is_noisy=False))
        steps.append(Series(name, x[1:], tuple(update.sqrt_kl for update in run), is_noisy=False))
    targets = tuple(update.target for update in next(reversed(runs.values())))
    steps.append(Series("target of CPPO", x[1:], targets, is_noisy=False))
    exact = "Exact, from the closed form; the learner sees states and rewards only."
    kink = "√KL lets an update go all the way or nowhere, linear KL some way. At the optimum, noise drives both."
    return [
        Chart("Value of the policy", tuple(values), (Mark("optimum", best_value),), exact),
        Chart("√KL between the policies before and after an update", tuple(steps), (), kink),
    ]


if __name__ == "__main__":
    main()
