"""Align a Stable Diffusion checkpoint with preference pairs by Diffusion-DPO, and compare an image before and after.

    python examples/train_dpo.py --config configs/dpo_shapes.yaml data.source=runs/quickstart/round-1/pairs
    python examples/train_dpo.py --config configs/dpo_sd15.yaml data.source=PAIRS model.source=CHECKPOINT

Without a configuration it makes a few pairs of the shapes world and trains on them for a minute.
"""

import argparse
from pathlib import Path

import numpy as np

from rpo.adapters.loading import load_model
from rpo.config.load import load_config
from rpo.data.preference import PreferencePair, encode_png
from rpo.data.writers import write_pairs
from rpo.runs.train import run
from rpo.runs.train_config import DPORunConfig
from rpo.sampling.sample import generate
from rpo.shapes.world import draw_scene, render, sample_prompts
from rpo.training.log import read_metrics


def demonstration_pairs(folder: Path, count: int = 64) -> None:
    """Pairs whose chosen image shows the prompt, and whose rejected image shows another prompt of the same kind."""
    prompts = sample_prompts("train", count, seed=0)
    scenes = [
        encode_png(render(draw_scene(prompt, np.random.default_rng(index)))) for index, prompt in enumerate(prompts)
    ]
    pairs = [
        PreferencePair(prompt.text, chosen=scene, rejected=scenes[index - 4], source="examples/train_dpo.py")
        for index, (prompt, scene) in enumerate(zip(prompts, scenes, strict=True))
        if prompts[index - 4] != prompt
    ]
    write_pairs(folder, pairs)


def main(arguments: list[str] | None = None) -> None:
    """Train what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file, such as those in configs/")
    parser.add_argument("--resume", action="store_true", help="continue a killed run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as learning.updates=10"
    )
    args = parser.parse_args(arguments)

    overrides = list(args.overrides)
    if args.config is None and not any(word.startswith("data.source=") for word in overrides):
        demonstration_pairs(Path("runs/example/pairs"))
        overrides = ["data.source=runs/example/pairs", "output=runs/example/dpo", "learning.updates=20", *overrides]
    config = load_config(DPORunConfig, args.config, overrides)
    result = run(config, resume=args.resume)

    first, last = read_metrics(result.trained.folder)[0], result.trained.metrics
    print(f"loss {first['loop/loss']:.3f} -> {last['loop/loss']:.3f}; LoRA in {result.saved}")
    model = load_model(config.model)
    draw = {"seed": 0, "num_steps": 20, "guidance_scale": 3.0}
    before = generate(model, ["a red circle above a blue square"], **draw)
    model.pipe.load_lora_weights(str(result.saved))
    after = generate(model, ["a red circle above a blue square"], **draw)
    print(f"the same noise, before and after: mean absolute pixel difference {(after - before).abs().mean():.3f}")


if __name__ == "__main__":
    main()
