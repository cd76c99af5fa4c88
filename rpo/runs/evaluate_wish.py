"""What a person asks `rpo evaluate` for: models that are compared, and how; refused before anything is loaded."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from rpo.errors import InputError
from rpo.files.local_paths import shown_path
from rpo.models.config import ModelConfig
from rpo.rewards import ADDRESSES, name_of
from rpo.runs.sample_wish import BASE, Lora, lora_of
from rpo.sampling.sample import SolverName

FEWEST_REWARDS = 2
"""With best-of-N: one chooses, and the others judge."""

_NO_NAMES = {"lora", "pipeline", "peft", "model"}
"""Of folders in a run's folder, which is what tells them apart."""


@dataclass(frozen=True)
class EvaluationWish:
    """What is to be compared; nothing is the checkpoint's own."""

    model: ModelConfig
    rewards: Sequence[str]
    output: Path
    prompts: str = "general"
    """See `rpo.data.prompt_sets`."""
    count: int | None = None
    """Prompts of each category."""
    categories: Sequence[str] = ()
    """Those of the set that are asked for; nothing is all."""
    loras: Sequence[str] = ()
    """Files or folders, each with "=strength" or at 1; each is compared by itself."""
    checkpoints: Sequence[str] = ()
    """Whole models to compare with the first."""
    images_per_prompt: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    eta: float = 0.0
    solver: SolverName = "ddim"
    size: str = ""
    """HEIGHTxWIDTH, or one side."""
    best_of: int | None = None
    """Candidates for each image of best-of-N by the base."""
    best_by: str = ""
    """The reward that chooses among them; the first, if nobody says."""
    batch_size: int | None = None
    progress: bool = True

    @property
    def chooser(self) -> str:
        """The reward that chooses in best-of-N, as it is shown; empty without it."""
        return shown(self.best_by or self.rewards[0]) if self.best_of else ""


@dataclass(frozen=True)
class Entrant:
    """One of the models that are compared."""

    label: str
    kind: Literal["base", "best-of", "lora", "checkpoint"]
    source: str
    lora: Lora | None = None


def entrants_of(wish: EvaluationWish) -> tuple[Entrant, ...]:
    """All that are compared, the base first; refuses what cannot be compared."""
    _check(wish)
    loras = [lora_of(word) for word in wish.loras]
    paths = [*(str(lora.path) for lora in loras), *wish.checkpoints]
    strengths = [*(lora.strength for lora in loras), *(1.0 for _ in wish.checkpoints)]
    labels = labels_of(paths, strengths)
    base = wish.model.source
    best = [Entrant(f"best of {wish.best_of}", "best-of", base)] if wish.best_of else []
    return (
        Entrant(BASE, "base", base),
        *best,
        *(Entrant(label, "lora", base, lora) for label, lora in zip(labels, loras, strict=False)),
        *(
            Entrant(label, "checkpoint", path)
            for label, path in zip(labels[len(loras) :], wish.checkpoints, strict=True)
        ),
    )


def labels_of(paths: Sequence[str], strengths: Sequence[float]) -> list[str]:
    """What a person calls each: the shortest ends of the paths that tell all apart, with a strength that is not 1.

    Example:
        >>> labels_of(["runs/dpo/lora", "runs/grpo/lora", "mine.safetensors"], [1.0, 0.5, 1.0])
        ['dpo', 'grpo=0.5', 'mine']
    """
    names = [_names(path) for path in paths]
    ends = ["" if strength == 1 else f"={strength:g}" for strength in strengths]
    found = list[str]()
    for depth in range(1, max((len(one) for one in names), default=0) + 1):
        found = ["/".join(one[-depth:]) + end for one, end in zip(names, ends, strict=True)]
        if len({*found, BASE}) == len(found) + 1:
            break
    seen = Counter[str]({BASE: 1})
    for number, label in enumerate(found):
        seen[label] += 1
        found[number] = f"{label} ({seen[label]})" if seen[label] > 1 else label
    return found


def _names(path: str) -> list[str]:
    """The folders of a path, and its own name unless it says nothing."""
    parts = [part for part in PurePath(path).parts if part not in ("/", "..")]
    if parts and parts[-1].endswith(".safetensors"):
        parts = [*parts[:-1], parts[-1].removesuffix(".safetensors")]
        parts = parts[:-1] if parts[-1] == "pytorch_lora_weights" and len(parts) > 1 else parts
    while len(parts) > 1 and parts[-1] in _NO_NAMES:
        parts.pop()
    return parts or [path]


def shown(word: str) -> str:
    """A word such as NAME, PATH, NAME:PATH or the address of a reward, without a place of this machine."""
    if word.startswith(ADDRESSES):
        return name_of(word)
    form, colon, path = word.partition(":")
    return f"{form}:{shown_path(path)}" if colon and "/" not in form else shown_path(word)


def _check(wish: EvaluationWish) -> None:
    if not wish.rewards or len({shown(one) for one in wish.rewards}) < len(wish.rewards):
        raise InputError(
            f"--rewards is {' '.join(wish.rewards) or 'nothing'}; expected at least one, each once and by a name of "
            "its own; name them, the one first that images are to be sorted by"
        )
    if not (wish.loras or wish.checkpoints or wish.best_of):
        raise InputError(
            f"there is nothing to compare {wish.model.source} with; expected at least one; give --lora FILE, "
            "--checkpoint MODEL or --best-of N"
        )
    if not 0 <= wish.eta <= 1 or not math.isfinite(wish.guidance or 0):
        raise InputError(
            f"--eta is {wish.eta:g} and --guidance {wish.guidance}; expected an eta from 0 to 1 and a finite guidance; "
            "give such as --eta 0 --guidance 5"
        )
    if wish.best_by and not wish.best_of:
        raise InputError("--best-by is given without --best-of; expected both; give --best-of N")
    if not wish.best_of:
        return
    if wish.best_of == 1 or len(wish.rewards) < FEWEST_REWARDS or wish.chooser not in map(shown, wish.rewards):
        raise InputError(
            f"--best-of {wish.best_of} by {wish.chooser} is judged by the other rewards; expected 2 candidates or "
            f"more, and 2 rewards or more with {wish.chooser} among them; give such as --best-of 4 --rewards "
            f"{wish.chooser} ANOTHER"
        )
