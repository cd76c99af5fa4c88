"""Draw an image, say what is wrong with it, what to do about it, and do it: one prompt, one candidate preference pair.

    pipe = DiffusionPipeline.from_pretrained(
        rpo.shapes.path(), custom_pipeline="pipelines/rich_preference.py", trust_remote_code=True
    )
    output = pipe("two red circles")
    output.images, output.critiques, output.instructions, output.edited_images

A community pipeline: everything that it does is done by the package `rpo`, as `rpo curate` does it with many prompts.
Drawing is DDIM (arXiv:2010.02502) with classifier-free guidance; the idea of edits made from critiques is that of Rich
Preference Optimization (arXiv:2503.11720).
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

from rpo.curation.components import load_critic, load_editor, load_instructor
from rpo.curation.curate_config import ChatConfig, EditorConfig
from rpo.curation.faults import ask_each
from rpo.curation.records import Critique, Fault, Instructions
from rpo.data.pixels import to_pixels
from rpo.models.checkpoint import Checkpoint
from rpo.process.transition import Ddim
from rpo.randomness import keyed_generator
from rpo.sampling.sample import image_generator, sample


@dataclass
class RichPreferenceOutput(BaseOutput):
    """What became of every prompt; all lists are as long as the prompts.

    Attributes:
        images: What was drawn.
        critiques: What is wrong with it, or why nobody could tell.
        instructions: What to do about it; None if nothing is to be fixed or there is no critique.
        edited_images: What came of it; None if there was nothing to do.
    """

    images: list[Image.Image]
    critiques: list[Critique | Fault]
    instructions: list[Instructions | Fault | None]
    edited_images: list[Image.Image | Fault | None]


class RichPreferencePipeline(DiffusionPipeline):
    """Stable Diffusion 1.x or 2.x with a critic, an instructor and an editor; by default those of the shapes world."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        *,
        critic: Callable[..., Any] | None = None,
        instructor: Callable[..., Any] | None = None,
        editor: Callable[..., Any] | None = None,
    ) -> None:
        """Take the parts of Stable Diffusion, and who looks at what it draws.

        Args:
            vae: Autoencoder.
            text_encoder: Of the prompt.
            tokenizer: Of the prompt.
            unet: Denoiser.
            scheduler: Its noise schedule is used; steps are DDIM's.
            critic: A `Critic` of rpo; None for that of shapes.
            instructor: An `Instructor`; None for that of shapes.
            editor: An `Editor`; None for that of shapes.
        """
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.critic = critic or load_critic(ChatConfig())
        self.instructor = instructor or load_instructor(ChatConfig())
        self.editor = editor or load_editor(EditorConfig())

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
        return_dict: bool = True,
    ) -> RichPreferenceOutput | tuple:
        """Draw, criticise, instruct and edit.

        Args:
            prompt: One or several.
            num_inference_steps: Of the drawing; the editor has its own.
            guidance_scale: Of the drawing; 1 is none.
            seed: Image k is a function of seed, k and its prompt alone, and so is its edit.
            return_dict: Whether to give an output object, or its four lists as a tuple.

        Returns:
            Images, critiques, instructions and edited images.

        Raises:
            Unavailable: Critic, instructor or editor cannot answer now.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = self._draw(prompts, num_inference_steps, guidance_scale, seed)
        critiques = _ask(self.critic, list(zip(images, prompts, strict=True)))
        instructions: list[Instructions | Fault | None] = [None] * len(prompts)
        faulty = [k for k, critique in enumerate(critiques) if isinstance(critique, Critique) and critique.problems]
        told = _ask(self.instructor, [(images[k], prompts[k], critiques[k]) for k in faulty])
        for k, answer in zip(faulty, told, strict=True):
            instructions[k] = answer
        edited: list[Image.Image | Fault | None] = [None] * len(prompts)
        texts = {
            k: one.text for k, one in enumerate(instructions) if isinstance(one, Instructions) and not one.is_empty
        }
        seeds = {k: keyed_generator("edit", seed, k).initial_seed() for k in texts}
        answers = _ask(self.editor, [(images[k], text, seeds[k]) for k, text in texts.items()])
        for k, answer in zip(texts, answers, strict=True):
            edited[k] = answer
        output = RichPreferenceOutput(images, critiques, instructions, edited)
        return output if return_dict else (images, critiques, instructions, edited)

    def _draw(self, prompts: list[str], num_steps: int, guidance_scale: float, seed: int) -> list[Image.Image]:
        model = Checkpoint(
            StableDiffusionPipeline(
                **self.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        )
        trajectory = sample(
            model,
            model.encode_prompts(prompts),
            model.grid(num_steps),
            Ddim(0.0),
            guidance_scale=guidance_scale,
            generators=[image_generator(seed, k, 0) for k in range(len(prompts))],
        )
        return [Image.fromarray(pixels) for pixels in to_pixels(model.decode(trajectory.x_0))]


def _ask(component, items: list[tuple]) -> list:
    """The answers of a critic, instructor or editor to items, in batches of the size it wants."""
    answers = []
    for start in range(0, len(items), component.batch_size):
        batch = items[start : start + component.batch_size]
        answers += ask_each(lambda some: component(*map(list, zip(*some, strict=True))), batch)
    return answers
