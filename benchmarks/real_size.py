"""What `rpo plan` tells of checkpoints at their real size, against torch's own counters and against real updates.

    python benchmarks/real_size.py count                                  # FLOPs and bytes; a minute, no weights
    python benchmarks/real_size.py update --size sd15 --resolution 256 --dtype bfloat16    # by the public Trainer
    python benchmarks/real_size.py update --size sdxl --resolution 512 --dtype bfloat16
    python benchmarks/real_size.py write --size sdxl --folder runs/sdxl    # configurations alone, then
    rpo plan dpo configs/dpo_sdxl_12gb.yaml model.source=runs/sdxl

Weights are random: they do not change what an update costs. Prints one JSON object. Needs Linux for the peak of memory
on the CPU, which is the largest resident set since the checkpoint was built, less what the process had before; with
MALLOC_MMAP_THRESHOLD_=65536 in the environment, what is let go is given back, and gaps of the allocator do not count.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from dpo_step import random_pairs
from instruments import forget_peak_memory
from real_sizes import SIZES, Architecture, parts, random, write_configs
from torch.utils.flop_counter import FlopCounterMode

from rpo.adapters.lora import reference
from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.config.load import load_config
from rpo.data.preference import pair_set
from rpo.models.checkpoint import Checkpoint
from rpo.runs.plan import plan
from rpo.runs.train_config import DPORunConfig, part_of
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

SIDE = {"sd15": 512, "sdxl": 1024, "sd35_medium": 1024, "flux1_dev": 1024}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["count", "update", "write"])
    parser.add_argument("--size", choices=SIZES, help="of which checkpoint; `count` takes all by default")
    parser.add_argument("--resolution", type=int, help="pixels along a side; the checkpoint's own by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--folder", type=Path, help="where `write` writes to")
    args = parser.parse_args()
    if args.what == "write":
        write_configs(SIZES[args.size], args.folder)
        return
    if args.what == "count":
        found = {size: count(size, args.resolution) for size in SIZES if args.size in (None, size)}
    else:
        found = update(args)
    print(json.dumps(found, indent=2))


def settings(folder: Path, size: str, words: list[str]) -> DPORunConfig:
    """Of a run on one pair an update."""
    write_configs(SIZES[size], folder)
    words = [f"model.source={folder}", "pairs_per_update=1", "learning.micro_batch=1", "preview_every=0", *words]
    return load_config(DPORunConfig, None, words)


def count(size: str, resolution: int | None) -> dict[str, Any]:
    """FLOPs of one forward by plan and by torch on the meta device, and the parameters of each part."""
    side = resolution or SIDE[size]
    with tempfile.TemporaryDirectory() as folder:
        found = plan(settings(Path(folder), size, [f"resolution={side}", "model.dtype=bfloat16"]))
    counted = torch_flops(SIZES[size], side)
    parameters = {name: number for name, (number, _) in found.parts.items()}
    return {
        "resolution": side,
        "plan_tflop": found.forward.flops / 1e12,
        "torch_tflop": counted / 1e12,
        "plan_by_torch": found.forward.flops / counted,
        "forward_and_backward_u": found.backward,
        "parameters_are_the_published": parameters == SIZES[size].parameters,
        "bytes_are_two_each": all(size == 2 * number for number, size in found.parts.values()),
        "parameters": parameters,
        "peak_gib": found.peak / 2**30,
    }


def torch_flops(size: Architecture, side: int) -> int:
    """Of one forward, called as the network's own signature says, without anything of rpo."""
    _, cls, config = size.denoiser
    with torch.device("meta"):
        network = getattr(diffusers, cls)(**config)
        latent, time = torch.empty(1, config.get("in_channels", 4), side // 8, side // 8), torch.empty(1)
        if cls == "SD3Transformer2DModel":
            told: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 77 + 256, 4096)}
            told["pooled_projections"] = torch.empty(1, 2048)
        elif cls == "FluxTransformer2DModel":
            latent = torch.empty(1, (side // 16) ** 2, 64)
            told = {"encoder_hidden_states": torch.empty(1, 512, 4096), "pooled_projections": torch.empty(1, 768)}
            told |= {"txt_ids": torch.empty(512, 3), "img_ids": torch.empty(latent.shape[1], 3)}
            told |= {"guidance": torch.empty(1)}
        else:
            told = {"encoder_hidden_states": torch.empty(1, 77, config["cross_attention_dim"])}
            if config.get("addition_embed_type"):
                told["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(latent, timestep=time, **told)
    return counter.get_total_flops()


def update(args: argparse.Namespace) -> dict[str, Any]:
    """LoRA-DPO updates of one pair, and what they took."""
    torch.manual_seed(0)
    side, on_gpu = args.resolution or SIDE[args.size], args.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        words = [f"resolution={side}", f"model.dtype={args.dtype}", f"learning.updates={args.updates}"]
        words += [f"adapter.gradient_checkpointing={str(args.checkpointing).lower()}", f"output={folder}/run"]
        words += ["max_chosen_error_ratio=.inf", "max_rejected_error_ratio=.inf", "preflight=false"]
        words += [f"learning.checkpoint_every={args.updates}", "learning.progress=false"]
        config = settings(Path(folder) / "configs", args.size, words)
        told = plan(replace(config, encode_ahead=on_gpu))  # from the CPU nothing leaves
        forget_peak_memory(torch.device(args.device))
        before, began = resident("VmRSS"), time.perf_counter()
        model = Checkpoint(built(SIZES[args.size], getattr(torch, args.dtype)).to(args.device))
        loaded = time.perf_counter()
        trainer = Trainer(model, DPO(pair_set(random_pairs(2, side), origin="benchmark"), part_of(config, DPOConfig)))
        trainer.algorithm.prepare()
        at_rest = resident("VmRSS") - before
        forget_peak_memory(torch.device(args.device))
        started = time.perf_counter()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
        seconds = [line["loop/update_seconds"] for line in read_metrics(trainer.folder)]
        forward, both = bare(model, side, on_gpu=on_gpu)
        saved = trainer.save()
        return {
            "size": args.size,
            "denoiser_parameters": told.parts[SIZES[args.size].denoiser[0]][0],
            "resolution": side,
            "dtype": args.dtype,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "gradient_checkpointing": args.checkpointing,
            "seconds_to_build": loaded - began,
            "seconds_to_first_update": started - loaded + seconds[0],
            "seconds_per_update": seconds,
            "forward_seconds_u": forward,
            "update_in_u": min(seconds) / forward,
            "bare_update_in_u": (2 * forward + 2 * both) / forward,
            "planned_update_in_u": told.cost,
            "at_rest_gib": at_rest / 2**30,
            "peak_gib": peak / 2**30,
            "planned_peak_gib": told.peak / 2**30,
            "peak_by_plan": peak / told.peak,
            "lora_mib": (saved / WEIGHT_FILE).stat().st_size / 2**20,
            "checkpoint_mib": sum(one.stat().st_size for one in trainer.folder.glob("checkpoint-*/*")) / 2**20,
        }


def built(size: Architecture, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A pipeline of random weights, which are drawn on the device."""
    options = {"requires_safety_checker": False} if "safety_checker" in size.absent else {}
    made = parts(size, random(dtype, device))
    return getattr(diffusers, size.pipeline)(**made, **dict.fromkeys(size.absent), **options).to(device)


def bare(model: Checkpoint, side: int, *, on_gpu: bool) -> tuple[float, float]:
    """Seconds of one latent forward without a graph, and forward and backward, with nothing around them."""
    canvas, cond = model.canvas_of(side), model.encode_prompts(["a"])
    x_t, timestep = torch.randn(1, *model.latent_shape(canvas), device=model.device), torch.tensor([500])
    marks = [clock(on_gpu=on_gpu)]
    with reference(model.denoiser):
        model.predict(x_t, timestep, cond)
    marks.append(clock(on_gpu=on_gpu))
    model.predict(x_t, timestep, cond).square().mean().backward()
    marks.append(clock(on_gpu=on_gpu))
    return marks[1] - marks[0], marks[2] - marks[1]


def clock(*, on_gpu: bool) -> float:
    """Seconds, at which a GPU is done."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(what: str) -> int:
    """Bytes of this process by the kernel's name for them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text("utf-8").split("\n")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
