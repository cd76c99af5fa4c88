"""The arms of `objectives.py`: each is one entry of a table, a command of the package with its settings.

One evaluation is one latent through a denoiser, forward or backward; whatever a run asks counts: rollouts, training,
the reference, the old policy, the watched KL. Images that a reward was asked about are counted apart. What an update
costs is counted on runs of one and of two updates, so that a run knows beforehand how many its budget buys.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from rpo.adapters.loading import load_model
from rpo.cli.main import COMMANDS
from rpo.config.load import load_config
from rpo.curation.curate import Components
from rpo.curation.nothing import NothingToFix
from rpo.files.whole import read_lines
from rpo.models.checkpoint import Checkpoint
from rpo.rewards import load_reward
from rpo.runs.align import ROUNDS, align
from rpo.runs.align_config import AlignConfig
from rpo.runs.train import ONLINE
from rpo.runs.train_config import part_of
from rpo.shapes.prompts import sample_prompts
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN_PROMPTS = 512
"""An equal share of each kind of prompt."""

REWARDS = {"graded": "shapes", "proxy": "shapes-clip"}
"""What is learnt from: the verifier, which is the truth; or a model that agrees with it often."""

WATCHING = ("learning.progress=false", "preview_every=0", "preflight=false")
UNWATCHED = ("monitor.every=null", "monitor.held_out=[]")
"""What watches a run costs evaluations, too, and holds out the proxy that others learn from."""


@dataclass(frozen=True)
class Arm:
    """One way to learn from a reward: a command of the package, and what is not as in its configuration of `shapes`."""

    title: str
    family: str
    """Which arms share a chart, four at most."""
    command: str
    overrides: tuple[str, ...] = ()
    sampler: str = "uniform 10, eta 1, guidance 2"
    """That of its rollouts, among those that all are judged by."""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Further overrides with one of the rewards."""
    rewards: tuple[str, ...] = tuple(REWARDS)
    """Those that it can learn from."""

    def words(self, reward: str) -> tuple[str, ...]:
        """All overrides with a reward."""
        return (*self.overrides, *self.also.get(reward, ()))


PATHS, NOISED, GROUPS, SLOPES, OTHERS = (
    "along paths",
    "whole images",
    "whole images, by the old policy or the group",
    "slopes",
    "others",
)

ALONG_PATHS = ("learning.learning_rate=1e-3",)
"""At 3e-3 DDPO fell below the base, at the 3e-4 of the configuration it hardly moves."""

OF_IMAGES = ("learning.learning_rate=3e-3",)
"""At 1e-3 score as action by endpoints learnt half as fast, at 1e-2 no faster, four times as far from the base."""


def _endpoint(title: str, family: str, kind: str, *overrides: str) -> Arm:
    return Arm(title, family, "endpoint", (f"objective.kind={kind}", *OF_IMAGES, *overrides))


SLOPES_OF_THE_PROXY = ("learning.learning_rate=3e-4",)
"""Four times as many updates as the others, of single images, and so a lower rate: 3e-3 lost accuracy at once."""


def _slope(title: str, kind: str, *overrides: str) -> Arm:
    words = (f"objective.kind={kind}", *SLOPES_OF_THE_PROXY, *overrides)
    return Arm(title, SLOPES, "reward-gradient", words, rewards=("proxy",))


ARMS = {
    "ddpo": Arm("DDPO", PATHS, "grpo", ("baseline=prompt_history", *ALONG_PATHS)),
    "grpo": Arm("GRPO", PATHS, "grpo", ALONG_PATHS),
    "pathwise": Arm(
        "score as action, pathwise",
        PATHS,
        "score-as-action",
        ("estimator=pathwise", "value.uses_reward=false", "value.sees_latents=true", *ALONG_PATHS),
    ),
    "likelihood": Arm("score as action, likelihood", PATHS, "score-as-action", ALONG_PATHS),
    "endpoint": Arm("score as action by endpoints", NOISED, "endpoint", OF_IMAGES),
    "awm": _endpoint("AWM", NOISED, "awm"),
    "ram": _endpoint("RAM", NOISED, "ram"),
    "rvm": _endpoint("RVM", NOISED, "rvm"),
    "nft": _endpoint("DiffusionNFT", GROUPS, "nft"),
    "par": _endpoint("PAR", GROUPS, "par"),
    "dgpo": _endpoint("DGPO", GROUPS, "dgpo"),
    "rebel": _endpoint("REBEL", GROUPS, "rebel"),
    "draft1": _slope("DRaFT-1", "draft", "objective.last_steps=1"),
    "draft5": _slope("DRaFT-5", "draft", "objective.last_steps=5"),
    "adjoint": _slope(
        "Adjoint Matching",
        "adjoint_matching",
        "kl_weight=0.05",
        "steps.train_steps=4",
        "steps.guidance_scale=1",
        "steps.freeze_negative=false",
    ),
    "dpo": Arm(
        "iterated DPO",
        OTHERS,
        "align",
        (
            "curate.source.limit=64",
            "dpo.learning.updates=40",
            "dpo.learning.checkpoint_every=40",
            "held_out.count=2",
            "curate.progress=false",
        ),
        sampler="DDIM 20, eta 1, guidance 2",
    ),
}


class Counter:
    """Counts, of whatever runs inside, latents through denoisers and images that a reward was asked about.

    Attributes:
        evaluations: A latent counts once, and once more where a graph is made, for the way back.
        images: Every image, as often as it is asked about.
    """

    def __init__(self, reward: str):
        """Start at 0."""
        self.evaluations = self.images = 0
        self._reward: Any = type(load_reward(reward))

    def __enter__(self) -> "Counter":
        """Begin to count."""
        self._handle = register_module_forward_hook(self._add, with_kwargs=True)
        asked = self._asked = self._reward.__call__

        @wraps(asked)
        def counting(reward: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            self.images += len(images)
            return asked(reward, images, *args, **kwargs)

        self._reward.__call__ = counting
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._handle.remove()
        self._reward.__call__ = self._asked

    def _add(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if type(network).__name__ == "UNet2DConditionModel":
            self.evaluations += len(args[0]) * (2 if torch.is_grad_enabled() else 1)


@dataclass(frozen=True)
class Cost:
    """Evaluations and images, of what comes before the first update and of each update; for rounds, of each round."""

    start: tuple[int, int]
    update: tuple[int, int]

    def after(self, updates: int) -> dict[str, int]:
        """What so many updates come to."""
        evaluations, images = (one + updates * more for one, more in zip(self.start, self.update, strict=True))
        return {"evaluations": evaluations, "images_scored": images}

    def updates(self, evaluations: float) -> int:
        """How many a budget buys."""
        return round((evaluations - self.start[0]) / self.update[0])


@dataclass(frozen=True)
class Job:
    """One run: an arm with a reward and a seed."""

    arm: str
    reward: str
    seed: int
    budget: int
    images: int
    """Prompts of each split that it is judged by."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run must have in common with it to stand for it."""
        return {
            "command": ARMS[self.arm].command,
            "overrides": list(ARMS[self.arm].words(self.reward)),
            "budget": self.budget,
            "images": self.images,
        }

    def folder(self, root: Path) -> Path:
        """Where it lies; of other settings another one."""
        digest = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:8]
        return root / self.reward / f"{self.arm}-{self.seed}-{digest}"


class Run:
    """What a job trains by; an update is the unit of its length."""

    def __init__(self, job: Job, place: Path):
        """Count what an update costs.

        Args:
            place: The folder of the run.
        """
        self.job, self.place, self.arm = job, place, ARMS[job.arm]
        self.cost = self._counted()

    def until(self, updates: int) -> tuple[Checkpoint, dict[str, float]]:
        """Train on to so many updates: the model as it is then, and what is known of the training."""
        trainer = self._trainer(self.place, (f"learning.updates={updates}", "learning.checkpoint_every=50"))
        print(trainer.plan(), flush=True)
        ended = trainer.train(resume=self.place.exists())
        entries = read_metrics(trainer.folder)
        recent = [entry["reward/mean"] for entry in entries[-max(1, len(entries) // 10) :]]
        facts = {"updates": ended.updates, "seconds": entries[-1]["seconds"], "reward": sum(recent) / len(recent)}
        if ended.stopped_because:
            facts["stopped_because"] = ended.stopped_because
        assert isinstance(model := trainer.run.model, Checkpoint)
        return model, facts

    def _counted(self) -> Cost:
        counts: list[tuple[int, int]] = []
        for updates in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                trainer = self._trainer(Path(folder) / "run", (f"learning.updates={updates}",))
                with Counter(REWARDS[self.job.reward]) as counter:
                    trainer.train()
            counts.append((counter.evaluations, counter.images))
        (one, seen), (two, seen_twice) = counts
        return Cost((2 * one - two, 2 * seen - seen_twice), (two - one, seen_twice - seen))

    def _trainer(self, place: Path, more: Sequence[str]) -> Trainer:
        config_class: Any = COMMANDS[f"train {self.arm.command}"].config_class
        words = [
            f"seed={self.job.seed}",
            f"output={place}",
            *WATCHING,
            *UNWATCHED,
            *self.arm.words(self.job.reward),
            *more,
        ]
        file = CONFIGS / f"{self.arm.command.replace('-', '_')}_shapes.yaml"
        config = load_config(config_class, file, words)
        algorithm, own = ONLINE[config_class]
        prompts = [prompt.text for prompt in sample_prompts("train", TRAIN_PROMPTS, seed=0)]
        return Trainer(Checkpoint.load("shapes"), algorithm(REWARDS[self.job.reward], prompts, part_of(config, own)))


class Rounds:
    """The same for `rpo align`, whose unit is a round: draw, order the images of a prompt by the reward, learn."""

    def __init__(self, job: Job, place: Path):
        """Work out what a round costs, which is tested against the counter."""
        self.job, self.place, self.arm = job, place, ARMS[job.arm]
        config = self._config(1)
        source, dpo = config.curate.source, config.dpo
        assert source.limit is not None and source.num_steps is not None and source.guidance_scale is not None
        images = source.limit * source.images_per_prompt
        drawn = images * source.num_steps * (2 if source.guidance_scale > 1 else 1)
        # Of each side of a pair: forward and backward, and the reference.
        learnt = dpo.learning.updates * dpo.pairs_per_update * 2 * 3
        self.cost = Cost((0, 0), (drawn + learnt, images))

    def until(self, updates: int) -> tuple[Checkpoint, dict[str, float]]:
        """Go on to so many rounds."""
        config = self._config(updates)
        ended = align(config, resume=self.place.exists(), components=Components(critic=NothingToFix()))
        shorter = [one for one in read_lines(self.place / ROUNDS) if one.get("stopped_because")]
        model = load_model(replace(config.curate.source.model, lora=str(ended.lora)))
        seconds = sum(float(str(one["seconds"])) for one in read_lines(self.place / "stages.jsonl"))
        facts: dict[str, Any] = {"updates": updates, "seconds": seconds}
        if shorter:
            facts["stopped_because"] = f"{len(shorter)} rounds ended early: {shorter[0]['stopped_because']}"
        return model, facts

    def _config(self, rounds: int) -> AlignConfig:
        reward = REWARDS[self.job.reward]
        words = [f"seed={self.job.seed}", f"output={self.place}", f"rounds={rounds}", *self.arm.words(self.job.reward)]
        words += [f"curate.decide.rewards={{{reward}: 0.0}}", "curate.decide.min_chosen={}"]
        words += [f"dpo.{word}" for word in WATCHING]
        return load_config(AlignConfig, CONFIGS / "align_shapes.yaml", words)


def run_of(job: Job, place: Path) -> Run | Rounds:
    """What trains a job."""
    return (Rounds if ARMS[job.arm].command == "align" else Run)(job, place)
