"""What is logged and where: one table of every metric, one JSON line per logged update, a progress bar, trackers.

A name that is not in `METRICS` cannot be logged, so this table is the complete answer to "what does this curve mean?".
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from rpo.errors import InputError
from rpo.files.local_paths import without_paths
from rpo.files.text import read_text
from rpo.files.whole import parse_line, write_whole
from rpo.from_environment import as_written
from rpo.plugins import in_words, nearest

METRICS: dict[str, str] = {
    "loop/loss": "the scalar that the update descends, mean over its micro-batches and processes",
    "loop/grad_norm": "norm of the gradient over all trained parameters, before clipping",
    "loop/learning_rate": "learning rate of this update",
    "loop/loss_scale": "factor on the loss against underflow of fp16 gradients (fp16 only)",
    "loop/skipped": "1 if the update was left out because fp16 gradients overflowed, else 0 (fp16 only)",
    "loop/update_seconds": "wall time of the update, drawing its micro-batches included",
    "loop/samples_per_second": "samples of the update, over all processes, by its wall time",
    "dpo/loss": "the preference term of the loss alone; for plain DPO log 2 = 0.693 at the start",
    "dpo/implicit_accuracy": "share of pairs whose margin is positive; 0.5 is chance",
    "dpo/margin": "how much the policy favours chosen over rejected, times beta/2 (KTO: beta, MaPO: its temperature)",
    "dpo/chosen_error": "denoising error of the policy on the chosen image, mean over dimensions",
    "dpo/rejected_error": "denoising error of the policy on the rejected image, mean over dimensions",
    "dpo/reference_chosen_error": "denoising error of the reference on the chosen image, mean over dimensions",
    "dpo/reference_rejected_error": "denoising error of the reference on the rejected image, mean over dimensions",
    "dpo/chosen_error_ratio": "chosen error of the policy by that of the reference; climbs when the policy breaks",
    "dpo/rejected_error_ratio": "rejected error of the policy by that of the reference; grows as rejection is learnt",
    "dpo/home_advantage": "what the margin takes off the argument of the link, mean over pairs (with a margin only)",
    "dpo/capped": "share of pairs above margin_cap, which have no gradient (with a cap only)",
    "dpo/rejected_scale": "factor on the gradient of the rejected error (winner_preserving only); 1 is all of it",
    "dpo/kl_baseline": "beta times the mean gain over the reference in past updates, if positive (kto only)",
    "dpo/region": "mean weight of a place of the latents (region weighting only); 1 is plain training",
    "dpo/anchor": "squared distance from the reference's prediction outside the region (with an anchor only)",
    "reward/mean": "weighted sum of all rewards, mean over the images of the rollout that could be judged",
    "reward/std": "standard deviation of that sum over the same images",
    "reward/failed": "share of the rollout's images that a reward could not judge (NaN), which are left out",
    "watched/saturation": "how colourful images are: a pixel's highest colour less its lowest, 0 to 1",
    "watched/colour_entropy": "entropy of an image's colours in bits, of 512 colours: 0 to 9",
    "watched/edge_density": "share of the pixels of an image at which brightness changes by more than a tenth",
    "watched/sharpness": "root mean square of the Laplacian of an image's brightness; blur lowers it",
    "watched/high_frequency": "share of an image's contrast that is finer than four pixels; grain raises it",
    "watched/pixel_diversity": "root mean squared difference of two images of a prompt",
    "watched/diversity": "1 less the cosine of two images of a prompt, as the eyes of a reward see them",
    "watched/reward": "weighted sum of the trained rewards on the watched prompts, always from the same noise",
    "watched/fall": "largest sure fall of a held-out reward while the trained one rose, in spreads between prompts",
    "policy/kl": "KL of the path from the reference's, in nats per image: the running cost ∫½|u|² dt over its steps",
    "policy/kl_from_rollout": "the same from the policy that drew the rollout; 0 at its first update",
    "policy/bound": "-log-likelihood bound of the images that came out, in nats over the trained steps (endpoint only)",
    "policy/pull": "how hard images pull by what they are worth, root mean square per dimension (endpoint presets)",
    "policy/hold": "how hard the old policy and the reference hold, in the same unit",
    "policy/slope": "slope of the reward by what the network says, root mean square per dimension (reward gradients)",
    "policy/old_deviation": "mean square of what the policy says less what its old self says; 0 at its first update",
    "policy/ratio": "likelihood ratio to the policy that drew the rollout, per dimension; 1 at its first update",
    "policy/clipped": "share of points whose ratio the clip holds (of endpoint presets where one is set)",
    "policy/trust_region": "weight of the penalty on the distance from the policy that drew the rollout",
    "value/loss": "squared error of the value before it was fitted to the rollout, in units of the rewards' variance",
    "value/explained_variance": "share of the variance of the returns that the value foresaw; 1 perfect, 0 a constant",
    "value/explained_variance_1": "the same for times 0 to 1/4 of the process, next to the data",
    "value/explained_variance_2": "the same for times 1/4 to 1/2",
    "value/explained_variance_3": "the same for times 1/2 to 3/4",
    "value/explained_variance_4": "the same for times 3/4 to 1, next to the noise",
}

REWARD_PARTS = "reward/"
"""What the raw score of each reward is logged under, by its name, where there are several; with "/share" behind it,
what part it has in the advantage, and with "/counted", for how many of the judged images its gate is open."""

ALARMS = "alarms.json"
"""The file in a run's folder that says which alarms its monitor has raised."""

HELD_OUT = "held_out/"
"""What the mean score of a reward is logged under that is watched and not trained on."""

REWARD_INFO = "info/"
"""What the means of a reward's info are logged under, as "info/reward.name"."""

HEADLINE = (
    "loop/loss",
    "dpo/implicit_accuracy",
    "dpo/chosen_error_ratio",
    "reward/mean",
    "policy/kl",
    "policy/ratio",
    "value/explained_variance",
    "loop/grad_norm",
)
"""What the progress bar shows, where present."""

TIMINGS = ("seconds", "loop/update_seconds", "loop/samples_per_second")
"""The only entries of a line in which two equal runs differ."""

METRICS_FILE = "metrics.jsonl"


def check_metric_names(names: Iterable[str]) -> None:
    """Refuse a metric that nobody defined."""
    for name in names:
        if name not in METRICS and not name.startswith((REWARD_PARTS, HELD_OUT, REWARD_INFO)):
            raise InputError(
                f"metric {name!r} is not defined; expected a name of METRICS in rpo/training/log.py"
                f"{in_words(nearest(name, METRICS))}; use one, or add a line saying what {name!r} means"
            )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged lines of a run, oldest first; a last line that a kill cut short is left out."""
    file = folder / METRICS_FILE
    whole = read_text(file).split("\n")[:-1] if file.is_file() else []
    return [parse_line(line, f"{file}:{number}") for number, line in enumerate(whole, start=1)]


def cut_metrics(folder: Path, update: int) -> None:
    """Drop the lines after an update, so that a run resumed there writes them once."""
    kept = [json.dumps(entry) + "\n" for entry in read_metrics(folder) if entry["update"] <= update]
    write_whole(folder / METRICS_FILE, "".join(kept))


class MetricLog:
    """Writes the metrics of one process's run; silent on every process but the main one."""

    def __init__(
        self,
        folder: Path,
        *,
        updates: int,
        first_update: int = 0,
        is_main: bool = True,
        progress: bool = True,
        trackers: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log of a run, or continue it."""
        self._accelerator = _accelerator_with(trackers, folder) if trackers else None
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8", newline="\n") if is_main else None
        self._bar = tqdm(
            total=updates, initial=first_update, unit="update", disable=not (progress and is_main), dynamic_ncols=True
        )
        if self._accelerator is not None:
            flat = {key: value for key, value in (config or {}).items() if isinstance(value, str | int | float | bool)}
            sent = without_paths(as_written(flat))  # trackers are on other machines
            self._accelerator.init_trackers("rpo", config=sent, init_kwargs={"wandb": {"name": folder.name}})

    def write(self, entry: Mapping[str, float]) -> None:
        """Log one update: its "update", "samples" and "seconds", and its metrics; not-a-number becomes null."""
        clean = {key: value if math.isfinite(value) else None for key, value in entry.items()}
        if self._file is not None:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        if self._accelerator is not None:
            metrics = {key: value for key, value in entry.items() if "/" in key}
            self._accelerator.log(metrics, step=int(entry["update"]))

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Move the progress bar by one update."""
        shown = {name.split("/")[1]: f"{metrics[name]:.4g}" for name in HEADLINE if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def sync(self) -> None:
        """Have everything written so far on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close file, bar and trackers."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._accelerator is not None:
            # Not end_training(): that would also end the process group, and with it the caller's next run.
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _accelerator_with(trackers: tuple[str, ...], folder: Path) -> Accelerator:
    accelerator = Accelerator(log_with=list(trackers), project_dir=folder)
    usable = {str(tracker) for tracker in accelerator.log_with}
    # accelerate leaves a tracker whose library is missing out without a word.
    if missing := [name for name in trackers if name not in usable]:
        raise InputError(
            f"tracker {missing[0]!r} is not installed; expected the library of every tracker asked for: "
            f"pip install {missing[0]}, or leave it out (metrics.jsonl is always written)"
        )
    return accelerator
