"""Noise schedules as checkpoints state them, by the configuration of their scheduler.

There are three kinds: betas in discrete time (`DiscreteSchedule`), rectified flow with a shift (`FlowSchedule`), and
shares of masked tokens (`MaskingSchedule`). All give the grid at which the pipeline itself would step, and the moment
at which training asks the network.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rpo.errors import InputError
from rpo.process.categorical import NUM_TRAIN_TIMESTEPS, MaskingProcess
from rpo.process.grid import flow_grid, vp_grid, vp_node
from rpo.process.schedule import RectifiedFlow, VariancePreserving
from rpo.types import Grid, Node, PredictionType

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")

SAME_SCHEDULE = 1e-3
"""How far two noise schedules may be apart, in alpha-bar: schedulers differ in how they end one at zero."""

SCHEDULER_ADVICE = (
    'set pipe.scheduler = DDIMScheduler.from_pretrained(CHECKPOINT, subfolder="scheduler"); that of Stable Diffusion '
    '1.x and 2.x is DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", '
    "clip_sample=False, set_alpha_to_one=False, steps_offset=1)"
)

FLOW_ADVICE = (
    'set pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(CHECKPOINT, subfolder="scheduler"); that '
    "of Stable Diffusion 3 and 3.5 is FlowMatchEulerDiscreteScheduler(shift=3.0)"
)


@final
class DiscreteSchedule:
    """The betas of a variance-preserving checkpoint; the network is told which of them, an integer."""

    def __init__(self, scheduler: Any):
        """Read the schedule of a pipeline's scheduler."""
        self._ddim = noise_schedule(scheduler)
        self.config: Mapping[str, Any] = self._ddim.config
        self.prediction_type: PredictionType = self.config["prediction_type"]
        self.num_train_timesteps: int = self.config["num_train_timesteps"]
        self._alphas_cumprod: Tensor = self._ddim.alphas_cumprod
        self.process = VariancePreserving(self._alphas_cumprod, float(self._ddim.final_alpha_cumprod))

    def grid(self, num_steps: int, sequence_length: int) -> Grid:
        """The timesteps of a DDIM sampler, spaced as the scheduler says; the same for every size."""
        check_steps(num_steps, self.num_train_timesteps)
        scheduler = DDIMScheduler.from_config(self.config)
        scheduler.set_timesteps(num_steps)
        return vp_grid(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))

    def node(self, timestep: Tensor) -> Node:
        """Alpha and sigma at one training timestep per sample."""
        if self._alphas_cumprod.device != timestep.device:
            self._alphas_cumprod = self._alphas_cumprod.to(timestep.device)
        return vp_node(self._alphas_cumprod, timestep)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A training timestep; all are equally likely."""
        return torch.randint(self.num_train_timesteps, (), generator=generator, device="cpu")

    def shift(self, num_steps: int, sequence_length: int) -> float:
        """None: where the steps lie is the scheduler's spacing."""
        return 1.0


@final
class FlowSchedule:
    """Rectified flow; the network is told sigma in units of the training timestep, any number."""

    prediction_type: PredictionType = "flow"

    def __init__(
        self,
        scheduler: Any,
        *,
        sigmas: Callable[[int], list[float]] | None = None,
        mu: Callable[[int, int], float] | None = None,
        max_shift: float = 1.16,
    ):
        """Read the schedule of a pipeline's scheduler.

        Args:
            sigmas: Where the pipeline says itself which sigmas are to be shifted: those of a number of steps.
            mu: The logarithm of a dynamic shift by steps and tokens, where it is not linear in the tokens.
            max_shift: The end of the linear one, which the pipeline takes where the scheduler does not say it.
        """
        self.config: Mapping[str, Any] = scheduler.config
        self._sigmas = sigmas
        self._mu = mu or (lambda num_steps, sequence_length: linear_mu(self.config, sequence_length, max_shift))
        self._made: Any = type(scheduler)
        is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or self.config.get("use_flow_sigmas")
        if not is_flow or self.config.get("stochastic_sampling"):
            raise InputError(
                f"the pipeline's scheduler is {type(scheduler).__name__}, but its transformer predicts flow and "
                f"needs one for that, without noise; {FLOW_ADVICE}"
            )
        self.num_train_timesteps: int = self.config["num_train_timesteps"]
        self.process = RectifiedFlow(self.num_train_timesteps)

    def grid(self, num_steps: int, sequence_length: int) -> Grid:
        """The sigmas of the checkpoint's own sampler; with dynamic shifting they move up as images grow."""
        check_steps(num_steps, self.num_train_timesteps)
        scheduler = self._made.from_config(self.config)
        options: dict[str, Any] = {}
        if self._sigmas and not self.config.get("use_flow_sigmas"):
            options["sigmas"] = self._sigmas(num_steps)
        if self.config.get("use_dynamic_shifting"):
            options["mu"] = self._mu(num_steps, sequence_length)
        scheduler.set_timesteps(num_steps, **options)
        grid = flow_grid(scheduler.sigmas.cpu(), num_train_timesteps=self.num_train_timesteps)
        told = scheduler.timesteps.to(grid.timestep)  # which solvers round
        return replace(grid, timestep=torch.cat([told, told.new_zeros(1)]))

    def node(self, timestep: Tensor) -> Node:
        """Alpha and sigma at one timestep per sample."""
        sigma = (timestep.double() / self.num_train_timesteps)[:, None, None, None]
        return Node((1 - sigma).float(), sigma.float(), timestep[:, None, None, None])

    def draw(self, generator: torch.Generator) -> Tensor:
        """A training timestep by the logit-normal density of the SD 3 paper (arXiv:2403.03206, section 3.1)."""
        normal = torch.randn((), generator=generator, dtype=torch.float32, device="cpu")
        return normal.sigmoid() * self.num_train_timesteps

    def shift(self, num_steps: int, sequence_length: int) -> float:
        """The shift s of sigma = s t / (1 + (s - 1) t)."""
        if self.config.get("use_dynamic_shifting"):
            mu = self._mu(num_steps, sequence_length)
            return mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        name = "flow_shift" if self.config.get("use_flow_sigmas") else "shift"
        return float(self.config.get(name) or 1.0)


@final
class MaskingSchedule:
    """Shares of masked tokens, as diffusers' `AmusedScheduler` has them; the network is not told of time."""

    prediction_type: PredictionType = "logits"
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS

    def __init__(self, scheduler: Any):
        """Read the schedule of a pipeline's scheduler."""
        self.config: Mapping[str, Any] = scheduler.config
        if "masking_schedule" not in self.config:
            raise InputError(
                f"the pipeline's scheduler is {type(scheduler).__name__}, but a model of tokens needs one that masks; "
                'set pipe.scheduler = AmusedScheduler.from_pretrained(CHECKPOINT, subfolder="scheduler")'
            )
        self.process = MaskingProcess(self.config["masking_schedule"])

    def grid(self, num_steps: int, sequence_length: int) -> Grid:
        """Even in time, in the scheduler's own precision, which counts tokens by them."""
        check_steps(num_steps, self.num_train_timesteps)
        done = torch.arange(1, num_steps, dtype=torch.float32) / num_steps
        left = (done * math.pi / 2).cos() if self.process.schedule == "cosine" else 1 - done
        sigma = torch.cat([torch.ones(1), left, torch.zeros(1)])
        return Grid(1 - sigma, sigma, torch.linspace(1, 0, num_steps + 1) * self.num_train_timesteps)

    def node(self, timestep: Tensor) -> Node:
        """The share at one timestep per sample."""
        sigma = self.process.sigma(timestep.double() / self.num_train_timesteps)[:, None, None, None].float()
        return Node(1 - sigma, sigma, timestep[:, None, None, None])

    def draw(self, generator: torch.Generator) -> Tensor:
        """A moment; all are equally likely."""
        return torch.rand((), generator=generator, dtype=torch.float32, device="cpu") * self.num_train_timesteps

    def shift(self, num_steps: int, sequence_length: int) -> float:
        """None."""
        return 1.0


def even_sigmas(num_steps: int) -> list[float]:
    """From 1 in equal steps: what most flow pipelines hand to their scheduler."""
    return [1 - step / num_steps for step in range(num_steps)]


def linear_mu(config: Mapping[str, Any], sequence_length: int, max_shift: float) -> float:
    """The logarithm of a dynamic shift, linear in a number of tokens; see `FlowSchedule`."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return base + slope * (sequence_length - low)


def check_steps(num_steps: int, num_train_timesteps: int) -> None:
    """Refuse a number of steps that a checkpoint cannot take."""
    if not 1 <= num_steps <= num_train_timesteps:
        raise InputError(
            f"num_steps is {num_steps}, but this checkpoint has {num_train_timesteps} timesteps; ask for 1 to "
            f"{num_train_timesteps} (20 to 50 are usual, 8 to 20 with a solver)"
        )


def noise_schedule(scheduler: Any) -> DDIMScheduler:
    """The noise schedule that a pipeline's scheduler states, as DDIM's."""
    config: Mapping[str, Any] = scheduler.config
    own, name = vars(scheduler).get("alphas_cumprod"), type(scheduler).__name__
    if own is None or config.get("use_flow_sigmas"):
        raise InputError(
            f"the pipeline's scheduler is {name}, which does not state the noise schedule (betas) that the UNet was "
            f"trained with: it is for flow, EDM or consistency models; {SCHEDULER_ADVICE}"
        )
    prediction_type = config.get("prediction_type")
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"the scheduler says prediction_type={prediction_type!r}; {', '.join(PREDICTION_TYPES[:2])} or sample is "
            f"needed; {SCHEDULER_ADVICE}"
        )
    try:
        # The pipeline itself switches clip_sample off; a scheduler configured for another class may leave it unset.
        made = DDIMScheduler.from_config(config, clip_sample=False)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the scheduler {name} has no usable noise schedule ({error}); {SCHEDULER_ADVICE}") from error
    curve = made.alphas_cumprod.double()
    falls = bool(torch.cat([curve, curve.new_zeros(1)]).diff().le(0).all()) and 0 < float(curve[0]) <= 1
    if not (falls and len(curve) == made.config["num_train_timesteps"]):
        raise InputError(
            f"the scheduler {name} has betas that make no noise schedule of {made.config['num_train_timesteps']} "
            f"steps that falls from 1 to 0; {SCHEDULER_ADVICE}"
        )
    # A sampler that does not know of zero terminal SNR keeps the word in its configuration, for others to read.
    curves = [made.alphas_cumprod, DDIMScheduler.from_config(config, rescale_betas_zero_snr=False).alphas_cumprod]
    if not any(len(own) == len(one) and bool((own.cpu() - one).abs().max() <= SAME_SCHEDULE) for one in curves):
        raise InputError(
            f"the scheduler {name} has another noise schedule than its configuration's betas make; {SCHEDULER_ADVICE}"
        )
    return made
