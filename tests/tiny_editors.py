"""Tiny editing pipelines of the real classes, with random weights; see `tests.tiny`."""

import torch
from diffusers import (
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from tests.tiny import tiny_sd, tiny_unet
from tests.tiny_flux1 import tiny_flux1
from tests.tiny_qwen_image import WORDS, tiny_qwen, tiny_qwen_image

VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


def tiny_pix2pix(*, seed: int = 0) -> StableDiffusionInstructPix2PixPipeline:
    """A whole InstructPix2Pix pipeline: Stable Diffusion's parts, and a UNet of twice the channels."""
    parts = dict(tiny_sd(seed=seed).components)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts["unet"] = tiny_unet(in_channels=8).eval()
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_kontext(*, seed: int = 0) -> FluxKontextPipeline:
    """A whole FLUX.1 Kontext pipeline: the parts of FLUX.1."""
    pipe = FluxKontextPipeline(**tiny_flux1(seed=seed).components)
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_seeing_qwen() -> Qwen2_5_VLForConditionalGeneration:
    """One that knows the marks of images."""
    return tiny_qwen(words=len(WORDS) + len(VISION), image_token_id=len(WORDS) + 1)


def processor_of(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Without its constructor, which asks for the video processor's class, and that for torchvision."""
    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    processor.image_processor, processor.tokenizer = Qwen2VLImageProcessorPil(), tokenizer
    processor.video_processor = None
    processor.image_token, processor.video_token = VISION[1], VISION[3]
    processor.image_token_id, processor.video_token_id = map(tokenizer.convert_tokens_to_ids, (VISION[1], VISION[3]))
    processor.chat_template = None
    return processor


def tiny_qwen_edit(made=QwenImageEditPipeline, *, seed: int = 0):
    """A whole Qwen-Image-Edit pipeline: Qwen-Image's parts, and a processor for images."""
    parts = dict(tiny_qwen_image(seed=seed).components)
    words = {word: index for index, word in enumerate((*WORDS, *VISION))}
    tokenizer = Qwen2Tokenizer(words, [], additional_special_tokens=list(VISION))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = tiny_seeing_qwen().eval()
    pipe = made(
        **parts | {"text_encoder": text_encoder, "tokenizer": tokenizer},
        processor=processor_of(tokenizer),
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_qwen_edit_plus(*, seed: int = 0):
    """The same as the later pipeline."""
    return tiny_qwen_edit(QwenImageEditPlusPipeline, seed=seed)
