"""A tiny CLIP checkpoint on disk, with random weights: real classes, and the files that published ones have."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.tiny import tiny_text_config, tiny_tokenizer

EDGE, MAX_TOKENS, DIM = 32, 24, 16
OLD_PREPROCESSOR = {
    "feature_extractor_type": "CLIPFeatureExtractor",
    "do_resize": True,
    "size": EDGE,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": EDGE,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""As published checkpoints of 2021 to 2023 have it: sizes are numbers."""


def tiny_clip(logit_scale: float = 3.0) -> CLIPModel:
    """Two layers each, images of 32 x 32 in patches of 8."""
    text = tiny_text_config(projection_dim=DIM).to_dict() | {"max_position_embeddings": MAX_TOKENS}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": EDGE,
        "patch_size": 8,
        "projection_dim": DIM,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():  # CLIP starts so small that all images look alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.logit_scale.data.fill_(logit_scale)
    return model


def save_clip(folder: Path, *, has_model: bool = True, has_processor: bool = True) -> Path:
    """Write the model, its processor, or both."""
    if has_model:
        tiny_clip().save_pretrained(folder)
    if has_processor:
        folder.mkdir(exist_ok=True)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(OLD_PREPROCESSOR))
    return folder
