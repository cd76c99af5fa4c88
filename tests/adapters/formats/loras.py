"""Tiny pipelines with LoRAs of every shape that a file can have."""

import torch
from peft import LoraConfig

from rpo.adapters.lora import ADAPTER, adapter_layers
from rpo.models.checkpoint import Checkpoint

CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")

SHAPES = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 2},
    "mixed ranks": {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 5}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "text encoders": {"r": 4, "lora_alpha": 2},
    "dora": {"r": 4, "lora_alpha": 4, "use_dora": True},
}
"""Settings of peft, by what is unusual."""


def disturbed(network, seed=1, scale=0.1):
    """Every factor of every adapter filled."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if ".lora_" in name and "magnitude" not in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + scale * torch.rand(parameter.shape, generator=generator)
    return network


def with_lora(make, shape="plain", targets=None):
    """A checkpoint whose denoiser, and CLIP text encoders if wanted, carry a filled LoRA of that shape."""
    model = Checkpoint(make())
    settings = SHAPES[shape] | {"init_lora_weights": "gaussian"}
    wanted = list(targets or model.family.lora_targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.denoiser.add_adapter(LoraConfig(target_modules=wanted, **settings), adapter_name=ADAPTER)
        disturbed(model.denoiser)
        if shape == "text encoders":
            for part, encoder in model.text_encoders.items():
                if type(encoder).__name__.startswith("CLIP"):
                    config = LoraConfig(target_modules=list(CLIP_PROJECTIONS), **settings)
                    encoder.add_adapter(config, adapter_name=ADAPTER)
                    disturbed(encoder, seed=len(part))
                    assert adapter_layers(encoder)
    return model
