"""What `rpo quickstart` can be told."""

from dataclasses import field

from rpo.curation.curate_config import CurateConfig, DecideConfig, EditorConfig, SourceConfig
from rpo.ranges import Count, Seed, Text
from rpo.settings import settings
from rpo.shapes import ETA, GUIDANCE_SCALE, NUM_STEPS
from rpo.trainers.dpo_config import DPOConfig
from rpo.training.loop_config import LoopConfig


@settings
class QuickstartConfig:
    """Settings of the quickstart; the defaults take about 19 minutes of one CPU core."""

    output: Text = "runs/quickstart"
    """The run's folder: pairs, metrics, LoRA, report."""

    seed: Seed = 0
    """Of prompts, noise and training; the same seed gives the same numbers."""

    prompts: Count = 690
    """Training prompts to draw images of; 100 to 690. More give more pairs."""

    images_per_prompt: Count = 8
    """Images drawn of each training prompt; 1 to 8. 4 is faster and gains less."""

    curate: CurateConfig = field(
        default_factory=lambda: CurateConfig(
            source=SourceConfig(num_steps=NUM_STEPS, eta=ETA, guidance_scale=GUIDANCE_SCALE),
            editor=EditorConfig(batch_size=64),
            decide=DecideConfig(
                rewards={"critic": 1.0, "shapes-clip": 0.0}, min_chosen={"critic": 10.0}, orderings="prompt"
            ),
            evaluation="",  # the critic sees with the verifier's eyes, and both rewards filter
        )
    )
    """How images become pairs; its output, prompts and seed are those of the run."""

    evaluation_prompts: Count = 320
    """Held-out prompts of each domain, one image each by base and by LoRA. More narrow the intervals."""

    batch_size: Count = 64
    """Images drawn at once."""

    device: Text = "auto"
    """"auto" takes the GPU when there is one."""

    dpo: DPOConfig = field(
        default_factory=lambda: DPOConfig(
            beta=150.0,
            sft_weight=0.05,
            rank=16,
            pairs_per_update=32,
            micro_batch=32,
            caption_dropout=0.1,
            max_chosen_error_ratio=2.0,
            loop=LoopConfig(
                updates=450,
                learning_rate=1e-3,
                lr_schedule="cosine",
                warmup_updates=10,
                ema_decay=0.97,
                checkpoint_every=90,
            ),
        )
    )
    """Of the training; its folder and seed are those of the run."""
