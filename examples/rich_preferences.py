"""Rich preferences from end to end in a minute: find what is wrong, say what to do, edit, keep what got better, train.

    python examples/rich_preferences.py
    python examples/rich_preferences.py source.limit=200 critic.kind=server critic.model=NAME critic.base_url=URL

Any setting of `rpo curate` may be changed; without any, the embedded world criticises and edits itself.
"""

import argparse
import json
from pathlib import Path

from rpo import DPO, Checkpoint, CurateConfig, DPOConfig, LearningConfig, Trainer, curate, load_config, read_pairs
from rpo.curation.export import export
from rpo.curation.page import write_page
from rpo.curation.status import status_of
from rpo.objectives.preference.region import RegionConfig

SMALL = ["output=runs/rich_preferences", "source.limit=24", "source.images_per_prompt=2", "editor.batch_size=32"]
SMALL += ["source.num_steps=20", "source.eta=1.0", "source.guidance_scale=2.0"]  # at which shapes draws best


def main(arguments: list[str] | None = None) -> None:
    """Curate, look at one pair, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on with a run of the same output")
    parser.add_argument("--updates", type=int, default=20, help="of the training (default 20)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the curation to change")
    args = parser.parse_args(arguments)

    # What the curation finds out is in its folder at once, stage by stage; killed, it goes on with --resume.
    config = load_config(CurateConfig, None, [*SMALL, *args.overrides])
    run = curate(config, resume=args.resume)
    print(status_of(run))
    print(f"to leaf through: {write_page(run)}")

    # A pair knows where it comes from.
    pairs = read_pairs(export(run).path)
    pair = pairs[0]
    for problem in json.loads(str(pair.details.get("critique", '{"problems": []}')))["problems"]:
        print(f"{pair.prompt!r}: {problem['what']}")
    told = pair.details.get("edit_instruction", "nothing, both are the model's own")
    print(f"the editor was told: {told}; score {pair.rejected_score} -> {pair.chosen_score}")

    # A pair of an image and its edit says something where the two differ, and nothing elsewhere.
    model = Checkpoint.load(config.source.model.source)
    settings = DPOConfig(
        output=str(Path(config.output) / "dpo"),
        pairs_per_update=8,
        region=RegionConfig(),
        preview_every=0,
        learning=LearningConfig(updates=args.updates, learning_rate=1e-3),
    )
    trainer = Trainer(model, DPO(pairs, settings))
    trained = trainer.train(resume=args.resume)
    print(f"loss log 2 -> {trained.metrics['loop/loss']:.3f}; LoRA in {trainer.save()}")


if __name__ == "__main__":
    main()
