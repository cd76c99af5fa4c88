"""Checkpoints that were distilled to a few steps: what tells one, and the ways to go on.

Such a network draws by another process than that of its schedule. Training moves it back to many steps: images blur,
and the few steps are unlearnt. So it is refused, unless a person says that it is meant.
"""

import re
from pathlib import Path
from typing import Any

from rpo.errors import InputError
from rpo.models.base import Family

NAMES = re.compile(r"turbo|lightning|lcm|hyper-?sd|schnell|distill|flash", re.IGNORECASE)

SCHEDULERS = ("LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler")
"""Of diffusers, for nothing else."""

ASSISTANT = "assistant"
"""Name of the adapter that undoes distillation: in use while training, and only then."""

WAYS_OUT = (
    "train the base that it was distilled from, and use the distilled LoRA on top of yours; or give the LoRA that "
    "undoes the distillation, which is used while training and not saved (model.assistant=FILE, or "
    'pipe.load_lora_weights(FILE, adapter_name="assistant")); or train it as it is, a few hundred updates at most '
    "(model.allow_distilled=true, or Checkpoint(pipe, allow_distilled=True))"
)


def refuse_distilled(name: str, pipe: Any = None, family: Family | None = None) -> None:
    """Refuse a checkpoint that says it was distilled, by its name or, once loaded, by what it is made of."""
    if found := NAMES.search(Path(name).name):
        sign = f"'{Path(name).name}' is called {found[0]!r}"
    elif pipe is not None and pipe.config.get("is_distilled"):
        sign = "the pipeline's configuration says is_distilled"
    elif pipe is not None and type(pipe.scheduler).__name__ in SCHEDULERS:
        sign = f"the pipeline's scheduler is {type(pipe.scheduler).__name__}"
    elif family is not None and (told := family.distilled(pipe)):
        sign = told
    else:
        return
    raise InputError(
        f"{sign}: a checkpoint distilled to a few steps, which training would undo; expected one that draws by its own "
        f"schedule; {WAYS_OUT}"
    )
