"""What every algorithm has in common that draws what it learns from."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from rpo.errors import InputError
from rpo.models.checkpoint import refuse_editor
from rpo.rewards import RewardLike, load_rewards
from rpo.trainers.checks.preflight import Check
from rpo.trainers.preview import PreviewOf
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.draw import OnImages
from rpo.trainers.rollouts.monitor import held_out_rewards
from rpo.trainers.rollouts.prompts import DrawnPrompts, PromptSource
from rpo.trainers.rollouts.settings import OnlineConfig
from rpo.trainers.rollouts.steps import Steps
from rpo.trainers.trainer import Algorithm, Run
from rpo.training.state import Stateful


class OnlineAlgorithm(Algorithm[Steps]):
    """Learns from a reward; a subclass says what the steps of a rollout are worth (`collect`) and its `loss`.

    Attributes:
        rewards: What images are worth.
        collector: Draws the rollouts, from `start` on.
    """

    config: OnlineConfig
    unit = "steps"
    replays = True
    """Whether the rollouts' own steps are what is learnt from."""

    shares_steps = False
    """Whether all images of a prompt are learnt at the same steps."""

    compares_each = False
    """Whether images are compared by each reward apart before these are weighted, so that one may count for some."""

    skips_last = False
    """Whether the last step of a rollout is never learnt, and its own grid says where the others are."""

    def __init__(
        self, rewards: RewardLike, prompts: PromptSource, config: OnlineConfig, *, on_images: OnImages | None = None
    ):
        """Load the rewards, before any weight of the model, and keep what to learn from.

        Args:
            rewards: What images are worth: a name, a callable (images, prompts) or (images, prompts, metadata) →
                numbers, or weights by name; see `rpo.rewards.adapt`.
            prompts: To draw images of: a list, any iterable, or a function that gives the next prompt; each a text, or
                (text, metadata). See `rpo.trainers.rollouts.prompts`.
            config: The settings.
            on_images: Called on the main process with every rollout: its number, images [n, 3, h, w] in [0, 1],
                prompts, metadata and rewards, of this process.
        """
        super().__init__(config)
        self.rewards = load_rewards(rewards)
        self._prompts, self._on_images = prompts, on_images
        self._held_out = held_out_rewards(self.rewards, config.monitor)

    @property
    def prompts(self) -> PromptSource:
        """What images are drawn of, as it was given."""
        return self._prompts

    @property
    def said(self) -> frozenset[str]:
        """Predictions besides the policy's own that the loss asks for, by name."""
        return frozenset()

    @property
    def skips_clean_end(self) -> bool:
        """Whether a last step to perfectly clean data cannot be learnt: the DDIM step adds no noise to it."""
        return self.config.rollout.has_density and self.config.rollout.ends_without_noise

    def start(self, run: Run) -> None:
        """Take the model, and refuse rewards and prompts that cannot be trained on."""
        super().start(run)
        refuse_editor(run.model, "what is drawn in training")
        if self.config.gates and not self.compares_each:
            raise InputError(
                f"gates are set for {', '.join(self.config.gates)}, but {self.title} learns from the sum of the raw "
                "scores, in which an image that does not count would need a number; take `rpo train grpo`, or an "
                "objective of `rpo train endpoint` other than bound"
            )
        self.collector = Collector(
            run,
            self.rewards,
            self._prompts,
            self.config,
            held_out=self._held_out,
            skips_clean_end=self.skips_clean_end,
            replays=self.replays,
            shares_steps=self.shares_steps,
            skips_last=self.skips_last,
            on_images=self._on_images,
        )
        self._batches = self.collector.batches(self.collect, self.again)

    @abstractmethod
    def collect(self, index: int) -> Steps:
        """Draw rollout `index`, from 0, and say what its trained steps are worth."""

    def again(self, steps: Steps) -> Steps:
        """The steps of a rollout that serves another update."""
        return steps

    @property
    def division(self) -> tuple[int, int]:
        """(steps per micro-batch, micro-batches per update)."""
        return self.collector.division

    def batches(self, first_update: int) -> Iterator[Steps]:
        """This process's micro-batches from an update on."""
        return self._batches(first_update)

    def names(self, batch: Steps) -> Sequence[str]:
        """Of the images."""
        return batch.names

    def plan(self) -> list[str]:
        """That of the rollouts."""
        return self.collector.plan()

    def checks(self) -> list[Check]:
        """Those of the rollouts."""
        return self.collector.checks(self.loss, said=self.said)

    def guard(self, metrics: dict[str, float]) -> str | None:
        """What the monitor says."""
        return self.collector.monitor.reason

    @property
    def state(self) -> dict[str, Stateful]:
        """The rollout in use, what was seen in those before it, and where in their source the prompts are."""
        kept = dict[str, Stateful](batches=self._batches, monitor=self.collector.monitor)
        prompts = self.collector.rollouts.prompts
        return {**kept, "prompts": prompts} if isinstance(prompts, DrawnPrompts) else kept

    @property
    def identity(self) -> dict[str, str]:
        """Prompts and rewards."""
        return self.collector.identity

    def previewed(self) -> PreviewOf:
        """As the rollouts are drawn."""
        return self.collector.previewed()
