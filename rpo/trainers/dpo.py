"""Diffusion-DPO (Wallace et al., arXiv:2311.12908) on a LoRA or on the whole denoiser.

For a pair (chosen w, rejected l), one time t and one noise eps for both sides:

    x_t  = alpha_t x_0 + sigma_t eps
    e    = mean over dimensions of (noise_pred(x_t, t, prompt) - target)²
    loss = -log sigmoid(-beta/2 [(e_w - e_w,ref) - (e_l - e_l,ref)])            eq. 14

Per micro-batch of N pairs: one forward of the reference without gradient on the stacked 2N latents, then one forward and one
backward of the policy. Putting policy and reference into one batch is slower, for backward then runs over the reference too.

Differs from the authors' code: mirroring is shared by the two sides of a pair; v-prediction checkpoints are trained on their own
target; the latents' posterior and the prompts are encoded once; and training stops when the chosen side is forgotten.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal, final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.data.cache import EmbeddingCache, LatentCache
from rpo.data.preference import PairSet
from rpo.data.transform import PairTransform
from rpo.diffusion.prediction import add_noise, from_x0_eps
from rpo.lora import ATTENTION_PROJECTIONS
from rpo.models.stable_diffusion import StableDiffusion
from rpo.objectives.preference import PAPER_BETA, PAPER_NUM_DIMS, beta_for_dims, diffusion_dpo, squared_error
from rpo.publish import CardFacts, PublishPlan, publish, write_model_card
from rpo.trainers.chosen_guard import ChosenGuard
from rpo.trainers.pair_batches import PairBatch, PairBatches, Share
from rpo.trainers.policy import FullPolicy, LoraPolicy, Policy
from rpo.trainers.reference_errors import ReferenceErrors
from rpo.training.loop import LoopConfig, TrainResult, fit
from rpo.training.processes import Processes
from rpo.types import Node, StepOutput


@dataclass(frozen=True)
class DPOConfig:
    """Settings of `DPOTrainer`; the defaults suit a LoRA on Stable Diffusion or on `shapes` with a few hundred pairs."""

    beta: float | None = None
    """Pull to the reference, > 0; larger stays closer. It counts errors averaged over the latents' dimensions, so a good value
    grows with their number: nothing takes the paper's 5000 for the 16,384 dimensions of SD 1.5 at 512 px, and in proportion for
    other sizes (78 for the 256 of `shapes`). Usual: half to four times that. Too small and images turn to noise."""

    sft_weight: float = 0.0
    """Weight of the chosen side's plain denoising loss, in units of beta/2. 0 is plain DPO; 0.05 to 0.5 keeps the chosen side in
    place and allows more updates."""

    max_chosen_error_ratio: float = 1.5
    """Training stops when the chosen side's error, smoothed, exceeds this many times the reference's: from there on DPO wins its
    margin by forgetting both sides. 1.1 to 2; `inf` never stops."""

    train: Literal["lora", "full"] = "lora"
    """A LoRA adapter, or all weights of the denoiser (which keeps a frozen copy as reference)."""

    rank: int = 16
    """Of the LoRA; 4 to 64."""

    lora_alpha: float | None = None
    """Strength of the LoRA; nothing means `rank`, the one value on which every program that loads LoRAs agrees."""

    target_modules: tuple[str, ...] = ATTENTION_PROJECTIONS
    """Name endings of the layers that get a LoRA; the attention projections by default."""

    pairs_per_update: int = 32
    """Pairs behind one optimiser step, over all processes and micro-batches. 32 to 256; the paper has 2048."""

    micro_batch: int = 8
    """Pairs at once on one process; lower it when memory runs out. `pairs_per_update` must be a multiple of it times the number of
    processes."""

    resolution: int | None = None
    """Side of the training images in pixels; nothing means the checkpoint's own."""

    crop: Literal["center", "random"] = "center"
    """Which square of an oblong image is used; the same for both sides of a pair of equal sizes."""

    flip: bool = False
    """Mirror half of the visits, both sides alike. Off, since it makes "left of" mean "right of" and writing unreadable."""

    caption_dropout: float = 0.2
    """Share of visits with an empty caption, which keeps classifier-free guidance usable; 0 to 0.2."""

    draws_per_pair: int | None = None
    """How many (noise, time) draws each pair has before they repeat; 4 to 32. With it, the reference's errors are kept on disk and
    later epochs and runs (other beta, other rate) skip the reference. Nothing: a new draw at every visit."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third slower, several times less memory."""

    cache_folder: str | None = None
    """Where latents, embeddings and reference errors are kept; share it between runs. Nothing means `cache` in the run's folder."""

    folder: str = "runs/dpo"
    """The run's folder: metrics, checkpoints and, after `save`, the LoRA."""

    seed: int = 0
    """Of the adapter's start, the order of pairs, times and noise."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    """How long and how fast to train; see `LoopConfig`. Its `accumulate` is worked out from `pairs_per_update`."""

    def __post_init__(self):
        """Refuse settings that no run can have.

        Raises:
            ValueError: Naming the field, its value and what it must be.
        """
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta is {self.beta}, but it must be > 0; 5000 is usual for SD 1.5, 80 to 200 for shapes")
        if not self.sft_weight >= 0:
            raise ValueError(f"sft_weight is {self.sft_weight}, but it must be >= 0; give 0 for plain Diffusion-DPO")
        if not self.max_chosen_error_ratio > 1:
            raise ValueError(
                f"max_chosen_error_ratio is {self.max_chosen_error_ratio}, but it must be > 1, where training starts; 1.5 is usual"
            )
        if self.pairs_per_update < 1 or self.micro_batch < 1:
            raise ValueError(
                f"pairs_per_update is {self.pairs_per_update} and micro_batch {self.micro_batch}, but both must be >= 1"
            )
        if self.draws_per_pair is not None and self.draws_per_pair < 1:
            raise ValueError(f"draws_per_pair is {self.draws_per_pair}, but it must be >= 1, or nothing for ever new draws")
        if self.loop.accumulate != 1:
            raise ValueError(
                f"loop.accumulate is {self.loop.accumulate}, but DPO works it out; set pairs_per_update and micro_batch"
            )


def share_of(config: DPOConfig, *, process: int, processes: int) -> Share:
    """This process's part of every update.

    Raises:
        ValueError: If `pairs_per_update` does not divide into micro-batches of all processes.
    """
    at_once = config.micro_batch * processes
    if config.pairs_per_update % at_once:
        per_process = config.pairs_per_update / processes
        fitting = [n for n in range(1, int(per_process) + 1) if per_process % n == 0]
        raise ValueError(
            f"pairs_per_update={config.pairs_per_update} is not a multiple of micro_batch={config.micro_batch} times {processes} "
            f"process(es); use a micro_batch of {', '.join(map(str, fitting)) or f'1 and a multiple of {processes} pairs'}"
        )
    return Share(config.micro_batch, config.pairs_per_update // at_once, process, processes)


def errors(model: StableDiffusion, batch: PairBatch) -> Tensor:
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
    return diffusion_dpo(
        chosen, rejected, reference_chosen, reference_rejected, beta=beta, sft_weight=sft_weight
    )


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

    def __init__(self, pipe: StableDiffusionPipeline | StableDiffusion, pairs: PairSet, config: DPOConfig | None = None):
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
        """
        # fp16 gradients of small errors vanish unless the loss is scaled; the model knows what it computes in.
        precision = "fp16" if self.model.compute_dtype == torch.float16 else self.config.loop.mixed_precision
        loop = replace(self.config.loop, accumulate=self.share.accumulate, mixed_precision=precision)
        guard = ChosenGuard(self.config.max_chosen_error_ratio)
        self._say(self.plan())
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
                state={"guard": guard},
                guard=guard,
            )
        finally:
            self.model.denoiser.eval()

    def plan(self) -> str:
        """What the run comes to, in a few lines: sizes, epochs, and beta as it counts."""
        share, updates = self.share, self.config.loop.updates
        epochs = updates * self.config.pairs_per_update / len(self.pairs)
        per_dim, paper = self.beta / self.num_dims, PAPER_BETA / PAPER_NUM_DIMS
        trained = sum(parameter.numel() for parameter in self.policy.parameters)
        return "\n".join(
            [
                f"Diffusion-DPO, {self.config.train}: {trained:,} parameters on {self.model.device}, {self.model.compute_dtype}",
                f"  {len(self.pairs)} pairs at {self.resolution} px; {share.micro_batch} × {share.accumulate} micro-batches × "
                f"{share.processes} processes = {self.config.pairs_per_update} pairs per update; {updates} updates = "
                f"{epochs:.1f} epochs",
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
        return CardFacts(base_model=self.model.pipe.name_or_path, method="Diffusion-DPO", settings=asdict(self.config))

    def _say(self, text: str) -> None:
        if self._is_main and self.config.loop.progress:
            tqdm.write(text)


def _policy(model: StableDiffusion, config: DPOConfig) -> Policy:
    if config.train == "full":
        return FullPolicy(model)
    return LoraPolicy(
        model, rank=config.rank, alpha=config.lora_alpha, target_modules=config.target_modules, seed=config.seed
    )
