"""How many graphs torch sees in a step of a rollout and in the losses of updates: one line of JSON for each.

A script, for the type checks that tests run under are no part of what is compiled:

    python tests/one_graph.py "step: sd3" "dpo: sd3"
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import _dynamo
from torch._dynamo.testing import CompileCounter

from rpo.adapters.lora import add_lora
from rpo.models.checkpoint import Checkpoint
from rpo.objectives.endpoint.nft import Nft
from rpo.process.diffusion import diffusion_of
from rpo.sampling.step import predict, transition
from tests.contracts.families import FAMILIES
from tests.tiny_amused import tiny_amused
from tests.trainers.online_runs import UNWATCHED, endpoint, grpo, score_as_action
from tests.trainers.pair_runs import trainer_of

EVERY = {**FAMILIES, "masked_tokens": tiny_amused}

UPDATES = {
    "dpo": lambda folder, pipe: trainer_of(folder, pipe=pipe),
    "grpo": lambda folder, pipe: grpo(folder, pipe=pipe, monitor=UNWATCHED, kl_weight=0.1),
    "endpoint": lambda folder, pipe: endpoint(folder, pipe=pipe, monitor=UNWATCHED),
    "nft": lambda folder, pipe: endpoint(folder, pipe=pipe, monitor=UNWATCHED, objective=Nft()),
    "score as action": lambda folder, pipe: score_as_action(folder, pipe=pipe, monitor=UNWATCHED),
}


def step_of(family, *, num_steps=3):
    """One step of a rollout, as `sample` takes it, and what it is given in each step."""
    model = Checkpoint(EVERY[family]())
    add_lora(model.denoiser, rank=2, target_modules=model.family.lora_targets)
    cond, grid, diffusion = (
        model.encode_prompts(["a house"]),
        model.grid(num_steps),
        diffusion_of(model.prediction_type),
    )
    kernel = diffusion.kernel("ddim", 1.0)

    @torch.no_grad()
    def step(x_t, noise, t, s):
        drawn = transition(model, predict(model, x_t, t, cond, guidance_scale=3.0), x_t, t, s, kernel)
        x_s = drawn.sample(noise)
        return x_s, drawn.log_prob(x_s)

    noise = torch.randn(num_steps + 1, 1, *model.latent_shape())
    x_t = diffusion.start(noise[0])
    return step, [(x_t, noise[k + 1], grid[k], grid[k + 1]) for k in range(num_steps)]


def explained(function, *arguments):
    """What torch says of a call."""
    _dynamo.reset()
    found = _dynamo.explain(function)(*arguments)
    return {
        "graphs": found.graph_count,
        "breaks": [str(one.reason).splitlines()[0] for one in found.break_reasons],
        "operations": found.op_count,
    }


def steps_alike(family):
    """Graphs that all steps of a rollout need together, and how far they are from what is not compiled."""
    step, given = step_of(family)
    _dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    apart = [
        float((own - expected).abs().max())
        for one in given
        for own, expected in zip(compiled(*one), step(*one), strict=True)
        if expected.isfinite().all()
    ]
    return {"graphs": counter.frame_count, "apart": max(apart)}


def loss_of(name, family):
    """The loss of an update: of pairs both sides, policy and reference; of rollouts the replayed step."""
    with tempfile.TemporaryDirectory() as folder:
        algorithm = UPDATES[name](folder, EVERY[family]()).algorithm
        algorithm.prepare()
        if name == "dpo":
            assert algorithm.reference.kept is None  # made when it is first asked for, which looks at folders

        def loss(batch):
            output = algorithm.loss(batch)
            return output.loss, output.sample_losses, output.metrics

        return explained(loss, next(algorithm.batches(0)))


def asked(case):
    """What is found of "step: FAMILY", "steps: FAMILY" or "ALGORITHM: FAMILY"."""
    what, family = case.split(": ")
    if what == "step":
        step, given = step_of(family)
        return explained(step, *given[0])
    return steps_alike(family) if what == "steps" else loss_of(what, family)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        print(json.dumps({"case": case, **asked(case)}), flush=True)
