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
forgotten.
"""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.data.cache import EmbeddingCache, LatentCache
from rpo.data.preference import PairSet
from rpo.data.transform import PairTransform
from rpo.diffusion.prediction import add_noise, from_x0_eps
from rpo.models.base import DiffusionModel
from rpo.models.stable_diffusion import StableDiffusion
from rpo.objectives.preference import PAPER_BETA, PAPER_NUM_DIMS, beta_for_dims, diffusion_dpo, squared_error
from rpo.publish import CardFacts, PublishPlan, publish, write_model_card
from rpo.trainers.chosen_guard import ChosenGuard
from rpo.trainers.dpo_config import DPOConfig, share_of
from rpo.trainers.pair_batches import PairBatch, PairBatches
from rpo.trainers.policy import FullPolicy, LoraPolicy, Policy
from rpo.trainers.reference_errors import ReferenceErrors
from rpo.training.loop import TrainResult, describe, fit
from rpo.training.processes import Processes
from rpo.training.session import refuse_used
from rpo.training.unchanged import Unchanged
from rpo.types import Node, StepOutput


def errors(model: DiffusionModel, batch: PairBatch) -> Tensor:
    """Squared error of each of the 2N latents, all chosen sides first: one denoiser forward."""
    timestep, eps = torch.cat([batch.timestep, batch.timestep]), torch.cat([batch.eps, batch.eps])
    node: Node = model.node(timestep)
    cond = batch.conditioning.select(torch.arange(len(timestep), device=timestep.device) % len(batch.timestep))
    x_t = add_noise(batch.x_0, eps, node)
    target = from_x0_eps(batch.x_0, eps, node, model.prediction_type)
    return squared_error(model.predict(x_t, timestep, cond), target)


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
        batch: N pairs.
        policy: What is trained, and its reference.
        beta: See `diffusion_dpo`.
        sft_weight: See `diffusion_dpo`.
        reference_errors: Answers for the reference where draws repeat; None computes it.
    """

    def under_reference(batch: PairBatch) -> Tensor:
        with policy.reference():
            return errors(policy.model, batch)

    known = reference_errors.of(batch, under_reference) if reference_errors else under_reference(batch)
    reference_chosen, reference_rejected = known.chunk(2)
    chosen, rejected = errors(policy.model, batch).chunk(2)
    return diffusion_dpo(chosen, rejected, reference_chosen, reference_rejected, beta=beta, sft_weight=sft_weight)


@final
class DPOTrainer:
    """Aligns a Stable Diffusion pipeline with preference pairs by Diffusion-DPO.

    Afterwards `pipe` itself carries the adapter, active.

    Example:
        >>> trainer = DPOTrainer(pipe, read_pairs("pairs"), DPOConfig(folder="runs/mine"))    # doctest: +SKIP
        >>> trainer.train()                                                                   # doctest: +SKIP
        >>> trainer.save("runs/mine/lora")                                                    # doctest: +SKIP

    Attributes:
        model: The pipeline as a diffusion model.
        config: The settings.
        policy: What is trained.
        beta: The beta in force, worked out from the latent size if the settings leave it open.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline | StableDiffusion, pairs: PairSet, config: DPOConfig | None = None
    ):
        """Check everything that can be checked before the first update, and add the adapter.

        Args:
            pipe: The pipeline to train, on the device to train on.
            pairs: The preference set; see `read_pairs`.
            config: The settings.

        Raises:
            ValueError: If the pipeline, the set or the settings cannot be trained with; says which and why.
        """
        self.config = config or DPOConfig()
        self.model = pipe if isinstance(pipe, StableDiffusion) else StableDiffusion(pipe)
        self.pairs = pairs
        if not len(pairs):
            raise ValueError("the preference set is empty, but at least one pair is needed; see `rpo data check`")
        processes = Processes()
        self._is_main = processes.is_main
        self.share = share_of(self.config, process=processes.index, processes=processes.count)
        self.resolution = self.config.resolution or self.model.image_size
        self.num_dims = self.model.latent_shape[0] * (self.resolution // self.model.pipe.vae_scale_factor) ** 2
        self.beta = self.config.beta or beta_for_dims(self.num_dims)
        base_key = self.model.fingerprint("denoiser") if self.config.draws_per_pair else ""
        self.policy = _policy(self.model, self.config)
        self.batches = self._batches()
        self._reference_errors = self._kept_reference_errors(base_key)
        if self.config.gradient_checkpointing:
            self.model.denoiser.enable_gradient_checkpointing()

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
            ValueError: The folder holds another run already.
        """
        if not resume:
            refuse_used(self.folder)
        # fp16 gradients of small errors vanish unless the loss is scaled; the model knows what it computes in.
        precision = "fp16" if self.model.compute_dtype == torch.float16 else self.config.loop.mixed_precision
        loop = replace(self.config.loop, accumulate=self.share.accumulate, mixed_precision=precision)
        guard = ChosenGuard(self.config.max_chosen_error_ratio)
        self._say(self.plan())
        if self.config.encode_ahead:
            self.batches.fill_caches(loop.updates, progress=loop.progress and self._is_main)
        self.model.denoiser.train(self.config.gradient_checkpointing)  # diffusers checkpoints in training mode only
        try:
            return fit(
                self.batches,
                partial(
                    loss,
                    policy=self.policy,
                    beta=self.beta,
                    sft_weight=self.config.sft_weight,
                    reference_errors=self._reference_errors,
                ),
                self.policy.parameters,
                loop,
                folder=self.folder,
                names=lambda batch: batch.names,
                resume=resume,
                state={"guard": guard, "settings": Unchanged(self._identity())},
                guard=guard,
            )
        finally:
            self.model.denoiser.eval()

    def plan(self) -> str:
        """What the run comes to, in a few lines: sizes, epochs, and beta as it counts."""
        share, loop = self.share, replace(self.config.loop, accumulate=self.share.accumulate)
        epochs = loop.updates * self.config.pairs_per_update / len(self.pairs)
        per_dim, paper = self.beta / self.num_dims, PAPER_BETA / PAPER_NUM_DIMS
        trained = sum(parameter.numel() for parameter in self.policy.parameters)
        return "\n".join(
            [
                f"Diffusion-DPO, {self.config.train}: {trained:,} parameters on {self.model.device}, "
                f"{self.model.compute_dtype}; {len(self.pairs)} pairs at {self.resolution} px",
                f"  {describe(loop, share.micro_batch, share.processes, unit='pairs')}, {epochs:.1f} epochs",
                f"  beta {self.beta:g} over {self.num_dims} latent dimensions = {per_dim:.3f} per dimension "
                f"({per_dim / paper:.2g} times the paper's); loss starts at log 2 = 0.693",
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
            OSError: If it cannot be written.
        """
        place = Path(folder) if folder else self.folder / ("lora" if self.config.train == "lora" else "pipeline")
        if self._is_main:
            self.policy.save(place)
            (place / "training_config.yaml").write_text(to_yaml(self.config))
            write_model_card(place, self._card())
        return place

    def publish(self, repo_id: str, *, push: bool = False, private: bool = True) -> PublishPlan:
        """Save and say what publishing would upload; upload it with `push=True`.

        Args:
            repo_id: "owner/name" on the Hugging Face Hub.
            push: Really upload; needs `hf auth login`.
            private: Whether a new repository is private.
        """
        return publish(self.save(), repo_id, push=push, private=private)

    def _batches(self) -> PairBatches:
        config, model = self.config, self.model
        cache = Path(config.cache_folder or self.folder / "cache")
        return PairBatches(
            model,
            self.pairs,
            transform=PairTransform(self.resolution, crop=config.crop, flip=config.flip),
            share=self.share,
            latents=LatentCache(cache, encode=model.encode_moments, model_key=model.fingerprint("vae")),
            embeddings=EmbeddingCache(
                cache,
                encode=lambda prompts: model.encode_text(prompts).cpu(),
                model_key=model.fingerprint("text"),
                dtype=model.text_encoder.dtype,
            ),
            caption_dropout=config.caption_dropout,
            draws_per_pair=config.draws_per_pair,
            seed=config.seed,
        )

    def _kept_reference_errors(self, base_key: str) -> ReferenceErrors | None:
        if self.config.draws_per_pair is None:
            return None
        parts = (base_key, self.model.fingerprint("vae"), self.model.fingerprint("text"), self.model.prediction_type)
        cache = Path(self.config.cache_folder or self.folder / "cache")
        return ReferenceErrors(cache, "/".join(parts))

    def _card(self) -> CardFacts:
        return CardFacts(
            base_model=str(self.model.pipe.name_or_path or "") or None,
            method="Diffusion-DPO",
            settings=asdict(self.config),
        )

    def _identity(self) -> dict[str, str]:
        """What decides about the result; how long a run is, where it lies and when it encodes may change."""
        free = {"loop", "folder", "cache_folder", "encode_ahead"}
        settings = {name: str(value) for name, value in asdict(self.config).items() if name not in free}
        prompts = hashlib.sha256("\n".join(pair.prompt for pair in self.pairs).encode()).hexdigest()
        return settings | {"beta": str(self.beta), "pairs": f"{len(self.pairs)} (prompts {prompts[:12]})"}

    def _say(self, text: str) -> None:
        if self._is_main and self.config.loop.progress:
            tqdm.write(text)


def _policy(model: StableDiffusion, config: DPOConfig) -> Policy:
    if config.train == "full":
        return FullPolicy(model)
    return LoraPolicy(
        model, rank=config.rank, alpha=config.lora_alpha, target_modules=config.target_modules, seed=config.seed
    )
