"""What compilation and CUDA graphs gain: a step of the sampler, and a forward and backward of what is trained.

Three ways: `model.compile`, as every run has it; the whole step as one graph; and the same in `reduce-overhead` mode,
where a graph of kernels is recorded and replayed, so that small networks no longer wait for the host. That a step is
one graph is what a test of rpo holds.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from card import seconds_of
from dpo_step import PRESETS, build
from gpu_part import Note, Setting
from online_step import PRESETS as TINY
from torch import Tensor, nn

from rpo.adapters.lora import add_lora
from rpo.models.checkpoint import Checkpoint
from rpo.models.execution import prepare_denoiser
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, noise_of
from rpo.sampling.step import predict, transition
from rpo.types import Node

IMAGES, GUIDANCE, REPEATS = 4, 5.0, 10
PROMPTS = ["a red circle", "a house", "two dogs", "a tree"]
SMALL = TINY["tiny"]


def blocks(setting: Setting, note: Note) -> None:
    """What `model.compile` gains for Stable Diffusion 1.5 at 512 px: the step, and what is trained."""
    model = _model(PRESETS["sd15"] if setting.on_gpu else SMALL, setting)
    parameters = add_lora(model.denoiser)
    step, arguments = _step(model)
    train = partial(_forward_and_backward, model, parameters, arguments[0])
    eager = {"step": _timed(step, arguments, setting), "training": seconds_of(train, setting.where, repeats=REPEATS)}
    note("eager", {f"{name}_seconds": one for name, one in eager.items()})
    prepare_denoiser(model.denoiser, compute_dtype=model.compute_dtype, compile_denoiser=True)
    found, took = _first(lambda: step(*arguments), setting)
    note("model.compile: step", _gain(eager["step"], _timed(step, arguments, setting), took, found, step, arguments))
    _, took = _first(train, setting)
    seconds = seconds_of(train, setting.where, repeats=REPEATS)
    gain = {"seconds": seconds, "gain": eager["training"] / seconds, "seconds_to_compile": took}
    note("model.compile: training", gain)


def graphs(setting: Setting, note: Note) -> None:
    """What one graph gains for a small network, which waits for the host most."""
    model = _model(PRESETS["small"] if setting.on_gpu else SMALL, setting)
    step, arguments = _step(model)
    eager = _timed(step, arguments, setting)
    note("eager", {"step_seconds": eager})
    for name, mode in (("one graph", None), ("CUDA graphs", "reduce-overhead")):
        if mode and not setting.on_gpu:
            note(name, {"skipped": "CUDA graphs need a GPU"})
            continue
        torch.compiler.reset()
        # A processor's compiler takes minutes: there the step is traced alone.
        compiled = torch.compile(step, fullgraph=True, mode=mode, backend="inductor" if setting.on_gpu else "aot_eager")
        found, took = _first(partial(compiled, *arguments), setting)
        seconds = _timed(compiled, arguments, setting)
        note(name, _gain(eager, seconds, took, found, step, arguments))


def _model(preset: dict[str, Any], setting: Setting) -> Checkpoint:
    torch.manual_seed(0)
    model = build(preset, torch.bfloat16 if setting.on_gpu else torch.float32, setting.device)
    prepare_denoiser(model.denoiser, compute_dtype=model.compute_dtype)
    return model


def _step(model: Checkpoint) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Node, Node]]:
    """One step of a rollout, as `sample` does it, and something to call it with."""
    cond, grid, kernel = model.encode_prompts(PROMPTS), model.grid(4), Ddim(1.0)
    noise = noise_of(model, [image_generator(0, image, 0) for image in range(IMAGES)], 1)

    @torch.no_grad()
    def step(x_t: Tensor, noise: Tensor, t: Node, s: Node) -> tuple[Tensor, Tensor]:
        said = predict(model, x_t, t, cond, guidance_scale=GUIDANCE)
        drawn = transition(model, said, x_t, t, s, kernel)
        x_s = drawn.sample(noise)
        return x_s, drawn.log_prob(x_s)

    return step, (noise[0], noise[1], grid[0], grid[1])


def _forward_and_backward(model: Checkpoint, parameters: list[nn.Parameter], x_t: Tensor) -> None:
    cond = model.encode_prompts(PROMPTS)
    timestep = torch.full((len(x_t),), 500, device=x_t.device)
    model.predict(x_t, timestep, cond).square().mean().backward()
    for parameter in parameters:
        parameter.grad = None


def _timed(step: Callable[..., object], arguments: tuple[Any, ...], setting: Setting) -> float:
    return seconds_of(partial(step, *arguments), setting.where, repeats=REPEATS)


def _first(work: Callable[[], Any], setting: Setting) -> tuple[Any, float]:
    """What the first call gives, out of reach of the next ones, and its seconds: mostly those of compiling."""
    started = time.perf_counter()
    found = work()
    if isinstance(found, tuple):
        found = tuple(one.clone() for one in found)
    if setting.on_gpu:
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def _gain(
    eager: float,
    seconds: float,
    took: float,
    found: tuple[Tensor, Tensor],
    step: Callable[..., tuple[Tensor, Tensor]],
    arguments: tuple[Any, ...],
) -> dict[str, float]:
    with torch.compiler.set_stance("force_eager"):
        expected = step(*arguments)[0]
    apart = float((found[0] - expected).abs().max() / expected.abs().max())
    return {"seconds": seconds, "gain": eager / seconds, "seconds_to_compile": took, "apart": apart}
