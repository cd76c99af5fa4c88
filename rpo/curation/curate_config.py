"""The settings of curation; their defaults curate the embedded world."""

from dataclasses import field
from typing import Annotated, Literal

from rpo.curation.component_config import CriticConfig, EditorConfig, InstructorConfig, JudgeConfig
from rpo.curation.folder import StageName
from rpo.errors import InputError
from rpo.models.config import ModelConfig
from rpo.ranges import Cosine, Count, Finite, Fraction, GuidanceScale, NotEmpty, NotNegative, Seed, Text
from rpo.settings import settings

Policy = Literal["keep_improved", "both_directions", "always_edit"]
Orderings = Literal["own", "all", "prompt"]


@settings
class SourceConfig:
    """Where the images come from that are to be criticised."""

    kind: Literal["generate", "folder", "pairs", "table"] = "generate"
    """"generate" draws them; the others import: a "folder" of images with captions, preference "pairs" of any form that
    `rpo data check` reads, or a "table" of images and captions that `datasets` opens."""

    path: str = ""
    """For an import: folder, file or `datasets` id."""

    split: Text = "train"
    """For an import: which split of a source with several."""

    image_column: Text = "image"
    """For a table: where its images are."""

    caption_column: Text = "caption"
    """For a table: where its captions are."""

    limit: Count | None = None
    """Only the first so many prompts, images or pairs; nothing means all. May be raised in a resumed run."""

    prompts: Text = "shapes"
    """To generate: a text file with one prompt per line, a .jsonl file whose lines have a "prompt", or "shapes"."""

    images_per_prompt: Count = 2
    """To generate: images of each prompt; 1 to 8."""

    seed: Seed = 0
    """To generate: of the prompts' draw and of the noise; another seed gives other images."""

    num_steps: Count | None = None
    """To generate: steps; 20 to 50 of DDIM, 8 to 15 of DPM-Solver++. Nothing is the pipeline's own, 50 for Stable
    Diffusion; shapes wants 20."""

    solver: Literal["ddim", "dpm_solver"] = "ddim"
    """To generate: DDIM, or DPM-Solver++ (deterministic: set `eta: 0`), which needs half as many steps."""

    eta: Fraction = 0.0
    """To generate: noise level of the steps; 0 is deterministic, as usual for Stable Diffusion, 1, for shapes,
    ancestral."""

    guidance_scale: GuidanceScale | None = None
    """To generate: 1 is no guidance; nothing is the pipeline's own, 7.5 for Stable Diffusion; shapes wants 2."""

    batch_size: Count = 32
    """Images drawn, or read, at once."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """To generate: the checkpoint."""

    lora: str = ""
    """To generate: folder or file of a LoRA for the checkpoint; nothing means none."""

    def __post_init__(self) -> None:
        """Refuse noise for a solver that adds none."""
        if self.solver == "dpm_solver" and self.eta != 0:
            raise InputError(
                f"source.solver is dpm_solver with eta {self.eta:g}, but it is an ODE solver; set source.eta: 0, or "
                "source.solver: ddim"
            )


@settings
class DecideConfig:
    """Which source and edit become a pair. Scores are those of rewards on the original caption."""

    rewards: Annotated[dict[str, NotNegative], NotEmpty()] = field(default_factory=lambda: {"shapes-clip": 0.0})
    """Names of the rewards that filter, each with the least difference that it must see (on its own scale). The first
    one says which image is better; with the margin 0 any difference will do. "critic" is what the critic itself thinks
    of an image overall, 1 to 10: it is then asked about every edit, too."""

    min_chosen: dict[str, Finite] = field(default_factory=dict)
    """Least score of the preferred image by some of the rewards, as in {"critic": 10}: better is not yet good."""

    agreement: bool = True
    """Whether all rewards must see the same image as better, each by its margin; otherwise the first one alone."""

    policy: Policy = "keep_improved"
    """"keep_improved" keeps edits that score higher than their source; "both_directions" also keeps those that score
    lower, with the source preferred; "always_edit" prefers the edit whatever the rewards say."""

    min_distance: Fraction = 0.002
    """Least mean absolute difference of source and edit, pixels being in [0, 1]; below it nothing changed. On shapes,
    edits that mended an image lie between 0.004 and 0.1."""

    max_distance: Fraction = 0.3
    """The largest; above it the edit is another image."""

    similarity_model: str = ""
    """Folder or hub id of a CLIP checkpoint that compares source and edit as well; nothing means none."""

    min_similarity: Cosine = 0.5
    """Least cosine of the two embeddings, with a `similarity_model`."""

    max_similarity: Cosine = 1.0
    """The largest."""

    orderings: Orderings = "own"
    """"own" compares each edit with its own source. "all", for sources that are the two sides of preference pairs,
    makes up to six pairs out of both sides and both edits; the given pair keeps its label. "prompt", for images that
    are generated, also orders the model's own images of each prompt and pairs the best with the worst, the second best
    with the second worst and so on, so that images with nothing to fix serve, too."""


@settings
class CurateConfig:
    """A whole run of curation: `rpo curate CONFIG key=value …`."""

    output: Text = "runs/curate"
    """The run's folder; everything that is found out is kept there."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """The images."""

    critic: CriticConfig = field(default_factory=CriticConfig)
    """Says what is wrong with each."""

    instructor: InstructorConfig = field(default_factory=InstructorConfig)
    """Says what an editor should do about it."""

    editor: EditorConfig = field(default_factory=EditorConfig)
    """Does it."""

    instruct_sound: bool = False
    """Whether the instructor is also asked where the critic found nothing to fix; for one that reads captions only."""

    decide: DecideConfig = field(default_factory=DecideConfig)
    """Keeps what got better."""

    evaluation: str = "shapes"
    """A reward that judges the kept pairs and is not among those that filter; nothing means none."""

    score_batch_size: Count = 32
    """Records scored at once."""

    chunk: Count = 256
    """Records that go through the stages together; less shows pairs earlier, more fills large batches."""

    part: str = ""
    """Which share of the records this process does, as in 0/4; nothing means what torchrun or accelerate says (RANK and
    WORLD_SIZE), or all."""

    stop_after: StageName = "decisions"
    """The last stage to do: with "sources" a GPU is free for a server afterwards; run again for the rest."""

    progress: bool = True
    """Show how far each stage is, how much of it came through, and how fast."""


@settings
class AuditConfig:
    """What is audited, and on how many images."""

    critic: CriticConfig | None = None
    """The critic to try on noise and blank images; nothing is that of the run."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The judge whose position bias is measured."""

    second_judge: JudgeConfig | None = field(default_factory=lambda: JudgeConfig(kind="reward", model="shapes-clip"))
    """The judge that it is compared with; null for none."""

    pairs: Count = 100
    """Pairs of source and edit to judge; 100 tell a share within ten points."""

    controls: Count = 20
    """Noise images, and as many blank ones; 20 show what happens often."""

    seed: Seed = 0
    """Of the choice of pairs and of the noise."""
