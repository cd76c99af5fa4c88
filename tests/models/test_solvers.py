"""Black-box solvers end where the pipeline with the same scheduler ends, and refuse to be used out of order."""

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline

import rpo.shapes
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.solvers import SOLVERS, BlackBoxSolver
from rpo.process.grid import vp_grid
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.types import Grid, Node
from tests.tiny import tiny_scheduler, tiny_sd
from tests.tiny_amused import tiny_amused

PROMPTS = ["a red circle", "", "two blue squares"]


def generators():
    return [image_generator(7, index, 0) for index in range(len(PROMPTS))]


def draw(model, grid, kernel, guidance_scale=3.0):
    cond = model.encode_prompts(PROMPTS)
    return sample(model, cond, grid, kernel, guidance_scale=guidance_scale, generators=generators()).x_0


def pipeline_end(pipe, name, num_steps, guidance_scale=3.0, **changes):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    return pipe(
        PROMPTS,
        output_type="latent",
        generator=generators(),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
    ).images


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("num_steps", "guidance_scale"), [(1, 1.0), (5, 3.0), pytest.param(17, 3.0, marks=pytest.mark.slow)]
)
def test_sampling_ends_where_the_pipeline_ends(name, prediction_type, num_steps, guidance_scale):
    pipe = tiny_sd(prediction_type)
    model = Checkpoint(pipe)
    solver = BlackBoxSolver(model, num_steps, name=name)
    ours = draw(model, solver.grid, solver, guidance_scale)
    theirs = pipeline_end(pipe, name, num_steps, guidance_scale)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=["trailing", "karras", "zero terminal SNR"],
)
def test_the_checkpoint_s_spacing_is_the_solver_s(changes):
    pipe = tiny_sd("v_prediction")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    model = Checkpoint(pipe)
    solver = BlackBoxSolver(model, 6)
    ours = draw(model, solver.grid, solver)
    theirs = pipeline_end(pipe, "DPMSolverMultistepScheduler", 6)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_stochastic_variant_of_the_checkpoint_becomes_deterministic():
    pipe = tiny_sd()
    expected = pipeline_end(pipe, "DPMSolverMultistepScheduler", 5)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    model = Checkpoint(pipe)
    solver = BlackBoxSolver(model, 5)
    assert (draw(model, solver.grid, solver) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_its_grid_lies_on_the_checkpoint_s_schedule_and_ends_at_clean_data():
    scheduler = tiny_scheduler()
    grid = BlackBoxSolver(Checkpoint(tiny_sd()), 9).grid
    expected = vp_grid(scheduler.alphas_cumprod, grid.timestep[:-1], 1.0)
    assert torch.allclose(grid.alpha, expected.alpha, atol=1e-6)
    assert torch.allclose(grid.sigma, expected.sigma, atol=1e-6)
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


@pytest.mark.slow
def test_second_order_needs_fewer_steps_than_ddim_on_a_trained_checkpoint():
    model = Checkpoint(StableDiffusionPipeline.from_pretrained(rpo.shapes.path()))
    truth = BlackBoxSolver(model, 100)
    exact = draw(model, truth.grid, truth)
    solver = BlackBoxSolver(model, 10)
    error = (draw(model, solver.grid, solver) - exact).square().mean()
    assert error < 0.5 * (draw(model, model.grid(10), Ddim(eta=0.0)) - exact).square().mean()


def test_it_has_no_density():
    model = Checkpoint(tiny_sd())
    solver = BlackBoxSolver(model, 2)
    trajectory = sample(
        model,
        model.encode_prompts(PROMPTS),
        solver.grid,
        solver,
        guidance_scale=1.0,
        generators=generators(),
    )
    assert not solver.has_density
    assert trajectory.log_probs.isnan().all()


def test_a_second_rollout_is_refused():
    model = Checkpoint(tiny_sd())
    solver = BlackBoxSolver(model, 2)
    draw(model, solver.grid, solver)
    with pytest.raises(
        ValueError, match="^this solver has done its 2 steps, but was asked for another; it remembers one"
    ):
        draw(model, solver.grid, solver)


def test_on_its_own_grid_no_step_waits_for_the_device(monkeypatch):
    model = Checkpoint(tiny_sd())

    def read(*tensors):
        raise AssertionError("two tensors were compared on the host")

    solver = BlackBoxSolver(model, 3)
    copied = Grid(*(nodes.clone() for nodes in vars(solver.grid).values()))
    monkeypatch.setattr(torch, "equal", read)
    monkeypatch.setattr(torch.Tensor, "nonzero", read)  # nor does diffusers look its step up by timestep
    draw(model, solver.grid, solver)
    monkeypatch.undo()
    draw(model, copied, BlackBoxSolver(model, 3))


def test_another_grid_is_refused():
    model = Checkpoint(tiny_sd())
    with pytest.raises(
        ValueError, match=r"^step 0 of this solver goes from .* but it was asked for .*; sample on solver.g"
    ):
        draw(model, model.grid(7), BlackBoxSolver(model, 5))


def test_a_step_out_of_order_and_a_mixture_of_steps_are_refused():
    solver = BlackBoxSolver(Checkpoint(tiny_sd()), 5)
    x_t = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"^step 0 of this solver .* in order, with a new BlackBoxSolver"):
        solver(x_t, x_t, solver.grid[1], solver.grid[2])
    solver(x_t, x_t, solver.grid[0], solver.grid[1])
    with pytest.raises(ValueError, match=r"^step 1 of this solver"):
        solver(x_t, x_t, solver.grid[0], solver.grid[1])
    both = [Node(*(x[[k, k + 1]][:, None, None, None] for x in vars(solver.grid).values())) for k in (1, 2)]
    with pytest.raises(ValueError, match="but it was asked for .* sample on solver.grid, in order"):
        solver(x_t, x_t, *both)


def test_unknown_solvers_are_refused():
    with pytest.raises(
        ValueError, match="^solver is 'EulerDiscreteScheduler', but only some .*; give DPMSolverMultistep"
    ):
        BlackBoxSolver(Checkpoint(tiny_sd()), 5, name="EulerDiscreteScheduler")


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(
        ValueError, match=f"^num_steps is {num_steps}, but this checkpoint has 1000 timesteps; ask for 1 to"
    ):
        BlackBoxSolver(Checkpoint(tiny_sd()), num_steps)


def test_a_solver_of_latents_is_not_for_tokens():
    with pytest.raises(InputError, match="tokens"):
        BlackBoxSolver(Checkpoint(tiny_amused()), 4)
