"""Names of the transformers' layers: of FLUX.1, Chroma, FLUX.2, SD3, Z-Image, Lumina 2, Krea 2, PixArt and Qwen.

Read as: the original has one layer, and this is (or these are) diffusers' name of it; "#" is a block's number.
"""

from collections.abc import Mapping

from rpo.adapters.formats.names import MANY, Names, expanded

FINAL, CONTEXT = "final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1"


def _under(theirs: str, ours: str, rules: Mapping[str, str]) -> dict[str, str]:
    """Rules for what is inside a block."""
    return {f"{theirs}.{one}": " ".join(f"{ours}.{name}" for name in several.split()) for one, several in rules.items()}


def _embedders(place: str, **kinds: str) -> dict[str, str]:
    """FLUX's embedders of numbers, two layers each."""
    layers = {"in_layer": "linear_1", "out_layer": "linear_2"}
    return {f"{one}.{a}": f"{place}.{kind}_embedder.{b}" for one, kind in kinds.items() for a, b in layers.items()}


TWO_STREAMS = {
    **{"img_attn.qkv": "attn.to_q attn.to_k attn.to_v", "img_attn.proj": "attn.to_out.0"},
    **{"txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.proj": "attn.to_add_out"},
}
FLUX_ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
ONE_STREAM = {"linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out"}
FLUX1 = {
    **_under("double_blocks.#", "transformer_blocks.#", TWO_STREAMS),
    **_under(
        "double_blocks.#",
        "transformer_blocks.#",
        {
            **{"img_mod.lin": "norm1.linear", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2"},
            **{"txt_mod.lin": "norm1_context.linear", "txt_mlp.0": "ff_context.net.0.proj"},
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    **_under("single_blocks.#", "single_transformer_blocks.#", {**ONE_STREAM, "modulation.lin": "norm.linear"}),
    **FLUX_ENDS,
    **_embedders("time_text_embed", time_in="timestep", vector_in="text", guidance_in="guidance"),
}
CHROMA = {
    **{"distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj"},
    **{"distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj"},
    **_under(
        "distilled_guidance_layer.layers.#",
        "distilled_guidance_layer.layers.#",
        {"in_layer": "linear_1", "out_layer": "linear_2"},
    ),
}
FLUX2 = {
    **_under("double_blocks.#", "transformer_blocks.#", TWO_STREAMS),
    **_under(
        "double_blocks.#",
        "transformer_blocks.#",
        {
            **{"img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out"},
            **{"txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out"},
        },
    ),
    **_under(
        "single_blocks.#",
        "single_transformer_blocks.#",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    **FLUX_ENDS,
    **{f"{one}.lin": f"{one}.linear" for one in ("double_stream_modulation_img", "double_stream_modulation_txt")},
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **_embedders("time_guidance_embed", time_in="timestep", guidance_in="guidance"),
}
SD3_EMBEDDERS = [(one, kind, number) for one, kind in (("t", "timestep"), ("y", "text")) for number in (0, 1)]
SD3 = {
    **_under(
        "joint_blocks.#",
        "transformer_blocks.#",
        {
            **{"x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v", "x_block.attn.proj": "attn.to_out.0"},
            **{"x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v", "x_block.attn2.proj": "attn2.to_out.0"},
            "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block.attn.proj": "attn.to_add_out",
            **{"x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2"},
            **{"context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2"},
            **{"x_block.adaLN_modulation.1": "norm1.linear", CONTEXT: "norm1_context.linear"},
        },
    ),
    **{"context_embedder": "context_embedder", "final_layer.linear": "proj_out", "x_embedder.proj": "pos_embed.proj"},
    **{
        f"{one}_embedder.mlp.{2 * n}": f"time_text_embed.{kind}_embedder.linear_{n + 1}"
        for one, kind, n in SD3_EMBEDDERS
    },
}
CLIPS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

TRANSFORMERS = {
    "FluxPipeline": Names(
        expanded({**FLUX1, FINAL: "norm_out.linear"}), frozenset({FINAL}), encoders={"text_encoder": "lora_te1"}
    ),
    "ChromaPipeline": Names(expanded({**FLUX1, **CHROMA})),
    "Flux2KleinPipeline": Names(expanded({**FLUX2, FINAL: "norm_out.linear"}), frozenset({FINAL})),
    "StableDiffusion3Pipeline": Names(
        expanded({**SD3, FINAL: "norm_out.linear"}),
        frozenset({FINAL, *(f"joint_blocks.{number}.{CONTEXT}" for number in range(MANY))}),
        encoders=CLIPS,
        flat=frozenset(),
    ),
}
"""By the family's own pipeline class."""
