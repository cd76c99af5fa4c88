"""The seam between algorithms and checkpoints, in one page: what rpo needs of a model, and what a family has to tell.

A trainer or sampler sees a `DiffusionModel` and nothing below it. `rpo.models.checkpoint.Checkpoint` is one, for every
family of diffusers pipelines: what is the same for all families is written there once, what differs is a `Family`. A
new family is one file in `families/` and one line of its table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rpo.process.schedule import Process
from rpo.types import Canvas, Conditioning, Embedding, Grid, Images, Latents, Node, Output, PredictionType

Guidance = Literal["cfg", "embedded"]
"""How a model is guided: by a second call of the network, without the prompt, or by a number that the network is told.
The scale 1 is no guidance for the first, and the least that the second has learnt."""

Edits = Literal["never", "always", "may"]
"""Whether a model draws from an image, which it edits, beside the prompt, which says how."""

ORIGINAL = "original"
"""Name, among the tensors of an embedding, of what the network is shown of the image that it edits."""


@runtime_checkable
class DiffusionModel(Protocol):
    """A text-to-image diffusion checkpoint, as the rest of rpo sees it."""

    denoiser: nn.Module
    """The trainable network."""

    prediction_type: PredictionType
    num_train_timesteps: int
    """The unit of time that the network is told: 0 at the data end to this at the noise end."""
    guidance: Guidance

    @property
    def process(self) -> Process:
        """The noise schedule in continuous time, of which every grid is a sample."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Configuration of the checkpoint's diffusers scheduler, from which another one can be made."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        ...

    @property
    def canvas(self) -> Canvas:
        """The native size of an image."""
        ...

    def latent_shape(self, canvas: Canvas | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of one image; by default of a native one."""
        ...

    def grid(self, num_steps: int, canvas: Canvas | None = None) -> Grid:
        """The nodes of a sampler of `num_steps` steps, spaced as the checkpoint's own scheduler says."""
        ...

    def flow_shift(self, num_steps: int, canvas: Canvas | None = None) -> float:
        """Of a flow model: s of its sampler's sigma = s t / (1 + (s - 1) t); 1 of any other."""
        ...

    def node(self, timestep: Tensor) -> Node:
        """Schedule values at one training timestep per sample, shaped to broadcast over latents."""
        ...

    def encode_prompts(
        self, prompts: Sequence[str], *, negative_prompt: str = "", originals: Images | None = None
    ) -> Conditioning:
        """Conditioning of each prompt, and of the image that it edits; a repeated prompt is encoded once."""
        ...

    def predict(self, x_t: Latents, timestep: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Output:
        """Raw network output (`noise_pred`) in float32; `guidance_scale` 1 means none."""
        ...

    def guided(self, negative_pred: Output, prompt_pred: Output, guidance_scale: float) -> Output:
        """What `predict` makes of both outputs of classifier-free guidance."""
        ...

    def encode_moments(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the scaled latents' posterior, float32."""
        ...

    def decode(self, latents: Latents) -> Images:
        """Images of scaled latents."""
        ...


class Schedule(Protocol):
    """The noise schedule of a checkpoint, read from its scheduler's configuration; see `rpo.models.schedules`."""

    prediction_type: PredictionType
    num_train_timesteps: int
    config: Mapping[str, Any]

    @property
    def process(self) -> Process:
        """The same in continuous time."""
        ...

    def grid(self, num_steps: int, sequence_length: int) -> Grid:
        """The nodes at which the checkpoint's own pipeline would step; some lie elsewhere for larger images."""
        ...

    def node(self, timestep: Tensor) -> Node:
        """Alpha and sigma at one training timestep per sample, `[batch, 1, 1, 1]`."""
        ...

    def draw(self, generator: torch.Generator) -> Tensor:
        """A training timestep, by the density that such checkpoints are trained with."""
        ...

    def shift(self, num_steps: int, sequence_length: int) -> float:
        """See `DiffusionModel.flow_shift`."""
        ...


@dataclass(frozen=True)
class TextContext:
    """How far the text encoders read into a prompt."""

    tokenizer: Any
    """Of the encoder that reads furthest."""
    max_length: int
    """Tokens that it takes, marks included."""
    refuses_longer: bool = False
    """Whether a longer prompt is an error, and not cut as the pipeline does."""


class Family(Protocol):
    """What differs between families of pipelines; stateless, one file each. See `docs/add_a_family.md`."""

    name: str
    """What people call it."""
    pipelines: tuple[str, ...]
    """Classes of diffusers whose parts make such a text-to-image pipeline; the first is that pipeline itself."""
    denoiser: str
    """Name of the trainable part in the pipeline, which is also that of its layers in a LoRA file."""
    autoencoder: str
    """Name of the part that draws images from latents."""
    narrows_states: bool
    """Whether the network takes latents in the type of its weights: not tokens, which half a float cannot count."""
    parts: Mapping[str, str]
    """Class of diffusers of the denoiser and the autoencoder, by the part's name."""
    text_encoders: tuple[str, ...]
    """Names of the text encoders; a pipeline may lack some of them."""
    prompts_per_call: int
    """Prompts that go through the text encoders at once: bounds memory, above where a GPU is full. 16 are 4 GB for an
    encoder that keeps its layers and computes logits, which nobody reads."""
    load_options: Mapping[str, Any]
    """What `from_pretrained` is given beside the types."""
    single_file_key: str
    """Part of a tensor's name by which a single-file checkpoint of this family is known; empty for the default."""
    lora_targets: tuple[str, ...]
    """Where LoRA goes by default: name endings of layers."""
    lora_dialect: str
    """How its LoRA files name the denoiser's factors: "diffusers" (lora.down) or "peft" (lora_A)."""
    lora_preparation: tuple[str, ...]
    """Lines of Python after which a stock `pipe` loads a LoRA; most need none."""
    widens_autoencoder: bool
    """Whether a float16 autoencoder is to compute in float32 where its configuration says so, as it overflows."""
    guidance: Guidance
    guidance_argument: str
    """What the pipeline's own call names the scale."""
    guidance_offset: float
    """What is to be added to the pipeline's scale to make it rpo's, whose 1 is no guidance."""
    edits: Edits
    text_sees: bool
    """Whether the text encoders of an editor see the image that is edited."""

    def refuse(self, pipe: Any) -> None:
        """Refuse a pipeline of the right class that is another kind of model, such as an inpainting one."""
        ...

    def enable_lora(self, pipe: Any) -> None:
        """Give a pipeline what diffusers' class lacks to carry, load and save a LoRA."""
        ...

    def distilled(self, pipe: Any) -> str:
        """What of the networks tells that they were distilled to a few steps; empty where nothing does."""
        ...

    def schedule(self, pipe: Any) -> Schedule:
        """The noise schedule that the pipeline's scheduler states."""
        ...

    def latent_channels(self, pipe: Any) -> int:
        """Numbers in one cell of the latents."""
        ...

    def cell(self, pipe: Any) -> int:
        """Pixels along a side of one cell of the latents."""
        ...

    def patch(self, pipe: Any) -> int:
        """Cells along a side of one token of the denoiser; 1 where it has none."""
        ...

    def native(self, pipe: Any) -> tuple[int, int]:
        """Cells along the height and the width of the image that the checkpoint draws when nobody says how large."""
        ...

    def context(self, pipe: Any) -> TextContext:
        """How far the text encoders read into a prompt."""
        ...

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """Embeddings of prompts as the pipeline itself makes them; of "" what it takes for no prompt."""
        ...

    def embed_with(self, pipe: Any, prompts: list[str], originals: Images, device: torch.device) -> Embedding:
        """The same where the text encoders see the image, one per prompt, in [0, 1]."""
        ...

    def shown(self, pipe: Any, latents: Latents) -> Latents:
        """What the network is shown of an image that it edits, of the mean of its scaled latents."""
        ...

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Output:
        """The network's output: what `prediction_type` says, for a timestep in `[0, num_train_timesteps]`.

        Where guidance is embedded, its scale is in the embedding, as "guidance", one number per sample. What is shown
        of an image that is edited is there as `ORIGINAL`. In training the sizes of images may be there too; see
        `Conditioning.told`.
        """
        ...

    def guided(self, negative_pred: Output, prompt_pred: Output, guidance_scale: float) -> Output:
        """Classifier-free guidance as the pipeline does it."""
        ...

    def encode(self, pipe: Any, images: Images) -> tuple[Latents, Latents]:
        """Mean and standard deviation of the scaled latents, float32; images in [0, 1], on the autoencoder's device."""
        ...

    def decode(self, pipe: Any, latents: Latents) -> Images:
        """Images of scaled latents, float32, about [0, 1]: not cut off."""
        ...


def guided(negative_pred: Output, prompt_pred: Output, guidance_scale: float) -> Output:
    """Classifier-free guidance: away from the negative prediction, past the prompt's (arXiv:2207.12598, eq. 6)."""
    return negative_pred + guidance_scale * (prompt_pred - negative_pred)
