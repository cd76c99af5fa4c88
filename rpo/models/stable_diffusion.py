"""Stable Diffusion 1.x and 2.x (epsilon or v-prediction) as a `DiffusionModel`.

A thin view of a `StableDiffusionPipeline`: the pipeline's own text path encodes prompts, its own VAE encodes images,
and its own scheduler configuration says what the noise schedule is and how a sampler spaces its steps. Nothing is
copied, so whatever is trained is trained on the caller's pipeline.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, final

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.errors import InputError
from rpo.models.base import guided
from rpo.models.execution import Attention, prepare_denoiser
from rpo.models.fingerprint import hash_network
from rpo.models.loading import check_pipeline, load_pipeline
from rpo.models.plain import refuse_strange
from rpo.models.sound import check_prediction_type, check_weights, noise_schedule
from rpo.process.grid import vp_grid, vp_node
from rpo.process.schedule import VariancePreserving
from rpo.types import Conditioning, Grid, Images, Latents, Node, PredictionType

PROMPTS_PER_CALL = 256
"""Prompts that go through the text encoder at once: bounds memory, far above where a GPU is full."""

IMAGES_PER_DECODE = 32
"""Latents that go through the VAE decoder at once: its activations are the largest of the whole pipeline."""

IMAGE_DIMS, RGB = 4, 3
"""Of a batch of images: how many dimensions, and the size of the second."""


@final
class StableDiffusion:
    """A Stable Diffusion checkpoint behind the `DiffusionModel` protocol.

    Example:
        >>> model = StableDiffusion.load("shapes")                       # doctest: +SKIP
        >>> model.encode_prompts(["a red circle"]).prompt_embeds.shape   # doctest: +SKIP
        torch.Size([1, 32, 96])

    Attributes:
        pipe: The pipeline that this is a view of; its UNet is the `denoiser`.
        denoiser: The trainable network.
        prediction_type: What the UNet puts out.
        num_train_timesteps: Length of the noise schedule.
        process: The noise schedule in continuous time.
        compute_dtype: What the UNet computes in: autocast is on when it is a half type.
    """

    def __init__(self, pipe: StableDiffusionPipeline, *, compute_dtype: torch.dtype | None = None):
        """View `pipe` as a diffusion model.

        Args:
            pipe: Any Stable Diffusion 1.x or 2.x text-to-image pipeline. It is not changed, except that its networks
                are frozen and put in evaluation mode.
            compute_dtype: What the UNet computes in; by default the type of its weights. bfloat16 over float32 weights
                is mixed precision.

        Raises:
            ValueError: If `pipe` is another family (SDXL, inpainting, …), or is not what its weights and configurations
                say; see `check`.
        """
        check_pipeline(pipe)
        self.pipe = pipe
        self.denoiser: UNet2DConditionModel = pipe.unet
        self.vae: AutoencoderKL = pipe.vae
        self.text_encoder: CLIPTextModel = pipe.text_encoder
        self.tokenizer: CLIPTokenizer = pipe.tokenizer
        self.scheduler = noise_schedule(pipe.scheduler)
        self.prediction_type: PredictionType = self.scheduler.config["prediction_type"]
        self.num_train_timesteps: int = self.scheduler.config["num_train_timesteps"]
        final_alpha_cumprod = float(self.scheduler.final_alpha_cumprod)
        self.process = VariancePreserving(self.scheduler.alphas_cumprod, final_alpha_cumprod)
        self.weight_dtype = self.denoiser.conv_in.weight.dtype
        self.compute_dtype = compute_dtype or self.weight_dtype
        for network in (self.denoiser, self.vae, self.text_encoder):
            network.requires_grad_(False).eval()
        self.check()

    def check(self) -> None:
        """Refuse a pipeline that does not compute what its weights and configurations say, or whose are unsound.

        The constructor asks this; trainers ask again, for a pipeline can be altered in between.

        Raises:
            ValueError: Naming what was switched on, wrapped or patched, or which number is wrong, and what to do.
        """
        check_pipeline(self.pipe)
        check_weights(self.pipe)
        refuse_strange(self.pipe, self.compute_dtype)
        check_prediction_type(self.pipe, self.scheduler, self.compute_dtype)

    @classmethod
    def load(
        cls,
        source: str | PathLike[str] | StableDiffusionPipeline,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        config: str | PathLike[str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        attention: Attention = "sdpa",
        channels_last: bool = False,
        compile_denoiser: bool = False,
    ) -> "StableDiffusion":
        """Load a checkpoint.

        Args:
            source: A pipeline, a diffusers folder, a hub id, a single `.safetensors` / `.ckpt` file, or "shapes" for
                the checkpoint inside this package.
            device: Where to put it.
            dtype: Of all weights. A half type halves memory; adapters stay float32 all the same.
            compute_dtype: See the constructor.
            config: For a single file, a diffusers folder or hub id that tells its architecture (SD 1.5's by default).
            revision: Of a hub id.
            variant: File variant, such as "fp16".
            attention: "sdpa" (torch's own, the default) or "xformers"; the latter falls back to the former with a
                warning where its kernels do not run.
            channels_last: Memory format of the UNet; helps convolutions on CUDA tensor cores.
            compile_denoiser: Compile the UNet with `torch.compile` on first use; pays off in long runs on CUDA.

        Raises:
            ValueError: If the source is no Stable Diffusion 1.x/2.x text-to-image checkpoint, or is incomplete.
        """
        pipe = load_pipeline(source, dtype=dtype, config=config, revision=revision, variant=variant)
        model = cls(pipe.to(device), compute_dtype=compute_dtype)
        prepare_denoiser(
            model.denoiser,
            compute_dtype=model.compute_dtype,
            attention=attention,
            channels_last=channels_last,
            compile_denoiser=compile_denoiser,
        )
        return model

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.denoiser.conv_in.weight.device

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Configuration of the pipeline's scheduler."""
        return self.scheduler.config

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent at the checkpoint's native resolution."""
        size = self.denoiser.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config["in_channels"], height, width

    @property
    def image_size(self) -> int:
        """Side of a native image in pixels."""
        return self.latent_shape[-1] * self.pipe.vae_scale_factor

    def grid(self, num_steps: int) -> Grid:
        """The nodes of a DDIM sampler of `num_steps` steps, spaced as the checkpoint's scheduler configuration says.

        Equals the timesteps of `DDIMScheduler`. With "leading" spacing (Stable Diffusion's) each of its steps ends
        where the next begins, for any number of steps; with the other spacings that holds when `num_steps` divides the
        schedule.

        Raises:
            ValueError: If there are more steps than training timesteps, or fewer than one.
        """
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise InputError(
                f"num_steps is {num_steps}, but this checkpoint has {self.num_train_timesteps} timesteps; ask for 1 to "
                f"{self.num_train_timesteps} (20 to 50 are usual)"
            )
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_steps)
        grid = vp_grid(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))
        return Grid(grid.alpha.to(self.device), grid.sigma.to(self.device), grid.timestep.to(self.device))

    def node(self, timestep: Tensor) -> Node:
        """Schedule values at one training timestep per sample, shaped `[batch, 1, 1, 1]`."""
        if self.scheduler.alphas_cumprod.device != timestep.device:
            self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(timestep.device)
        return vp_node(self.scheduler.alphas_cumprod, timestep)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings `[prompts, tokens, dim]`, exactly as the pipeline makes them; every prompt given is encoded.

        Prompts longer than the text encoder's context are cut with the pipeline's own warning.
        """
        chunks = [list(prompts[i : i + PROMPTS_PER_CALL]) for i in range(0, len(prompts), PROMPTS_PER_CALL)]
        return torch.cat([self.pipe.encode_prompt(chunk, self.device, 1, False)[0] for chunk in chunks])

    def encode_prompts(self, prompts: Sequence[str], *, negative_prompt: str = "") -> Conditioning:
        """Conditioning of each prompt; a repeated prompt is encoded once.

        Args:
            prompts: One per image; may be empty strings.
            negative_prompt: What guidance moves away from, for every image.

        Raises:
            ValueError: If there is no prompt, or one is not a string.
        """
        strangers = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if isinstance(prompts, str) or not len(prompts) or strangers:
            what = f"a {type(strangers[0]).__name__} among them" if strangers else repr(prompts)
            raise InputError(
                f"prompts are {what}, but a non-empty list of strings is needed; give one string per image"
            )
        distinct = list(dict.fromkeys([negative_prompt, *prompts]))
        embeds = self.encode_text(distinct)
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[prompt] for prompt in prompts], device=embeds.device)
        return Conditioning(embeds[rows], embeds[:1].expand(len(prompts), -1, -1))

    def predict(self, x_t: Latents, timestep: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Latents:
        """Raw network output in float32.

        Args:
            x_t: Noisy latents.
            timestep: What the UNet is told: one number for the batch, or one per sample.
            cond: The prompts' conditioning, one row per latent.
            guidance_scale: 1 is no guidance and costs one forward; larger values cost two, batched.

        Raises:
            ValueError: If `guidance_scale` is below 1.
        """
        if guidance_scale < 1:
            raise InputError(f"guidance_scale is {guidance_scale}, but it must be >= 1; 1 is no guidance, 7.5 is usual")
        if guidance_scale == 1:
            return self._forward(x_t, timestep, cond.prompt_embeds)
        both = torch.cat([cond.negative_embeds, cond.prompt_embeds])
        timesteps = timestep if timestep.ndim == 0 else torch.cat([timestep, timestep])
        negative_pred, prompt_pred = self._forward(torch.cat([x_t, x_t]), timesteps, both).chunk(2)
        return guided(negative_pred, prompt_pred, guidance_scale)

    def _forward(self, x_t: Latents, timestep: Tensor, prompt_embeds: Tensor) -> Latents:
        is_mixed = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype if is_mixed else None, enabled=is_mixed):
            noise_pred = self.denoiser(
                x_t.to(self.weight_dtype), timestep, encoder_hidden_states=prompt_embeds.to(self.weight_dtype)
            ).sample
        return noise_pred.float()

    @torch.no_grad()
    def encode_moments(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the scaled latents' posterior, float32.

        Raises:
            ValueError: If the images are not RGB in [0, 1], or their sides do not divide by the VAE's factor.
        """
        check_images(images, self.pipe.vae_scale_factor)
        posterior = self.vae.encode((2 * images - 1).to(self.device, self.vae.dtype)).latent_dist
        scale = self.vae.config["scaling_factor"]
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def decode(self, latents: Latents) -> Images:
        """Images in [0, 1], float32, of scaled latents; with a gradient where the latents ask for one."""
        unscaled = (latents / self.vae.config["scaling_factor"]).to(self.vae.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            chunks = [self.vae.decode(chunk).sample for chunk in unscaled.split(IMAGES_PER_DECODE)]
        return (torch.cat(chunks).float() / 2 + 0.5).clamp(0, 1)

    def fingerprint(self, part: Literal["denoiser", "vae", "text"]) -> str:
        """A hash of everything that determines what one part computes: weights, types, configuration, tokenizer.

        Adapters do not count: the denoiser's fingerprint is its base's.
        """
        if part == "text":
            vocabulary = {"vocab": self.tokenizer.get_vocab(), "max_length": self.tokenizer.model_max_length}
            return hash_network(self.text_encoder, self.text_encoder.config.to_dict(), vocabulary)
        network = self.vae if part == "vae" else self.denoiser
        return hash_network(network, dict(network.config), {"compute_dtype": str(self.compute_dtype)})


def check_images(images: Images, factor: int) -> None:
    """Refuse what is not a batch of RGB images in [0, 1]; reads the range, so it costs one device synchronisation."""
    if images.ndim != IMAGE_DIMS or images.shape[1] != RGB:
        raise InputError(f"images have shape {tuple(images.shape)}, but [batch, 3, height, width] is needed; give RGB")
    if images.shape[2] % factor or images.shape[3] % factor:
        raise InputError(
            f"images are {images.shape[2]}x{images.shape[3]}, but the sides must divide by {factor}; crop them"
        )
    low, high = torch.stack(images.aminmax()).tolist()
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"images span [{low:.4g}, {high:.4g}], but [0, 1] is needed; divide bytes by 255, or undo 2x - 1"
        )
