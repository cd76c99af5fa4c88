"""The settings of curation; their defaults curate the embedded world.

The kind of a critic, an instructor, a judge or an editor is a name of the package's own (`rpo.curation.components`), or
"package.module:attribute" of one's own.
"""

from dataclasses import field
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from rpo.config.ranges import (
    Cosine,
    Count,
    Finite,
    Fraction,
    GuidanceScale,
    NotEmpty,
    NotNegative,
    Positive,
    Seed,
    Text,
    WholeNumber,
)
from rpo.config.settings import settings
from rpo.curation.store.mark import StageName
from rpo.errors import InputError
from rpo.models.config import ModelConfig

DType = Literal["auto", "float32", "float16", "bfloat16"]
Policy = Literal["keep_improved", "both_directions", "always_edit"]
Orderings = Literal["own", "all", "prompt"]

SHARD = 128
"""Records of a shard: at 512 pixels about 100 MB."""

JUDGE_TOKENS = 256
"""Longest answer of a judge; a verdict takes 20 to 60."""


@settings
class SourceConfig:
    """Where the images come from that are to be criticised."""

    kind: Literal["generate", "folder", "pairs", "table"] = "generate"
    """"generate" draws them; the others import: a "folder" of images with captions, preference "pairs" of any form that
    `rpo data check` reads, or a "table" of images and captions that `datasets` opens."""

    renamed: ClassVar[dict[str, str]] = {"lora": "it is model.lora now"}

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

    def __post_init__(self) -> None:
        """Refuse noise for a solver that adds none."""
        if self.solver == "dpm_solver" and self.eta != 0:
            raise InputError(
                f"source.solver is dpm_solver with eta {self.eta:g}, but it is an ODE solver; set source.eta: 0, or "
                "source.solver: ddim"
            )


@settings
class ChatConfig:
    """Which critic, instructor or judge, and how it is asked; those of shapes see with the verifier's eyes."""

    kind: Text = "shapes"
    """"shapes" is that of the embedded world, "server" an OpenAI-compatible server, "local" a model on this machine;
    "package.module:attribute" is one of your own. A judge may also be a "reward", whose scores are compared."""

    model: str = ""
    """Name of the model, as the server or the Hub calls it; of the reward, for a judge that is one."""

    base_url: str = ""
    """Address of the server, as in http://localhost:8000/v1; a key belongs into OPENAI_API_KEY."""

    prompt: str = ""
    """Path of a prompt template of your own; nothing is the package's."""

    concurrency: Count = 8
    """Requests under way at the same time, for a server; 4 to 64."""

    batch_size: Count = 1
    """Images of one request or one forward; more than 1 helps a local model only."""

    timeout_seconds: Positive = 120.0
    """How long one request may take, from connecting to the last byte; a retry is another request."""

    max_retries: WholeNumber = 5
    """Further tries of a failed request, each after a longer pause."""

    max_tokens: Count | None = 1024
    """Longest answer; a critique takes 100 to 500, three instructions 30 to 100, a verdict 20 to 60. Null is
    not sent, for a server that does not take it."""

    temperature: NotNegative | None = 0.0
    """0 is the likeliest answer; more varies it. Null is not sent, for a server that does not take it."""

    seed: Seed | None = 0
    """Of the sampling, where the temperature is not 0. Null is not sent, for a server that does not take it."""

    device: Text = "auto"
    """Of a local model; "auto" takes the GPU when there is one."""

    dtype: DType = "auto"
    """Of a local model; "auto" is what its checkpoint says."""

    answer_format: Literal["json_schema", "prompt"] = "json_schema"
    """How a server is held to the form of the answer: "json_schema" lets it enforce the schema; "prompt" only asks for
    it, for a server that cannot. The answer is checked in both cases."""

    cache: bool = True
    """Whether answers are kept in the run's folder, so that a question is asked once."""

    def __post_init__(self) -> None:
        """Refuse an address that cannot be written down."""
        check_address(self.base_url)


@settings
class EditorConfig:
    """Which editor, and how it edits."""

    kind: Text = "shapes"
    """"shapes" is the small editor of the embedded world; "package.module:attribute" is one of your own. The others are
    listed in rpo/curation/editors."""

    model: str = ""
    """Hub id or folder of the weights; nothing is what the kind is known for."""

    base_model: str = ""
    """Hub id or folder of the base, for an editor that is an addition to one (ControlNet)."""

    num_steps: Count | None = None
    """Denoising steps; nothing is what the kind recommends."""

    guidance_scale: NotNegative | None = None
    """Strength of the instruction; nothing is what the kind recommends."""

    image_guidance_scale: NotNegative | None = None
    """How closely the source is kept; nothing is what the kind recommends."""

    conditioning_scale: NotNegative = 1.0
    """Strength of a ControlNet; 0 to 1."""

    batch_size: Count = 4
    """Images edited at once."""

    edits_per_image: Count = 1
    """By the same instruction, from different noise. Two or more are also ordered among each other: pairs that an
    editor learns from (`rpo curate export --form edits`)."""

    seed: Seed = 0
    """Of the edits; each image has a generator of its own made of it and of the record."""

    device: Text = "auto"
    """"auto" takes the GPU when there is one."""

    dtype: DType = "auto"
    """"auto" is half precision on a GPU, float32 elsewhere."""


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

    critic: ChatConfig = field(default_factory=ChatConfig)
    """Says what is wrong with each."""

    instructor: ChatConfig = field(default_factory=ChatConfig)
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

    renamed: ClassVar[dict[str, str]] = {"chunk": "it is shard now", "part": "it is shards now"}

    shard: Count = SHARD
    """Records that one worker does together, that are sealed together, and that a kill costs; 100 to 1000. A run keeps
    what it was begun with."""

    shards: str = ""
    """Which share of the shards this process does, as in 0/4; nothing means what torchrun or accelerate says (RANK and
    WORLD_SIZE), or all."""

    engine: Literal["local", "ray"] = "local"
    """Who does the shards: "local" is this machine, "ray" a cluster of Ray (RAY_ADDRESS, or one that is started here).
    """

    workers: Count = 1
    """Processes, or actors of Ray, each of which loads every model once; one per GPU. With 1 and "local" there is no
    process but this one."""

    stop_after: StageName = "decisions"
    """The last stage to do: with "sources" a GPU is free for a server afterwards; run again for the rest."""

    redo: StageName | None = None
    """In a resumed run, the first stage that may be made otherwise than before; it and those after it are done again.
    """

    progress: bool = True
    """Show how far each stage is, how much of it came through, and how fast."""


@settings
class AuditConfig:
    """What is audited, and on how many images."""

    critic: ChatConfig | None = None
    """The critic to try on noise and blank images; nothing is that of the run."""

    judge: ChatConfig = field(default_factory=lambda: ChatConfig(max_tokens=JUDGE_TOKENS))
    """The judge whose position bias is measured."""

    second_judge: ChatConfig | None = field(
        default_factory=lambda: ChatConfig(kind="reward", model="shapes-clip", max_tokens=JUDGE_TOKENS)
    )
    """The judge that it is compared with; null for none."""

    pairs: Count = 100
    """Pairs of source and edit to judge; 100 tell a share within ten points."""

    controls: Count = 20
    """Noise images, and as many blank ones; 20 show what happens often."""

    seed: Seed = 0
    """Of the choice of pairs and of the noise."""


def check_address(base_url: str, key: str = "") -> None:
    """Refuse an address of a server that is none, or that holds what must not be written down; it is never shown.

    Args:
        base_url: What should be the address; empty for the hosted server.
    """
    if not base_url:
        return
    try:
        parts = urlsplit(base_url)
        found = {
            "a user or password": "@" in parts.netloc,
            "a query": "?" in base_url,
            "a fragment": "#" in base_url,
            "the key": bool(key) and key in base_url,
            "no http:// or https:// at its start": parts.scheme not in ("http", "https"),
            "no host": not parts.hostname,
        }
    except ValueError:
        found = {"no host that can be read": True}
    wrong = [what for what, is_so in found.items() if is_so]
    if wrong:
        raise InputError(
            f"base_url (not shown here) has {' and '.join(wrong)}; expected a plain address as in "
            "http://localhost:8000/v1, for it is kept with the run; put a key or password into the environment "
            "variable OPENAI_API_KEY, which is written nowhere"
        )
