"""Names of Stable Diffusion's UNets: blocks are counted through in the original, and by levels in diffusers.

kohya's scripts load Stable Diffusion 1.x and 2.x in diffusers' form and SDXL in the original one, and name LoRAs so.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product

from rpo.adapters.formats.names import Names

LEVELS, DEPTH = range(6), range(16)
"""More levels, and more transformer blocks in one, than any UNet has."""

TRANSFORMER = (
    *(f"attn{number}.{one}" for number in (1, 2) for one in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
)
RESNET = {
    **{"conv1": "in_layers.2", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
REST = {
    **{"conv_in": "input_blocks.0.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}


@cache
def stable_diffusion(layers_per_block: int = 2) -> Names:
    """Of Stable Diffusion 1.x and 2.x."""
    return Names(_originals(layers_per_block), encoders={"text_encoder": "lora_te"}, kohya_keeps=True)


@cache
def stable_diffusion_xl(layers_per_block: int = 2) -> Names:
    """Of SDXL."""
    encoders = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    return Names(_originals(layers_per_block), encoders=encoders)


def _originals(layers_per_block: int) -> dict[str, tuple[str, ...]]:
    found = {theirs: (ours,) for ours, theirs in REST.items()}
    for ours, theirs, resnet in _blocks(layers_per_block):
        kind, number = ours.rsplit(".", 1)
        if kind.endswith("attentions"):
            inner = [f"transformer_blocks.{depth}.{name}" for depth, name in product(DEPTH, TRANSFORMER)]
            found |= {f"{theirs}.{name}": (f"{ours}.{name}",) for name in ("proj_in", "proj_out", *inner)}
        elif kind.endswith("resnets"):
            found |= {f"{theirs}.{name}": (f"{ours}.{own}",) for own, name in RESNET.items()}
        else:
            found[f"{theirs}.{resnet}"] = (f"{ours}.conv",)
    return found


def _blocks(layers: int) -> Iterator[tuple[str, str, str]]:
    """Name in diffusers and in the original of every block, and of the convolution of one that changes the size."""
    for level in LEVELS:
        for number in range(layers):
            place = f"input_blocks.{1 + level * (layers + 1) + number}"
            yield f"down_blocks.{level}.resnets.{number}", f"{place}.0", ""
            yield f"down_blocks.{level}.attentions.{number}", f"{place}.1", ""
        yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{(level + 1) * (layers + 1)}.0", "op"
        for number in range(layers + 1):
            place = f"output_blocks.{level * (layers + 1) + number}"
            yield f"up_blocks.{level}.resnets.{number}", f"{place}.0", ""
            yield f"up_blocks.{level}.attentions.{number}", f"{place}.1", ""
        for branch in (1, 2):  # after attention, where the level has it
            yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{level * (layers + 1) + layers}.{branch}", "conv"
    yield "mid_block.resnets.0", "middle_block.0", ""
    yield "mid_block.attentions.0", "middle_block.1", ""
    yield "mid_block.resnets.1", "middle_block.2", ""
