"""Align a Stable Diffusion checkpoint with a reward by score as action, and compare images before and after.

    python examples/train_score_as_action.py --config configs/score_as_action_shapes.yaml
    python examples/train_score_as_action.py --config configs/score_as_action_sd15.yaml prompts=PROMPTS

Without a configuration a reward of a few lines is plugged into the caller's own pipeline: it likes images that are
blue, which the embedded shapes model learns in a minute.
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline

import rpo
import rpo.shapes
from rpo.runs.train import run
from rpo.runs.train_config import ScoreAsActionRunConfig
from rpo.trainers.rollouts.settings import OnlineLearningConfig, RolloutConfig, StepsConfig
from rpo.trainers.value.settings import ValueConfig


def blueness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """How much bluer than red each image is: any function of images and prompts is a reward."""
    return (images[:, 2] - images[:, 0]).mean(dim=(1, 2))


def demonstrate(folder: str, updates: int, *, resume: bool) -> None:
    """Train a pipeline on a reward of one's own, and draw the same noise before and after."""
    pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path())
    prompts = ["a red circle", "two green squares", "a blue square and a red circle", "a cyan triangle"]
    config = rpo.ScoreAsActionConfig(
        rollout=RolloutConfig(prompts=4, images_per_prompt=4, num_steps=8, guidance_scale=1.0),
        steps=StepsConfig(train_steps=4),  # of 8, drawn at random: the same gradient for less
        value=ValueConfig(pretrain_rollouts=1, updates=5),
        preview_every=10,
        output=folder,
        learning=OnlineLearningConfig(updates=updates, learning_rate=1e-3),
    )
    model = rpo.Checkpoint(pipe)
    trainer = rpo.Trainer(model, rpo.ScoreAsAction(blueness, prompts, config))
    draw = {"seed": 0, "images_per_prompt": 8, "num_steps": 20, "guidance_scale": 1.0}
    before = rpo.generate(model, prompts, **draw)
    result = trainer.train(resume=resume)
    after = rpo.generate(model, prompts, **draw)
    first, last = (blueness(images, prompts).mean().item() for images in (before, after))
    print(f"{result.updates} updates; blueness of the same noise, drawn by the ODE: {first:.3f} -> {last:.3f}")
    print(f"LoRA in {trainer.save()}, curves in {folder}/metrics.jsonl, images in {folder}/previews")


def main(arguments: list[str] | None = None) -> None:
    """Train what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file, such as those in configs/")
    parser.add_argument("--updates", type=int, default=24, help="of the demonstration (default 24)")
    parser.add_argument("--folder", default="runs/example/score_as_action", help="of the demonstration")
    parser.add_argument("--resume", action="store_true", help="continue a killed run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, with --config")
    args = parser.parse_args(arguments)

    if args.config is None and not args.overrides:
        demonstrate(args.folder, args.updates, resume=args.resume)
        return
    result = run(rpo.load_config(ScoreAsActionRunConfig, args.config, args.overrides), resume=args.resume)
    print(f"LoRA in {result.saved}, report in {result.report}")


if __name__ == "__main__":
    main()
