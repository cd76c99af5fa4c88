"""What the commands that train the embedded models can be told."""

from pathlib import Path

from rpo.ranges import Count, NotNegative, Positive, Seed, Text, WholeNumber
from rpo.settings import settings


@settings
class PretrainConfig:
    """Everything that a run depends on; each field is a flag of the command line."""

    out: Path = Path("runs/shapes-pretrain/checkpoint")
    """The finished diffusers folder; replaced in one move at the end."""
    state: Path = Path("runs/shapes-pretrain")
    """Where the run keeps its log, its checkpoints and its snapshots."""
    device: Text = "auto"
    """Device for training and evaluation; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines scenes, initial weights and noise; on a CPU the same seed gives the same weights."""
    scenes: Count = 24_576
    """Scenes drawn once and used over and over; 10,000 to 100,000."""
    vae_steps: Count = 1000
    """Updates of the autoencoder under a one-cycle schedule; 800 give 33 dB, more give more."""
    vae_batch_size: Count = 32
    """Images per update of the autoencoder."""
    vae_lr: Positive = 2e-3
    """Peak learning rate of the autoencoder."""
    steps: Count = 3000
    """Updates of UNet and text encoder; may be raised for a run that is to continue."""
    batch_size: Count = 48
    """Images per update of UNet and text encoder; 32 to 512."""
    lr: Positive = 1e-3
    """Learning rate of UNet and text encoder after the warm-up; 3e-4 to 2e-3."""
    evaluate: WholeNumber = 400
    """Images sampled per split for each evaluation; 0 skips evaluations."""
    held_out_scenes: WholeNumber = 1024
    """Scenes that no training sees, for the autoencoder's numbers."""
    snapshot_every: WholeNumber = 0
    """Save and evaluate the whole pipeline every so many steps, under `state/snapshots`; 0 for never."""
    log_every: Count = 50
    """Updates between two lines of the log."""
    save_every: Count = 250
    """Updates between two checkpoints of the training state."""
    fresh: bool = False
    """Discard the state of an earlier run instead of continuing it."""
    compile: bool = False
    """Compile the denoiser's forward pass; pays off on a GPU, in long runs."""
    bf16: bool = False
    """Forward pass of the denoiser in bfloat16; on a CPU it is slower than float32."""


@settings
class PretrainEditorConfig:
    """Everything that a run depends on."""

    out: Path = Path("runs/shapes-editor/checkpoint")
    """The finished diffusers folder; replaced in one move at the end."""
    state: Path = Path("runs/shapes-editor")
    """Where the run keeps its log, its encoded triples and its checkpoint."""
    device: Text = "auto"
    """Device for training and evaluation; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines triples, new weights and noise; on a CPU the same seed gives the same weights."""
    triples: Count = 40_000
    """Triples drawn once and used over and over; 20,000 to 200,000."""
    steps: Count = 10_000
    """Updates; may be raised for a run that is to continue."""
    batch_size: Count = 48
    """Triples per update; 32 to 512."""
    lr: Positive = 1e-3
    """Learning rate after the warm-up; 3e-4 to 2e-3."""
    evaluate: WholeNumber = 400
    """Edits for each evaluation, with known and as many with held-out sentences; 0 skips evaluations."""
    evaluate_every: WholeNumber = 0
    """Evaluate, and save under `state/snapshots`, every so many steps; 0 for only at the end."""
    log_every: Count = 50
    """Updates between two lines of the log."""
    save_every: Count = 250
    """Updates between two checkpoints of the training state."""
    fresh: bool = False
    """Discard the state of an earlier run instead of continuing it."""


@settings
class PretrainProxyConfig:
    """Everything that a run depends on; each field is a setting of the command line."""

    out: Path = Path("runs/shapes-proxy/checkpoint")
    """The finished folder of a CLIPModel; replaced in one move at the end."""
    state: Path = Path("runs/shapes-proxy")
    """Where the run keeps its log, its data and its checkpoint."""
    device: Text = "auto"
    """Device for training; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines scenes, initial weights and batches; on a CPU the same seed gives the same weights."""
    families: Count = 5000
    """Families of four scenes, drawn once and used over and over; 2,000 to 20,000."""
    steps: Count = 2400
    """Updates under a one-cycle schedule; 1,500 to 10,000."""
    stop: WholeNumber = 0
    """Updates after which to finish with the weights as they are, short of the schedule's end; 0 for all of `steps`.
    The same command without it goes on from there."""
    batch_families: Count = 16
    """Families per update, four images each; 8 to 64."""
    lr: Positive = 1e-3
    """Peak learning rate; 5e-4 to 2e-3."""
    weight_decay: NotNegative = 0.05
    """AdamW's decay of the weights; 0 to 0.2."""
    held_out_families: WholeNumber = 250
    """Families that no training sees, for the measurement at the end; 0 skips it."""
    prompts_per_split: WholeNumber = 200
    """Prompts of each split whose images are drawn from the base for the measurement; 0 skips it."""
    images_per_prompt: Count = 4
    """Images of each of these prompts; within-prompt agreement needs 2 or more."""
    log_every: Count = 50
    """Updates between two lines of the log."""
    save_every: Count = 200
    """Updates between two checkpoints of the training state."""
    fresh: bool = False
    """Discard the state of an earlier run instead of continuing it."""
