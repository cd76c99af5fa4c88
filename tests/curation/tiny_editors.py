"""The tiny editing pipelines of all tests, their weights so wide that every input counts; and a ControlNet."""

import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline

from tests.tiny import tiny_sd


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
