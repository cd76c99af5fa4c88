"""Z-Image: a transformer that predicts flow, one text encoder (Qwen3, asked as in a chat), and FLUX.1's autoencoder.

Its network runs the other way: it is told 0 at the noise end and 1 at the data end, and puts out x_0 - eps. It takes
lists, of images and of captions each as long as it is. The pipeline counts guidance from 0, where rpo's 1 is.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from rpo.models.base import TextContext
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import FlowSchedule
from rpo.types import Embedding, Latents

TOKENS = 512
"""As in the pipeline's own call, those of the chat's marks included."""


@final
class ZImage(UsualFamily):
    """The family of `ZImagePipeline`."""

    name = "Z-Image"
    pipelines: tuple[str, ...] = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    parts: Mapping[str, str] = {"transformer": "ZImageTransformer2DModel", "vae": "AutoencoderKL"}
    prompts_per_call = 16
    single_file_key = "cap_pad_token"
    guidance_offset = 1.0

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow with the scheduler's shift."""
        return FlowSchedule(pipe.scheduler, sigmas=_sigmas, max_shift=1.15)

    def native(self, pipe: Any) -> tuple[int, int]:
        """As the autoencoder's configuration says; the transformer's says nothing."""
        side = pipe.vae.config["sample_size"] // self.cell(pipe)
        return side, side

    def patch(self, pipe: Any) -> int:
        """Of those that the network has, the one that the pipeline uses."""
        return 2

    def context(self, pipe: Any) -> TextContext:
        """Qwen's tokenizer, and what the chat leaves of its tokens."""
        chat = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return TextContext(pipe.tokenizer, TOKENS - len(pipe.tokenizer(chat).input_ids))

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """Qwen's hidden states before the last layer, and which of them are a prompt's."""
        # The pipeline writes into the list that it is given.
        rows, _ = pipe.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        tokens = torch.stack([pad(row, (0, 0, 0, TOKENS - len(row))) for row in rows])
        mask = torch.stack([torch.arange(TOKENS, device=tokens.device) < len(row) for row in rows])
        return {"tokens": tokens, "mask": mask}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer; it waits for the device, for lists have lengths that the host must know."""
        lengths = embedding["mask"].bool().sum(dim=1).tolist()
        captions = [row[:length] for row, length in zip(embedding["tokens"], lengths, strict=True)]
        time = ((1000 - timestep) / 1000).expand(len(x_t))
        return -torch.stack(network(list(x_t.unsqueeze(2)), time, captions).sample).squeeze(2)


def _sigmas(num_steps: int) -> list[float]:
    """Even ones, rounded to float32 as in the pipeline."""
    return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float32, device="cpu").tolist()
