"""The best of several images of each prompt, by a reward; by drafts if asked, and corrected if there is who corrects.

    pipe = DiffusionPipeline.from_pretrained(
        rpo.shapes.path(), custom_pipeline="pipelines/best_of_n.py", trust_remote_code=True, reward="shapes-clip"
    )
    output = pipe("two red circles", n=8, draft_steps=6)
    output.images, output.scores, output.chosen

A community pipeline: everything that it does is done by `rpo.sampling.select`, which takes other pipelines than Stable
Diffusion's, too. Drawing is DDIM (arXiv:2010.02502) with classifier-free guidance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.data.pixels import to_pixels
from rpo.models.checkpoint import Checkpoint
from rpo.rewards import load_reward, score
from rpo.sampling.select import How, best_of_n, by_drafts, corrected
from rpo.types import Images, PerSample


@dataclass
class BestOfNOutput(BaseOutput):
    """One image of every prompt.

    Attributes:
        images: The best of each.
        scores: What the reward says of it; with drafts, of its draft, unless it was corrected.
        chosen: Its number among the candidates of its prompt.
        evaluations: Latents that went through the denoiser for all of them.
    """

    images: list[Image.Image]
    scores: list[float]
    chosen: list[int]
    evaluations: int


class BestOfNPipeline(DiffusionPipeline):
    """Stable Diffusion 1.x or 2.x with a reward that chooses among what it draws."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        *,
        reward: str | Callable[..., Any] = "clip-score",
        correct: Callable[[Images, Sequence[str], int], Images] | None = None,
    ) -> None:
        """Take the parts of Stable Diffusion, and who chooses.

        Args:
            vae: Autoencoder.
            text_encoder: Of the prompt.
            tokenizer: Of the prompt.
            unet: Denoiser.
            scheduler: Its noise schedule is used; steps are DDIM's.
            reward: A name of `rpo.rewards`, or anything that takes (images, prompts).
            correct: Such as `rpo.curation.correct.SelfCorrection`; None corrects nothing.
        """
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.reward, self.correct = load_reward(reward), correct

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 8,
        draft_steps: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        eta: float = 0.0,
        corrections: int = 1,
        seed: int = 0,
        return_dict: bool = True,
    ) -> BestOfNOutput | tuple[Any, ...]:
        """Draw, choose, and correct what was chosen.

        Args:
            prompt: One or several.
            n: Images of each prompt to choose from; 2 or more.
            draft_steps: Steps in which these are drawn to choose from; None draws them in full.
            num_inference_steps: Steps of the image.
            guidance_scale: 1 is none.
            eta: 0 is deterministic; drafts tell most about their images so.
            corrections: Rounds of correction, where there is who corrects.
            seed: Candidate k of prompt i is a function of seed, i and k alone.
            return_dict: Whether to give an output object, or its parts as a tuple.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        model = Checkpoint(
            StableDiffusionPipeline(
                **self.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        )
        how = How(num_inference_steps, guidance_scale, eta=eta, seed=seed)
        if draft_steps is None:
            found = best_of_n(model, prompts, self._judge, n, how)
        else:
            found = by_drafts(model, prompts, self._judge, n, how, draft_steps=draft_steps)
        images, scores = found.images, found.scores
        if self.correct is not None:
            edited = corrected(images, prompts, self.correct, self._judge, rounds=corrections)
            images, scores = edited.images, edited.scores
        shown = [Image.fromarray(pixels) for pixels in to_pixels(images)]
        output = BestOfNOutput(shown, scores.tolist(), found.chosen.tolist(), found.evaluations)
        return output if return_dict else tuple(output.values())

    def _judge(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return score(self.reward, images.to(self.device), prompts, name=str(self.reward)).cpu()
