"""From a micro-batch of pairs to the loss that the settings name: forwards, errors, the objective's terms.

One forward of the reference without gradient, unless nothing asks for it or its errors are known, then one forward of
the policy with gradient. The terms that need more than the batch come from `PairFacts` (what is known of each pair of
the set) and from running moments of what earlier updates saw.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.objectives.mapo import mapo
from rpo.objectives.preference import preference_loss, squared_error
from rpo.objectives.preference_metrics import pair_output
from rpo.objectives.region import region_mask
from rpo.objectives.unpaired import kto_losses
from rpo.objectives.winner_preserving import winner_preserving_scale
from rpo.trainers.pairs.batches import PairBatch
from rpo.trainers.pairs.errors import Denoised, denoise
from rpo.trainers.pairs.reference_errors import ReferenceErrors
from rpo.trainers.pairs.running_statistics import RunningMoments
from rpo.trainers.policy import Policy
from rpo.trainers.preference_config import PreferenceConfig
from rpo.trainers.region_config import RegionConfig
from rpo.training.processes import Processes
from rpo.types import StepOutput

SDXL_NUM_DIMS = 4 * 128 * 128
"""Latent dimensions that MaPO was tuned on."""

MAPO_TEMPERATURE = 1000.0

_TIME_DECAY = 0.99
_KTO_DECAY = 0.9  # its baseline follows the policy, which moves


@dataclass(frozen=True)
class PairFacts:
    """What the objective needs to know of every pair of the set, by its index."""

    score_gaps: Float[Tensor, " pairs"] | None = None
    """Chosen minus rejected score, in units of the set's mean gap."""
    context_scale: Float[Tensor, " pairs"] | None = None
    """phi of the pair's prompt."""


@dataclass(frozen=True)
class _Reference:
    """What the reference says: its errors, and its prediction where something compares with it."""

    errors: Float[Tensor, " twice_batch"]
    noise_pred: Float[Tensor, "twice_batch c h w"] | None = None


@final
class PreferenceLoss:
    """The loss of one run; called with each micro-batch.

    Attributes:
        moments: What has to survive a kill, if the objective has running moments.
    """

    def __init__(
        self,
        policy: Policy,
        config: PreferenceConfig,
        *,
        beta: float,
        sft_weight: float,
        region: RegionConfig | None = None,
        reference_errors: ReferenceErrors | None = None,
        facts: PairFacts | None = None,
    ):
        """Wire the terms.

        Args:
            reference_errors: Answers for the reference where draws repeat; None computes it.
            facts: What the margin and the scale need of the pairs.
        """
        self.policy, self.config, self.beta, self.sft_weight = policy, config, beta, sft_weight
        self.region = region or RegionConfig()
        self.facts = facts or PairFacts()
        self._kept = reference_errors
        self.moments: RunningMoments | None = None
        device = policy.parameters[0].device
        if "time" in (config.normalization, config.margin_from):
            self.moments = RunningMoments(config.time_bins, decay=_TIME_DECAY, device=device)
        elif config.method == "kto":
            self.moments = RunningMoments(1, decay=_KTO_DECAY, device=device)

    def __call__(self, batch: PairBatch) -> StepOutput:
        """The loss of a micro-batch, with the gradient on the policy only."""
        mask = self._mask(batch)
        reference = self._reference(batch, mask)
        denoised = denoise(self.policy.model, batch)
        errors = self._errors(denoised, mask)
        if self.config.method == "mapo":
            output = self._mapo(errors, denoised)
        elif self.config.method == "kto":
            output = self._kto(errors, reference)
        else:
            output = self._dpo(batch, errors, reference, denoised, mask)
        if mask is None:
            return output
        return self._in_region(output, denoised, reference, mask)

    def advance(self, processes: Processes) -> None:
        """Take in what this update saw; once per update, on every process."""
        if self.moments is not None:
            self.moments.advance(processes)

    def _mask(self, batch: PairBatch) -> Float[Tensor, "twice_batch 1 h w"] | None:
        if not self.region.is_on:
            return None
        assert batch.difference is not None
        region = self.region
        mask = region_mask(batch.difference, floor=region.floor, full_at=region.full_at, soften=region.soften)
        return torch.cat([mask, mask])

    def _errors(self, denoised: Denoised, mask: Tensor | None) -> Float[Tensor, " twice_batch"]:
        return squared_error(denoised.noise_pred, denoised.target, mask, reduction=self.config.reduction)

    def _reference(self, batch: PairBatch, mask: Tensor | None) -> _Reference | None:
        if not (self.config.needs_reference or self.region.needs_reference):
            return None

        def denoised(batch: PairBatch) -> Denoised:
            with self.policy.reference():
                return denoise(self.policy.model, batch)

        if self._kept is not None:
            return _Reference(self._kept.of(batch, lambda batch: self._errors(denoised(batch), mask)))
        answer = denoised(batch)
        return _Reference(self._errors(answer, mask), answer.noise_pred if self.region.needs_reference else None)

    def _dpo(
        self,
        batch: PairBatch,
        errors: Tensor,
        reference: _Reference | None,
        denoised: Denoised,
        mask: Tensor | None,
    ) -> StepOutput:
        config = self.config
        chosen, rejected = errors.chunk(2)
        reference_chosen, reference_rejected = reference.errors.chunk(2) if reference else (None, None)
        bins = self._bins(batch)
        relative_std = self._relative_std(reference.errors if reference else errors.detach(), bins)
        return preference_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=self.beta,
            link=config.link,
            time_weight=self._time_weight(errors, bins, relative_std),
            margin=self._margin(batch, errors, relative_std),
            is_margin_mixed=config.margin_mixed,
            reference_weight=config.reference_weight,
            context_scale=_of_pairs(self.facts.context_scale, batch, errors),
            rejected_gradient_scale=self._rejected_scale(denoised, mask),
            label_smoothing=config.label_smoothing,
            sft_weight=self.sft_weight,
        )

    def _bins(self, batch: PairBatch) -> Int[Tensor, " batch"]:
        times = self.policy.model.num_train_timesteps
        count = len(self.config.time_weights) or self.config.time_bins
        return (batch.timestep * count // times).long()

    def _relative_std(self, errors: Tensor, bins: Tensor) -> Float[Tensor, " batch"] | None:
        """How far errors usually lie apart at each pair's time, by earlier updates; this one is noted down."""
        if self.moments is None:
            return None
        chosen, rejected = errors.chunk(2)
        relative_std = self.moments.relative_std()[bins]
        self.moments.observe(chosen - rejected, bins)
        return relative_std

    def _time_weight(self, errors: Tensor, bins: Tensor, relative_std: Tensor | None) -> Tensor | None:
        if self.config.normalization == "weights":
            return torch.tensor(self.config.time_weights, dtype=errors.dtype, device=errors.device)[bins]
        return 1 / relative_std if self.config.normalization == "time" and relative_std is not None else None

    def _margin(self, batch: PairBatch, errors: Tensor, relative_std: Tensor | None) -> Tensor | float:
        """Gamma in units of z; the settings count it on the scale of the link's argument."""
        gamma = self.config.gamma / self.beta
        if gamma == 0:
            return 0.0
        if self.config.margin_from == "time":
            assert relative_std is not None
            return gamma * relative_std
        if self.config.margin_from == "rewards":
            gaps = _of_pairs(self.facts.score_gaps, batch, errors)
            assert gaps is not None
            return gamma * gaps
        return errors.new_full((len(batch.timestep),), gamma)

    def _rejected_scale(self, denoised: Denoised, mask: Tensor | None) -> Tensor | None:
        if self.config.winner_preserving is None:
            return None
        residual = denoised.noise_pred.detach() - denoised.target
        chosen, rejected = (residual if mask is None else mask * residual).chunk(2)
        return winner_preserving_scale(chosen, rejected, kept_share=self.config.winner_preserving)

    def _mapo(self, errors: Tensor, denoised: Denoised) -> StepOutput:
        chosen, rejected = errors.chunk(2)
        temperature = self.config.mapo_temperature
        if temperature is None:
            num_dims = denoised.target[0].numel()
            temperature = MAPO_TEMPERATURE * (num_dims / SDXL_NUM_DIMS) ** 0.5
        return mapo(chosen, rejected, beta=self.beta, slope=self.config.mapo_slope, temperature=temperature)

    def _kto(self, errors: Tensor, reference: _Reference | None) -> StepOutput:
        assert reference is not None
        assert self.moments is not None
        chosen, rejected = errors.chunk(2)
        reference_chosen, reference_rejected = reference.errors.chunk(2)
        is_chosen = torch.arange(len(errors), device=errors.device) < len(chosen)
        baseline = self.moments.mean()
        losses = kto_losses(
            errors,
            reference.errors,
            is_chosen,
            beta=self.beta,
            baseline=baseline,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        gain = (reference.errors - errors).detach()
        self.moments.observe(gain, torch.zeros_like(is_chosen, dtype=torch.long))
        favour = self.beta * (gain.chunk(2)[0] - gain.chunk(2)[1])
        references = (reference_chosen, reference_rejected)
        output = pair_output(losses.view(2, -1).mean(dim=0), 0.0, favour, (chosen, rejected), references)
        return replace(output, metrics=output.metrics | {"dpo/kl_baseline": self.beta * baseline.clamp(min=0)})

    def _in_region(
        self, output: StepOutput, denoised: Denoised, reference: _Reference | None, mask: Tensor
    ) -> StepOutput:
        metrics = {**output.metrics, "dpo/region": mask.mean()}
        if reference is None or reference.noise_pred is None:
            return replace(output, metrics=metrics)
        outside = squared_error(denoised.noise_pred, reference.noise_pred, 1 - mask, reduction=self.config.reduction)
        anchor = outside.view(2, -1).sum(dim=0)
        added = self.region.anchor * 0.5 * self.beta * anchor
        metrics |= {"dpo/anchor": anchor.mean().detach()}
        return StepOutput(output.loss + added.mean(), output.sample_losses + added.detach(), metrics)


def _of_pairs(values: Tensor | None, batch: PairBatch, like: Tensor) -> Float[Tensor, " batch"] | None:
    return None if values is None else values[list(batch.pairs)].to(like)
