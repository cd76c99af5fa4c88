"""A pipeline of any family as a `DiffusionModel`.

A thin view: the pipeline's own text path encodes prompts, its own VAE encodes images, and its own scheduler
configuration says what the noise schedule is and how a sampler spaces its steps. Nothing is copied, so whatever is
trained is trained on the caller's pipeline.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, Literal, final

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor

from rpo.errors import InputError
from rpo.models import latents as autoencoder
from rpo.models.base import ORIGINAL, DiffusionModel, Family, Guidance
from rpo.models.captions import count_cut
from rpo.models.config import FrozenBase
from rpo.models.distilled import ASSISTANT, refuse_distilled
from rpo.models.execution import Attention, call, prepare_denoiser
from rpo.models.fingerprint import hash_adapters, hash_network
from rpo.models.frozen import WAITING, check_frozen_base, device_of, dtype_of, moved, offload
from rpo.models.loading import family_of, load_pipeline, plain
from rpo.models.plain import refuse_altered, refuse_strange
from rpo.models.sound import check_prediction_type, check_weights
from rpo.process.schedule import Process
from rpo.types import Canvas, Conditioning, Embedding, Grid, Images, Latents, Node, Output, PredictionType


@final
class Checkpoint:
    """A text-to-image pipeline behind the `DiffusionModel` protocol.

    Example:
        >>> model = Checkpoint.load("shapes")                      # doctest: +SKIP
        >>> model.encode_prompts(["a red circle"]).tokens.shape    # doctest: +SKIP
        torch.Size([1, 32, 96])

    Attributes:
        pipe: The pipeline that this is a view of; its UNet or transformer is the `denoiser`.
        family: What kind of pipeline it is.
        denoiser: The trainable network.
        schedule: The noise schedule, read from the pipeline's scheduler.
        prediction_type: What the denoiser puts out.
        num_train_timesteps: Length of the noise schedule, the unit of its timesteps.
        process: The noise schedule in continuous time.
        compute_dtype: What the denoiser computes in: autocast is on when it is a half type.
        guidance: How it is guided.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | ModularPipeline,
        *,
        compute_dtype: torch.dtype | None = None,
        allow_distilled: bool = False,
    ):
        """View `pipe` as a diffusion model.

        Args:
            pipe: Any pipeline of a known family, also a modular one with its components. It is not changed, except that
                its networks are frozen and put in evaluation mode, and that it can carry a LoRA, which few classes of
                diffusers cannot.
            compute_dtype: What the denoiser computes in; by default the type of its weights. bfloat16 over float32
                weights is mixed precision.
            allow_distilled: Take a checkpoint that draws in a few steps of another process as it is.

        Raises `InputError` if `pipe` is of another family, or is not what it says; see `check`.
        """
        pipe = plain(pipe)
        self.family: Family = family_of(pipe)
        self.allow_distilled = allow_distilled
        refuse_altered(pipe, self.family)
        self.family.enable_lora(pipe)
        self.pipe: Any = pipe
        self.denoiser: Any = pipe.components[self.family.denoiser]
        self.vae: Any = pipe.components[self.family.autoencoder]
        self.text_encoders: dict[str, Any] = {
            name: pipe.components[name] for name in self.family.text_encoders if pipe.components[name] is not None
        }
        self.guidance: Guidance = self.family.guidance
        self.schedule = self.family.schedule(pipe)
        self.prediction_type: PredictionType = self.schedule.prediction_type
        self.num_train_timesteps: int = self.schedule.num_train_timesteps
        self.process: Process = self.schedule.process
        self.weight_dtype: torch.dtype = dtype_of(self.denoiser)
        self.compute_dtype = compute_dtype or self.weight_dtype
        for network in (self.denoiser, self.vae, *self.text_encoders.values()):
            network.requires_grad_(False).eval()
        self.check()

    def check(self) -> None:
        """Refuse a pipeline that does not compute what its weights and configurations say, or whose are unsound.

        The constructor asks this; trainers ask again, for a pipeline can be altered in between.

        Raises:
            InputError: Naming what was switched on, wrapped or patched, or which number is wrong, and what to do.
        """
        if not self.allow_distilled and ASSISTANT not in (getattr(self.denoiser, "peft_config", None) or ()):
            refuse_distilled(self.name, self.pipe, self.family)
        refuse_altered(self.pipe, self.family)
        check_weights(self.pipe, self.family)
        refuse_strange(self.pipe, self.family, self.compute_dtype)
        check_prediction_type(self.pipe, self.family, self.schedule, self.compute_dtype)

    @classmethod
    def load(
        cls,
        source: str | PathLike[str] | DiffusionPipeline,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        config: str | PathLike[str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        attention: Attention = "sdpa",
        frozen_base: FrozenBase = "whole",
        compile_denoiser: bool = False,
        allow_distilled: bool = False,
    ) -> "Checkpoint":
        """Load a checkpoint.

        Args:
            source: A pipeline, a diffusers folder, a hub id, a single `.safetensors` / `.ckpt` file, or "shapes" for
                the checkpoint inside this package.
            compute_dtype: What the denoiser computes in; see the constructor.
            config: For a single file, a diffusers folder or hub id that tells its architecture (its family's first
                release by default).
            compile_denoiser: `compile` of `ModelConfig`, where all others are told, too.

        Raises `InputError` if the source is no checkpoint of a known family, or is incomplete.
        """
        told = {"config": config, "revision": revision, "variant": variant, "allow_distilled": allow_distilled}
        check_frozen_base(frozen_base, torch.device(device))
        pipe = load_pipeline(source, dtype=dtype, frozen_base=frozen_base, **told)
        if frozen_base == "offload":
            offload(pipe.components[family_of(pipe).denoiser], torch.device(device))
        model = cls(pipe.to(device), compute_dtype=compute_dtype, allow_distilled=allow_distilled)
        prepare_denoiser(
            model.denoiser,
            compute_dtype=model.compute_dtype,
            attention=attention,
            compile_denoiser=compile_denoiser,
        )
        return model

    @property
    def name(self) -> str:
        """The folder or hub id that the pipeline was loaded from; empty if it was built."""
        return str(self.pipe.name_or_path or "")

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Configuration of the pipeline's scheduler."""
        return self.schedule.config

    @property
    def text_dtype(self) -> torch.dtype:
        """What embeddings of prompts are of."""
        return next(iter(self.text_encoders.values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return device_of(self.denoiser)

    @property
    def canvas(self) -> Canvas:
        """The native size of an image."""
        (height, width), cell = self.family.native(self.pipe), self.family.cell(self.pipe)
        return Canvas(height * cell, width * cell)

    @property
    def cell(self) -> int:
        """Pixels along a side of one cell of the latents."""
        return self.family.cell(self.pipe)

    @property
    def side_unit(self) -> int:
        """Pixels of which the sides of an image have to be multiples: what a cell, or a patch of them, covers."""
        return self.cell * self.family.patch(self.pipe)

    def canvas_of(self, size: int | Sequence[int] | None) -> Canvas:
        """The canvas that a setting asks for: a side, (height, width), or nothing for the native one.

        Raises `InputError` if a side does not divide by what one cell of the denoiser covers.
        """
        height, width = self.canvas if size is None else (size, size) if isinstance(size, int) else size
        factor = self.side_unit
        if height < factor or width < factor or height % factor or width % factor:
            raise InputError(
                f"the size is {Canvas(height, width)}, but this checkpoint needs sides that are multiples of {factor}; "
                f"give another, or leave it out for its own, {self.canvas}"
            )
        return Canvas(height, width)

    def latent_shape(self, canvas: Canvas | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of one image; by default of a native one."""
        height, width = canvas or self.canvas
        cell = self.family.cell(self.pipe)
        return self.family.latent_channels(self.pipe), height // cell, width // cell

    def grid(self, num_steps: int, canvas: Canvas | None = None) -> Grid:
        """The nodes of a sampler of `num_steps` steps, spaced as the checkpoint's scheduler configuration says.

        Those of a discrete schedule equal the timesteps of `DDIMScheduler`. With "leading" spacing (Stable
        Diffusion's) each of its steps ends where the next begins, for any number of steps; with the other spacings that
        holds when `num_steps` divides the schedule. Those of a flow equal the sigmas of the pipeline's own call.

        Raises `InputError` if there are more steps than training timesteps, or fewer than one.
        """
        return self.schedule.grid(num_steps, self.sequence_length(canvas)).to(self.device)

    def flow_shift(self, num_steps: int, canvas: Canvas | None = None) -> float:
        """Of a flow model: s of its sampler's sigma = s t / (1 + (s - 1) t); 1 of any other."""
        return self.schedule.shift(num_steps, self.sequence_length(canvas))

    def sequence_length(self, canvas: Canvas | None = None) -> int:
        """Tokens of an image in the denoiser, or cells where it has none, by which some schedules shift."""
        (_, height, width), patch = self.latent_shape(canvas), self.family.patch(self.pipe)
        return (height // patch) * (width // patch)

    def node(self, timestep: Tensor) -> Node:
        """Schedule values at one training timestep per sample, shaped `[batch, 1, 1, 1]`."""
        return self.schedule.node(timestep)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], originals: Images | None = None) -> Embedding:
        """Text embeddings, exactly as the pipeline makes them; every prompt given is encoded.

        Prompts longer than the text encoder's context are cut with the pipeline's own warning.

        Args:
            originals: The image that each prompt edits, for text encoders that see it.
        """
        context, most = self.family.context(self.pipe), self.family.prompts_per_call
        if context.refuses_longer:
            count_cut(self.pipe, context, prompts)
        parts: list[Embedding] = []
        with moved(self.text_encoders.values(), self.device):
            for start in range(0, len(prompts), most):
                some = list(prompts[start : start + most])
                if originals is None:
                    parts.append(self.family.embed(self.pipe, some, self.device))
                else:
                    seen = originals[start : start + most].to(self.device)
                    parts.append(self.family.embed_with(self.pipe, some, seen, self.device))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def shown(self, latents: Latents) -> Latents:
        """What the network is shown of an image that it edits, of the mean of its scaled latents."""
        return self.family.shown(self.pipe, latents)

    def encode_prompts(
        self, prompts: Sequence[str], *, negative_prompt: str = "", originals: Images | None = None
    ) -> Conditioning:
        """Conditioning of each prompt, and of the image that it edits; a repeated prompt is encoded once.

        Args:
            prompts: One per image; may be empty strings.
            negative_prompt: What guidance moves away from, for every image; it has the original, too.
            originals: The image that each prompt edits, in [0, 1], as large as what is drawn; for an editing model.

        Raises `InputError` if there is no prompt, or one is not a string, or the model edits images and has none.
        """
        if self.family.edits == ("always" if originals is None else "never"):
            told = "images, but none was given" if originals is None else "no images, but some were given"
            raise InputError(f"{self.family.name} edits {told}; expected `originals` beside prompts of editors alone")
        strangers = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if isinstance(prompts, str) or not len(prompts) or strangers:
            what = f"a {type(strangers[0]).__name__} among them" if strangers else repr(prompts)
            raise InputError(
                f"prompts are {what}, but a non-empty list of strings is needed; give one string per image"
            )
        if originals is not None:
            return self._encode_edits(prompts, negative_prompt, originals)
        distinct = list(dict.fromkeys([negative_prompt, *prompts]))
        embeds = self.embed(distinct)
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[prompt] for prompt in prompts], device=embeds["tokens"].device)
        return Conditioning(
            {name: one[rows] for name, one in embeds.items()},
            {name: one[:1].expand(len(prompts), *one.shape[1:]) for name, one in embeds.items()},
        )

    def _encode_edits(self, prompts: Sequence[str], negative_prompt: str, originals: Images) -> Conditioning:
        shown = {ORIGINAL: self.shown(self.encode_moments(originals)[0])}
        texts = (self.embed(some, originals) for some in (prompts, [negative_prompt] * len(prompts)))
        return Conditioning(*({**one, **shown} for one in texts))

    def notes_on(self, prompts: Sequence[str]) -> list[str]:
        """What a plan has to say of prompts: those that the text encoders cut."""
        cut = count_cut(self.pipe, self.family.context(self.pipe), prompts)
        return [cut] if cut else []

    def predict(self, x_t: Latents, timestep: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Output:
        """Raw network output in float32.

        Args:
            x_t: Noisy latents.
            timestep: What the network is told: one number for the batch, or one per sample.
            cond: The prompts' conditioning, one row per latent.
            guidance_scale: 1 is no guidance and costs one forward; larger values cost two, batched, unless the network
                is told the scale.

        Raises `InputError` if `guidance_scale` is below 1.
        """
        if guidance_scale < 1:
            raise InputError(f"guidance_scale is {guidance_scale}, but it must be >= 1; 1 is no guidance, 7.5 is usual")
        if guidance_scale == 1 or self.guidance == "embedded":
            return self._forward(x_t, timestep, cond.prompt, guidance_scale)
        timesteps = timestep if timestep.ndim == 0 else torch.cat([timestep, timestep])
        negative_pred, prompt_pred = self._forward(torch.cat([x_t, x_t]), timesteps, cond.both().prompt).chunk(2)
        return self.guided(negative_pred, prompt_pred, guidance_scale)

    def guided(self, negative_pred: Output, prompt_pred: Output, guidance_scale: float) -> Output:
        """Classifier-free guidance as the family does it."""
        return self.family.guided(negative_pred, prompt_pred, guidance_scale)

    def _forward(self, x_t: Latents, timestep: Tensor, embedding: Embedding, guidance_scale: float = 1.0) -> Output:
        options = {"compute_dtype": self.compute_dtype, "guidance_scale": guidance_scale}
        return call(self.family, self.pipe, self.denoiser, x_t, timestep, embedding, **options)

    @torch.no_grad()
    def encode_moments(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the scaled latents' posterior, float32.

        Raises `InputError` if the images are not RGB in [0, 1], or their sides do not divide by a cell of the latents.
        """
        autoencoder.check_images(images, self.family.cell(self.pipe))
        with moved([self.vae], self.device), self._widened():
            return self.family.encode(self.pipe, images.to(self.device))

    def decode(self, latents: Latents) -> Images:
        """Images in [0, 1], float32, of scaled latents; with a gradient where the latents ask for one."""
        is_followed = torch.is_grad_enabled() and latents.requires_grad
        with torch.set_grad_enabled(is_followed), moved([self.vae], self.device), self._widened():
            chunks = latents.split(autoencoder.images_per_decode(latents[0, 0].numel() * self.cell**2))
            return torch.cat([self.family.decode(self.pipe, some) for some in chunks]).clamp(0, 1)

    def _widened(self) -> AbstractContextManager[None]:
        return autoencoder.widened(self.vae, is_on=self.family.widens_autoencoder)

    def denoiser_alone(self) -> AbstractContextManager[None]:
        """Inside, text encoders and autoencoder wait on the CPU, and come for each call that needs them."""
        return moved([self.vae, *self.text_encoders.values()], WAITING)

    def fingerprint(self, part: Literal["denoiser", "vae", "text"]) -> str:
        """A hash of everything that determines what one part computes: weights, types, configuration, tokenizer.

        Adapters of the denoiser do not count: its fingerprint is its base's.
        """
        if part != "text":
            network = self.vae if part == "vae" else self.denoiser
            return hash_network(network, dict(network.config), {"compute_dtype": str(self.compute_dtype)})
        hashes = [
            hash_network(network, network.config.to_dict(), {"tokenizer": self._vocabulary(name)})
            + hash_adapters(network)
            for name, network in self.text_encoders.items()
        ]
        return "/".join(hashes)

    def identity(self) -> dict[str, str]:
        """The parts that count for a run, as text by name; ask before anything is trained."""
        networks: dict[str, Any] = {self.family.denoiser: self.denoiser, "vae": self.vae}
        found = {f"base.{name}": hash_network(one, one.config, {})[:16] for name, one in networks.items()}
        for name, encoder in self.text_encoders.items():
            # The library writes its own version into the configuration, which is no other text encoder.
            config = {key: one for key, one in encoder.config.to_dict().items() if key != "transformers_version"}
            found[f"base.{name}"] = hash_network(encoder, config, {"tokenizer": self._vocabulary(name)})[:16]
        adapters = "".join(map(hash_adapters, (self.denoiser, *self.text_encoders.values())))
        found |= {"base.lora": hashlib.sha256(adapters.encode()).hexdigest()[:16]} if adapters else {}
        types = ", ".join(f"{name} {one.dtype}" for name, one in {"vae": self.vae, **self.text_encoders}.items())
        return found | {
            "vae.scaling_factor": str(self.vae.config.get("scaling_factor")),
            "dtype": f"{self.weight_dtype}, {types}",
            "compute_dtype": str(self.compute_dtype),
        }

    def _vocabulary(self, encoder: str) -> dict[str, Any]:
        tokenizer = self.pipe.components[encoder.replace("text_encoder", "tokenizer")]
        return {"vocab": tokenizer.get_vocab(), "max_length": tokenizer.model_max_length}


def refuse_editor(model: DiffusionModel, what: str) -> None:
    """Refuse a model that edits images, for what has prompts alone."""
    if isinstance(model, Checkpoint) and model.family.edits == "always":
        raise InputError(
            f"{model.family.name} edits images, but {what} has prompts alone; expected a text-to-image model: an "
            "editor learns from pairs of edits (`rpo train dpo`), and is judged by its edits"
        )
