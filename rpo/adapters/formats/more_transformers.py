"""Names of the layers of Z-Image, Lumina 2, Krea 2, PixArt-Sigma and Qwen-Image; to be read as in `transformers`."""

from rpo.adapters.formats.names import Names, expanded

ATTENTION = {"attention.qkv": "to_q to_k to_v", "attention.out": "to_out.0"}
BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")

Z_IMAGE = {
    **{
        f"{block}.{theirs}": " ".join(f"{block}.attention.{one}" for one in ours.split())
        for block in BLOCKS
        for theirs, ours in ATTENTION.items()
    },
    **{f"{block}.feed_forward.w{one}": f"{block}.feed_forward.w{one}" for block in BLOCKS for one in (1, 2, 3)},
    **{f"{block}.adaLN_modulation.0": f"{block}.adaLN_modulation.0" for block in BLOCKS[:2]},
    **{"t_embedder.mlp.0": "t_embedder.mlp.0", "t_embedder.mlp.2": "t_embedder.mlp.2"},
    **{"cap_embedder.1": "cap_embedder.1", "x_embedder": "all_x_embedder.2-1"},
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
LUMINA2 = {
    **{
        f"{block}.{theirs}": " ".join(f"{block}.attn.{one}" for one in ours.split())
        for block in BLOCKS
        for theirs, ours in ATTENTION.items()
    },
    **{f"{block}.feed_forward.w{one}": f"{block}.feed_forward.linear_{one}" for block in BLOCKS for one in (1, 2, 3)},
    **{f"{block}.adaLN_modulation.1": f"{block}.norm1.linear" for block in BLOCKS[:2]},
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    **{"cap_embedder.1": "time_caption_embed.caption_embedder.1", "x_embedder": "x_embedder"},
    **{"final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2"},
}
KREA2_BLOCK = {
    **{"attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.wo": "attn.to_out.0"},
    **{"attn.gate": "attn.to_gate", "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down"},
}
KREA2_BLOCKS = {
    "blocks.#": "transformer_blocks.#",
    "txtfusion.layerwise_blocks.#": "text_fusion.layerwise_blocks.#",
    "txtfusion.refiner_blocks.#": "text_fusion.refiner_blocks.#",
}
KREA2 = {
    **{f"{a}.{theirs}": f"{b}.{ours}" for a, b in KREA2_BLOCKS.items() for theirs, ours in KREA2_BLOCK.items()},
    **{"first": "img_in", "tmlp.0": "time_embed.linear_1", "tmlp.2": "time_embed.linear_2"},
    **{"tproj.1": "time_mod_proj", "txtmlp.1": "txt_in.linear_1", "txtmlp.3": "txt_in.linear_2"},
    **{"txtfusion.projector": "text_fusion.projector", "last.linear": "final_layer.linear"},
}
PIXART_BLOCK = {
    **{"attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0"},
    **{"cross_attn.q_linear": "attn2.to_q", "cross_attn.kv_linear": "attn2.to_k attn2.to_v"},
    **{"cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
}
PIXART = {
    **{
        f"blocks.#.{theirs}": " ".join(f"transformer_blocks.#.{one}" for one in ours.split())
        for theirs, ours in PIXART_BLOCK.items()
    },
    **{"x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear", "final_layer.linear": "proj_out"},
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
}
QWEN_BLOCK = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
QWEN_ENDS = (
    *("img_in", "txt_in", "proj_out", "norm_out.linear"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
)
QWEN = {name: name for name in (*(f"transformer_blocks.#.{one}" for one in QWEN_BLOCK), *QWEN_ENDS)}

MORE_TRANSFORMERS = {
    "ZImagePipeline": Names(expanded(Z_IMAGE)),
    "Lumina2Pipeline": Names(expanded(LUMINA2)),
    "Krea2Pipeline": Names(expanded(KREA2)),
    "PixArtSigmaPipeline": Names(expanded(PIXART)),
    "QwenImagePipeline": Names(expanded(QWEN)),
}
"""By the family's own pipeline class."""
