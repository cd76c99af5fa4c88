"""What one Diffusion-DPO update costs in seconds, memory and network calls, against a bare loop of the same work.

    python benchmarks/dpo_step.py                  # a small Stable Diffusion on the CPU, half a minute
    python benchmarks/dpo_step.py --preset sd15 --device cuda --dtype bfloat16 --micro-batch 1

The networks are real and random: weights do not change what an update costs. The bare loop runs the same forwards and
the same backward on tensors of the same shapes, in the same process, before and after the trainer, so that the ratio
does not depend on the machine. Prints one JSON object.
"""

import argparse
import gc
import json
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.adapters.lora import adapter_layers, reference
from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.models.checkpoint import Checkpoint
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.settings import AdapterConfig, LearningConfig
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

PRESETS = {
    "small": {"channels": (64, 128, 256), "layers": 1, "text": (128, 2), "vae": (32, 64, 64, 64), "resolution": 128},
    "sd15": {
        "channels": (320, 640, 1280, 1280),
        "layers": 2,
        "text": (768, 12),
        "vae": (128, 256, 512, 512),
        "resolution": 512,
    },
}
"""`sd15` has the sizes of Stable Diffusion 1.5; `small` has its structure in about a hundredth."""

WARM_UP = 2
"""Updates and bare steps that are not timed: allocators and kernel choices settle in them."""


def build(preset: dict, dtype: torch.dtype, device: str) -> Checkpoint:
    """A Stable Diffusion 1.x pipeline with random weights."""
    channels, (width, depth) = preset["channels"], preset["text"]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=depth,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=preset["resolution"] // 8,
        block_out_channels=channels,
        layers_per_block=preset["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=preset["vae"],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=preset["layers"],
        latent_channels=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    return Checkpoint(pipe.to(device, dtype))


def random_pairs(count: int, side: int) -> list[PreferencePair]:
    """Pairs of noise images, encoded in memory."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 2, side, side, 3), dtype=np.uint8)
    return [
        PreferencePair(f"prompt {index}", encode_png(chosen), encode_png(rejected), name=f"pair {index}")
        for index, (chosen, rejected) in enumerate(images)
    ]


def count_calls(model: Checkpoint, calls: Counter) -> None:
    """Count what goes through each network from now on, in calls and in rows."""

    def on(network: nn.Module, name: str) -> None:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            rows = (args[0] if args else kwargs["input_ids"]).shape[0]
            calls[f"{name}_calls"] += 1
            calls[f"{name}_rows"] += rows

        network.register_forward_pre_hook(before, with_kwargs=True)

    on(model.denoiser, "denoiser_forward")
    on(model.vae.encoder, "vae_encode")
    on(model.text_encoders["text_encoder"], "text_encode")
    model.denoiser.conv_out.register_full_backward_hook(lambda *_: calls.update(denoiser_backward_calls=1))


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall seconds of `work`, device included."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare_step(model: Checkpoint, pairs: int, side: int) -> Callable[[], None]:
    """The same two forwards and one backward with nothing around them."""
    shape, rows = (4, side // 8, side // 8), 2 * pairs
    x_t = torch.randn(rows, *shape, device=model.device)
    timestep = torch.randint(1000, (rows,), device=model.device)
    cond = model.encode_prompts(["a"] * rows)
    layers = adapter_layers(model.denoiser)

    def step() -> None:
        with reference(model.denoiser, layers):
            target = model.predict(x_t, timestep, cond)
        ((model.predict(x_t, timestep, cond) - target) ** 2).mean().backward()
        model.denoiser.zero_grad(set_to_none=True)

    return step


def denoisers_in_memory() -> int:
    """UNets whose weights are really there."""
    gc.collect()
    found = (thing for thing in gc.get_objects() if isinstance(thing, UNet2DConditionModel))
    return sum(not unet.conv_in.weight.is_meta for unet in found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs per update")
    parser.add_argument("--updates", type=int, default=30, help="timed updates")
    args = parser.parse_args()

    side = PRESETS[args.preset]["resolution"]
    torch.manual_seed(0)
    model = build(PRESETS[args.preset], getattr(torch, args.dtype), args.device)
    updates = args.updates + WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            adapter=AdapterConfig(rank=4),
            pairs_per_update=args.micro_batch,
            max_chosen_error_ratio=float("inf"),
            max_rejected_error_ratio=float("inf"),
            caption_dropout=0.0,
            output=folder,
            preview_every=0,
            preflight=False,
            learning=LearningConfig(
                updates=updates, checkpoint_every=updates, micro_batch=args.micro_batch, progress=False
            ),
        )
        algorithm = DPO(pair_set(random_pairs(2 * args.micro_batch, side), origin="benchmark"), config)
        trainer = Trainer(model, algorithm)
        algorithm.prepare()
        bare = bare_step(model, args.micro_batch, side)
        before = [seconds(bare, args.device) for _ in range(updates)][WARM_UP:]
        calls: Counter = Counter()
        count_calls(model, calls)
        trainer.train()
        counted = {name: calls[name] / updates for name in sorted(calls)}
        update_seconds = [line["loop/update_seconds"] for line in read_metrics(Path(folder))][WARM_UP:]
        after = [seconds(bare, args.device) for _ in range(updates)][WARM_UP:]
    bare_seconds, own_seconds = statistics.median(before + after), statistics.median(update_seconds)
    on_gpu = args.device != "cpu"
    report = {
        "preset": args.preset,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": args.dtype,
        "pairs_per_update": args.micro_batch,
        "resolution": side,
        "seconds_per_update": round(own_seconds, 4),
        "bare_loop_seconds": round(bare_seconds, 4),
        "update_by_bare_loop": round(own_seconds / bare_seconds, 4),
        "per_update": {
            name: counted.get(name, 0)
            for name in (
                "denoiser_forward_calls",
                "denoiser_forward_rows",
                "denoiser_backward_calls",
                "vae_encode_calls",
                "text_encode_calls",
            )
        },
        "denoisers_in_memory": denoisers_in_memory(),
        "peak_memory_gib": round(
            (torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            / 2**30,
            3,
        ),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
