"""Diffusion-DPO (Wallace et al., arXiv:2311.12908) and its family, on a LoRA or on the whole denoiser.

For a pair (chosen w, rejected l), one time t and one noise eps for both sides:

    x_t  = alpha_t x_0 + sigma_t eps
    e    = mean over dimensions of (noise_pred(x_t, t, prompt) - target)²
    loss = -log sigmoid(-beta/2 [(e_w - e_w,ref) - (e_l - e_l,ref)])            eq. 14

Per micro-batch of N pairs: one forward of the reference without gradient on the stacked 2N latents, then one forward
and one backward of the policy. Putting policy and reference into one batch is slower, for backward then runs over the
reference too.

Differs from the authors' code: mirroring is shared by the two sides of a pair; v-prediction and flow checkpoints are
trained on their own target; the latents' posterior and the prompts are encoded once; and training stops when the chosen
side is forgotten. `config.objective` is another member of the family, `config.region` says where errors count.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import final

from rpo.data.preference import left_out, pairs_identity
from rpo.data.readers import PairSource, pairs_from
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.usual import usual_guidance
from rpo.objectives.preference.base import Comparison
from rpo.trainers.checks.preflight import Check, gradient_check
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.pairs.batches import PairBatch, PairBatches, pair_batches, share_of
from rpo.trainers.pairs.errors import Reference, denoise
from rpo.trainers.pairs.facts import PairFacts, pair_facts, require_originals, require_scores
from rpo.trainers.pairs.guard import ErrorGuard
from rpo.trainers.pairs.running_statistics import RunningStatistics
from rpo.trainers.pairs.sizes import sizes_of
from rpo.trainers.preview import DPM_STEPS, PreviewOf
from rpo.trainers.trainer import Algorithm, Run
from rpo.training.state import Stateful
from rpo.types import StepOutput


@final
class DPO(Algorithm[PairBatch]):
    """Learns from preference pairs.

    Attributes:
        pairs: The set.
        beta: The beta in force at the nominal size, worked out from it if the settings leave it open.
    """

    config: DPOConfig
    unit = "pairs"
    draws_ahead = True

    def __init__(self, pairs: PairSource, config: DPOConfig | None = None):
        """Read the set.

        Args:
            pairs: The preference set, or what `read_pairs` reads one from.
            config: The settings.
        """
        super().__init__(config or DPOConfig())
        self.pairs = pairs_from(pairs)

    @property
    def title(self) -> str:
        """That of the objective."""
        return self.config.objective.title

    def start(self, run: Run) -> None:
        """Take the model, and refuse a set that cannot be trained on."""
        super().start(run)
        config, objective = self.config, self.config.objective
        if not isinstance(run.model, Checkpoint):
            raise InputError(f"the model is a {type(run.model).__name__}, but pairs are images; give a pipeline")
        self.model, processes = run.model, run.processes
        self.share = share_of(config.pairs_per_update, config.learning.micro_batch, processes.index, processes.count)
        self.sizes = sizes_of(self.model, self.pairs, config, self.share.at_once)
        require_scores(self.pairs, objective)
        require_originals(self.pairs, self.model.family.edits, self.model.family.name)
        self.beta, self.facts = objective.beta or objective.default_beta(self.sizes.num_dims), PairFacts()
        starts = {"starts_at_zero": objective.starts_at_zero, "starts_at_reference": run.policy.starts_at_reference}
        self._guard = ErrorGuard(**config.error_limits, **starts)
        bins, device = objective.bins, run.policy.parameters[0].device
        self.statistics = RunningStatistics(bins, decay=objective.decay, device=device) if bins else None

    @property
    def division(self) -> tuple[int, int]:
        """(pairs per micro-batch, micro-batches per update)."""
        return self.share.micro_batch, self.share.accumulate

    @property
    def _cache(self) -> Path:
        return Path(self.config.cache_folder or self.run.folder / "cache")

    @cached_property
    def reference(self) -> Reference:
        """What the policy is compared with."""
        return Reference(self.model, self.config, self._cache, self.run)

    @cached_property
    def data(self) -> PairBatches:
        """The micro-batches; their caches are opened here, so that a refused run opens none."""
        return pair_batches(self.model, self.pairs, self.config, self.share, self.sizes.buckets, folder=self._cache)

    def batches(self, first_update: int) -> Iterator[PairBatch]:
        """This process's micro-batches from an update on."""
        return self.data(first_update)

    def names(self, batch: PairBatch) -> Sequence[str]:
        """Of the records."""
        return batch.names

    def loss(self, batch: PairBatch) -> StepOutput:
        """The preference loss of a micro-batch, with its gradient on the policy only."""
        region, objective = self.config.region, self.config.objective
        mask = None if region is None or batch.difference is None else region.mask(batch.difference).repeat(2, 1, 1, 1)
        errors_of_reference, at_reference = self.reference.of(batch, mask)
        denoised = denoise(self.model, batch, mask)  # x_t, prediction and target of both sides
        num_dims = denoised.diffusion.num_dims(batch.eps.shape[1:])
        beta = self.beta * (objective.default_beta(num_dims) / objective.default_beta(self.sizes.num_dims))
        chosen, rejected = denoised.errors(objective.reduction).chunk(2)
        compared = Comparison(
            chosen,
            rejected,
            errors_of_reference,
            time=batch.timestep / self.model.num_train_timesteps,
            beta=beta,
            num_dims=num_dims,
            residuals=denoised.residuals,
            **self.facts.of(batch, chosen),
        )
        output = objective(compared, self.statistics)
        if region is None or mask is None:
            return output
        output = replace(output, metrics={**output.metrics, "dpo/region": mask.mean()})
        if region.anchor == 0 or at_reference is None:
            return output
        return region.anchored(output, denoised.apart(at_reference, 1 - mask, objective.reduction), beta)

    def prepare(self) -> None:
        """Encode what the run visits, and measure what the objective needs of the pairs."""
        if self.config.encode_ahead:
            self.data.fill_caches(self.config.learning.updates, progress=self.run.shows_progress)
        self.facts = pair_facts(self.pairs, self.config.objective, lambda: self.reference.mid_time(self.data))

    def running(self) -> AbstractContextManager[None]:
        """Where all is encoded, a GPU keeps the denoiser alone."""
        return self.model.denoiser_alone() if self.config.encode_ahead else nullcontext()

    def checks(self) -> list[Check]:
        """Whether the loss reaches what is trained; statistics and guard see nothing of it."""
        statistics, self.statistics = self.statistics, None if self.statistics is None else self.statistics.fresh()
        try:
            loss = self.loss(next(self.data(0))).loss
        finally:
            self.statistics = statistics
        return [gradient_check(loss, self.run.policy.parameters, is_lora=self.config.adapter.train == "lora")]

    def after(self, update: int, metrics: dict[str, float]) -> None:
        """Let the running statistics take in what this update saw."""
        if self.statistics is not None:
            self.statistics.advance(self.run.processes)

    def guard(self, metrics: dict[str, float]) -> str | None:
        """Stop before the chosen side is forgotten, or the rejected one wrecked."""
        return self._guard(metrics)

    @property
    def state(self) -> dict[str, Stateful]:
        """Guard and running statistics."""
        kept: dict[str, Stateful] = {"guard": self._guard}
        return kept if self.statistics is None else {**kept, "statistics": self.statistics}

    def plan(self) -> list[str]:
        """Sizes, epochs, and beta as it counts."""
        config, objective, dims = self.config, self.config.objective, self.sizes.num_dims
        visits, ratio = config.learning.updates * config.pairs_per_update, self.beta / objective.default_beta(dims)
        return [
            f"{len(self.pairs)} pairs at {self.sizes.canvas} px, {visits / len(self.pairs):.1f} epochs",
            f"{objective.kind}: beta {self.beta:g} over {dims} dimensions, {ratio:.2g} times the paper's",
            *self.sizes.notes,
            *self.model.notes_on(self.pairs.prompts),
            left_out(self.pairs),
        ]

    @cached_property
    def identity(self) -> dict[str, str]:
        """Beta as it counts, and the pairs."""
        return {"beta": str(self.beta)} | pairs_identity(self.pairs)

    def previewed(self) -> PreviewOf:
        """The first prompts of the set, by a second-order solver at the pipeline's usual guidance."""
        shown = self.sizes.canvas, partial(self.sizes.first_originals, self.pairs)
        return PreviewOf(self.pairs.prompts, DPM_STEPS, usual_guidance(self.model), "dpm_solver", *shown)
