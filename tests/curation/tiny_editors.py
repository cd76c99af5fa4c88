"""Tiny editing pipelines of the real diffusers and transformers classes, random weights, from configs: no network."""

from collections.abc import Iterator

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from PIL.Image import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import tiny_sd, tiny_text_config, tiny_tokenizer


def ready(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """With weights so wide that every input changes the output, and without a progress bar."""
    generator = torch.Generator().manual_seed(0)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3 if parameter.shape[0] < 1000 else 1.0, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    parts = tiny_sd(in_channels=8).components
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def tiny_controlnet() -> ControlNetModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ControlNetModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(8, 8, 8, 8),
        )
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(block.weight, 0, 0.3, generator=torch.Generator().manual_seed(1))
    return net


def tiny_controlnet_pipeline() -> StableDiffusionControlNetPipeline:
    parts = tiny_sd().components
    return StableDiffusionControlNetPipeline(**parts, controlnet=tiny_controlnet(), requires_safety_checker=False)


def byte_tokenizer(*special: str) -> Tokenizer:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def tiny_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ),
        text_encoder=CLIPTextModel(tiny_text_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer("<pad>", "</s>"), pad_token="<pad>", eos_token="</s>", model_max_length=64
        ),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def qwen_tokenizer() -> Qwen2TokenizerFast:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS)})
    return tokenizer


class QwenProcessor:
    """What Qwen2VLProcessor does to text and images; the real one wants a video processor, which wants torchvision."""

    def __init__(self, tokenizer: Qwen2TokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(
        self, text: list[str], images: Image | list[Image], padding: bool, return_tensors: str
    ) -> BatchFeature:
        features = self.image_processor(images=images, return_tensors=return_tensors)
        places = iter(features["image_grid_thw"].prod(dim=1) // 4)
        spread = ["<|image_pad|>".join(_spread(one.split("<|image_pad|>"), places)) for one in text]
        return BatchFeature({**self.tokenizer(spread, padding=padding, return_tensors=return_tensors), **features})


def _spread(pieces: list[str], places: Iterator[torch.Tensor]) -> list[str]:
    """As many places between two pieces as the image there has tokens."""
    spread = [pieces[0]]
    for piece in pieces[1:]:
        spread += [""] * (int(next(places)) - 1) + [piece]
    return spread


def tiny_qwen_edit(pipeline_class=QwenImageEditPlusPipeline) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    tokenizer = qwen_tokenizer()
    image_token, start, end = (tokenizer.convert_tokens_to_ids(QWEN_TOKENS[index]) for index in (5, 3, 4))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "in_channels": 3,
        },
        image_token_id=image_token,
        video_token_id=310,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=QwenProcessor(tokenizer),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )
