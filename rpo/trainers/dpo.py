"""Diffusion-DPO (Wallace et al., arXiv:2311.12908) on a LoRA or on the whole denoiser.

For a pair (chosen w, rejected l), one time t and one noise eps for both sides:

    x_t  = alpha_t x_0 + sigma_t eps
    e    = mean over dimensions of (noise_pred(x_t, t, prompt) - target)²
    loss = -log sigmoid(-beta/2 [(e_w - e_w,ref) - (e_l - e_l,ref)])            eq. 14

Per micro-batch of N pairs: one forward of the reference without gradient on the stacked 2N latents, then one forward
and one backward of the policy. Putting policy and reference into one batch is slower, for backward then runs over the
reference too.

Differs from the authors' code: mirroring is shared by the two sides of a pair; v-prediction checkpoints are trained on
their own target; the latents' posterior and the prompts are encoded once; and training stops when the chosen side is
forgotten. `config.objective` names another member of the family (`rpo.trainers.preference_config`), `config.region`
weights errors by where the two images differ.
"""

from contextlib import AbstractContextManager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.data.cache import EmbeddingCache, LatentCache
from rpo.data.differences import PairDifferences
from rpo.data.preference import pairs_identity
from rpo.data.readers import PairSource, pairs_from
from rpo.data.readthrough import Memory
from rpo.data.transform import PairTransform
from rpo.models.checkpoint import Checkpoint
from rpo.publishing.publish import PublishPlan, publish, write_model_card
from rpo.text import write_text
from rpo.trainers.checks.prepared import loop_for, prepared_pipeline
from rpo.trainers.dpo_config import DPOConfig, describe_objective, identity, share_of
from rpo.trainers.identity import base_identity, card_of
from rpo.trainers.pairs.batches import PairBatch, PairBatches
from rpo.trainers.pairs.errors import errors
from rpo.trainers.pairs.facts import mid_time_errors, pair_facts, require_scores, set_notes
from rpo.trainers.pairs.guard import ChosenGuard
from rpo.trainers.pairs.loss import PreferenceLoss
from rpo.trainers.pairs.reference_errors import ReferenceErrors
from rpo.trainers.policy import Policy, make_policy
from rpo.trainers.preference_config import PreferenceConfig
from rpo.training.loop import TrainResult, describe, fit
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes
from rpo.training.resume import claimed
from rpo.types import StepOutput


def loss(
    batch: PairBatch,
    *,
    policy: Policy,
    beta: float,
    sft_weight: float,
    reference_errors: ReferenceErrors | None = None,
) -> StepOutput:
    """The Diffusion-DPO loss of a micro-batch, with the gradient on the policy only.

    Args:
        reference_errors: Answers for the reference where draws repeat; None computes it.
    """
    plain = PreferenceConfig()
    return PreferenceLoss(policy, plain, beta=beta, sft_weight=sft_weight, reference_errors=reference_errors)(batch)


@final
class DPOTrainer:
    """Aligns a pipeline with preference pairs by Diffusion-DPO.

    Afterwards `pipe` itself carries the adapter, active.

    Example:
        >>> trainer = DPOTrainer(pipe, read_pairs("pairs"), DPOConfig(folder="runs/mine"))    # doctest: +SKIP
        >>> trainer.train()                                                                   # doctest: +SKIP
        >>> trainer.save("runs/mine/lora")                                                    # doctest: +SKIP

    Attributes:
        model: The pipeline as a diffusion model.
        config: The settings.
        policy: What is trained.
        objective: Which preference objective is trained.
        beta: The beta in force, worked out from the latent size if the settings leave it open.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | Checkpoint,
        pairs: PairSource,
        config: DPOConfig | None = None,
    ):
        """Check everything that can be checked before the first update, and add the adapter.

        Args:
            pipe: The pipeline to train, on the device to train on.
            pairs: The preference set, or what `read_pairs` reads one from.
            config: The settings.

        Raises:
            ValueError: If the pipeline, the set or the settings cannot be trained with; says which and why.
        """
        self.config = config or DPOConfig()
        self.model = prepared_pipeline(pipe, self.config.loop)
        self.pairs = pairs = pairs_from(pairs)
        self._processes = Processes()
        self.share = share_of(self.config, process=self._processes.index, processes=self._processes.count)
        self.canvas = self.model.canvas_of(self.config.resolution)
        channels, *self._grid = self.model.latent_shape(self.canvas)
        self.num_dims = channels * self._grid[0] * self._grid[1]
        self.objective = self.config.objective
        require_scores(pairs, self.objective)
        self.beta = self.config.beta or self.objective.default_beta(self.num_dims)
        self._base = base_identity(self.model)
        self.policy = make_policy(self.model, self.config.adapter, seed=self.config.seed)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.folder)

    def train(self, *, resume: bool = False) -> TrainResult:
        """Run all updates.

        Args:
            resume: Continue a killed run in the same folder; on the CPU it ends in the same weights, bit for bit.

        Returns:
            How it ended; `stopped_because` is set if the guard on the chosen side's error ended it early.

        Raises:
            NonFiniteLossError: A loss is not finite; names the records, and the last good state is kept.
            ValueError: The folder is in use, or holds another run already; says which and what differs.
        """
        loop = self._loop
        guard = ChosenGuard(self.config.max_chosen_error_ratio, starts_at_zero=self.objective.starts_at_zero)
        with self.claim(resume=resume):
            if self._processes.is_main and loop.progress:
                tqdm.write(self.plan())
            if self.config.encode_ahead:
                self.batches.fill_caches(loop.updates, progress=loop.progress and self._processes.is_main)
            step_loss = self._loss()
            self.model.denoiser.train(self.config.gradient_checkpointing)  # diffusers checkpoints in training mode only
            try:
                return fit(
                    self.batches,
                    step_loss,
                    self.policy.parameters,
                    loop,
                    folder=self.folder,
                    names=lambda batch: batch.names,
                    resume=resume,
                    state={"guard": guard} | ({} if step_loss.moments is None else {"moments": step_loss.moments}),
                    identity=self.identity,
                    on_update=None if step_loss.moments is None else lambda *_: step_loss.advance(Processes()),
                    guard=guard,
                )
            finally:
                self.model.denoiser.eval()

    def claim(self, *, resume: bool) -> AbstractContextManager[None]:
        """Inside, the run's folder belongs to this run; refused before anything in it is touched."""
        return claimed(self.folder, self._loop, self.identity, self._processes, resume=resume)

    def plan(self) -> str:
        """What the run comes to, in a few lines: sizes, epochs, and beta as it counts."""
        share, epochs = self.share, self._loop.updates * self.config.pairs_per_update / len(self.pairs)
        trained = sum(parameter.numel() for parameter in self.policy.parameters)
        return "\n".join(
            [
                f"{self.objective.title}, {self.config.train}: {trained:,} parameters on {self.model.device}, "
                f"{self.model.compute_dtype}; {len(self.pairs)} pairs at {self.canvas} px",
                f"  {describe(self._loop, share.micro_batch, share.processes, unit='pairs')}, {epochs:.1f} epochs",
                f"  {describe_objective(self.config, beta=self.beta, num_dims=self.num_dims)}",
                *set_notes(self.model, self.pairs),
            ]
        )

    def save(self, folder: str | PathLike[str] | None = None) -> Path:
        """Write what was trained, verified, with a model card and the settings.

        Args:
            folder: Where to; `lora` (or `pipeline`) in the run's folder by default.

        Returns:
            The folder: `pipe.load_lora_weights(folder)` reads it.

        Raises:
            ValueError: If the saved file does not reproduce the live model, or the adapter changes nothing.
        """
        place = Path(folder) if folder else self.folder / ("lora" if self.config.train == "lora" else "pipeline")
        if self._processes.is_main:
            self.policy.save(place)
            write_text(place / "training_config.yaml", to_yaml(self.config, for_others=True))
            card = card_of(self.model, self.objective.title, self.config, is_lora=self.config.train == "lora")
            write_model_card(place, card)
        return place

    def publish(self, repo_id: str, *, push: bool = False, private: bool = True) -> PublishPlan:
        """Save and say what publishing would upload; upload it with `push=True`.

        Args:
            repo_id: "owner/name" on the Hugging Face Hub.
            push: Really upload; needs `hf auth login`.
            private: Whether a new repository is private.
        """
        return publish(self.save(), repo_id, push=push, private=private)

    @cached_property
    def _loop(self) -> LoopConfig:
        return loop_for(self.model, self.config.loop, accumulate=self.share.accumulate)

    @property
    def _cache(self) -> Path:
        return Path(self.config.cache_folder or self.folder / "cache")

    @cached_property
    def batches(self) -> PairBatches:
        """The micro-batches; their caches are opened here, so that a refused run opens none."""
        config, model, cache, memory = self.config, self.model, self._cache, Memory()
        return PairBatches(
            model,
            self.pairs,
            transform=PairTransform(self.canvas, crop=config.crop, flip=config.flip),
            share=self.share,
            latents=LatentCache(
                cache,
                encode=model.encode_moments,
                model_key=model.fingerprint("vae"),
                dtype=getattr(torch, config.cache_dtype),
                batch_size=config.encode_batch,
                memory=memory,
            ),
            embeddings=EmbeddingCache(
                cache,
                encode=model.embed,
                model_key=model.fingerprint("text"),
                dtype=model.text_dtype,
                batch_size=config.encode_batch,
                memory=memory,
            ),
            caption_dropout=config.caption_dropout,
            draws_per_pair=config.draws_per_pair,
            seed=config.seed,
            differences=PairDifferences(cache, grid=(self._grid[0], self._grid[1]), memory=memory)
            if config.region.is_on
            else None,
        )

    @cached_property
    def _reference_errors(self) -> ReferenceErrors | None:
        is_kept = self.config.draws_per_pair is not None
        return self._kept_reference_errors(self.config.region.key, self.objective.reduction) if is_kept else None

    def _loss(self) -> PreferenceLoss:
        return PreferenceLoss(
            self.policy,
            self.objective,
            beta=self.beta,
            sft_weight=self.config.sft_weight,
            region=self.config.region,
            reference_errors=self._reference_errors if self.objective.needs_reference else None,
            facts=pair_facts(self.pairs, self.objective, self._mid_time_errors),
        )

    def _mid_time_errors(self) -> Tensor:
        def under_reference(batch: PairBatch) -> Tensor:
            with self.policy.reference():
                return errors(self.model, batch)

        return mid_time_errors(self.batches, self._kept_reference_errors(), under_reference, Processes())

    def _kept_reference_errors(self, region: str = "", reduction: str = "mean") -> ReferenceErrors:
        weighting = [f"{reduction} {region}"] if region or reduction != "mean" else []
        return ReferenceErrors(self._cache, "/".join([str(sorted(self._base.items())), *weighting]))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What decides about the result; how long a run is, where it lies and when it encodes may change."""
        return identity(self.config) | {"beta": str(self.beta)} | self._base | pairs_identity(self.pairs)
