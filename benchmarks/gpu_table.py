"""The findings of `gpu.py` as one table, and whether they are as they should be."""

from collections.abc import Callable, Iterator
from typing import Any

Found = dict[str, Any]
Row = tuple[str, str, str]
"""What, how much, and what is to be said of it."""

WELL, BAD, LEFT_OUT = "ok", "**not ok**", "left out: "

LEAST_RATE, MOST_OUTSIDE, MOST_PEAK_GAP = 0.5, 0.1, 0.2
"""What is aimed at: share of the card's rate in DPO updates, time outside of the denoiser, a peak by its plan."""


def table(report: Found) -> str:
    """Markdown."""
    lines = ["| part | what | measured | remark |", "|---|---|---|---|"]
    if report["setting"]["is_rehearsal"]:
        lines = ["A rehearsal without a GPU, with tiny networks: no number here is one of a GPU.", "", *lines]
    for name, part in report["parts"].items():
        lines += [f"| {name} | {' | '.join(row)} |" for row in rows(name, part)]
    return "\n".join(lines)


def rows(name: str, part: Found) -> Iterator[Row]:
    """Of one part: how it ended, if it did not end well, and what it found until then."""
    if part["status"] != "done":
        reason = part["reason"].partition("\n")[0]
        is_skipped = part["status"] == "skipped"
        yield part["status"], f"{part['seconds']:.0f} s", f"{LEFT_OUT}{reason}" if is_skipped else f"{BAD}: {reason}"
    yield from ROWS.get(name, _sized)(part["found"])


def is_well(report: Found) -> bool:
    """Whether all parts ended, and nothing that they found is wrong."""
    every = [row for name, part in report["parts"].items() for row in rows(name, part)]
    return not any(remark.startswith(BAD) for _, _, remark in every)


def _card(found: Found) -> Iterator[Row]:
    if "device" in found:
        memory = f"{found['memory_gib']:.0f} GiB" if "memory_gib" in found else f"{found['threads']} threads"
        cuda = f"torch {found['torch']}" + (f", CUDA {found['cuda']}" if "cuda" in found else "")
        yield found["device"], memory, cuda
    if "measured_tflops" in found:
        rate = found.get("published_tflops")
        told = f"published, dense bf16: {rate:g}" if rate else "no published rate is known"
        yield "matrix product", f"{found['measured_tflops']:.3g} TFLOP/s", told


def _parity(found: Found) -> Iterator[Row]:
    equal = [name for name, one in found.items() if one["is_equal"]]
    largest = {
        name: max((one.get(name, 0.0) for one in found.values()), default=0.0) for name in ("prediction", "gradient")
    }
    if found:
        told = ", ".join(f"{name} {size:.1e}" for name, size in largest.items())
        yield f"{len(found)} families", f"{len(equal)} equal", f"largest gap: {told}"
    for name, one in found.items():
        if not one["is_equal"]:
            sizes = ", ".join(f"{key} {size:.1e}" for key, size in one.items() if isinstance(size, float))
            yield name, sizes, f"{BAD}: {_short(one.get('error', 'more than rounding'))}"


def _kinds(found: Found) -> Iterator[Row]:
    for name, one in found.items():
        if "skipped" in one:
            yield name, "", f"{LEFT_OUT}{_short(one['skipped'])}"
        elif "error" in one and isinstance(one["error"], str):
            yield name, "", f"{BAD}: {_short(one['error'])}"
        else:
            apart = f"error {one['error_apart']:.1e}, gradient {one['grad_norm_apart']:.1e} from float32"
            told = WELL if one["is_sound"] else f"{BAD}: too far, or not finite"
            yield name, f"{apart}; {one['seconds_per_update']:.3f} s an update", told


def _quickstart(found: Found) -> Iterator[Row]:
    if "seconds" in found:
        yield "rpo quickstart, in short", f"{found['seconds']:.0f} s", f"{found.get('updates', 0)} updates"


def _waits(found: Found) -> Iterator[Row]:
    for name, one in found.items():
        is_loop = "all of" not in name
        places = ", ".join(f"{place} ({count:g})" for place, count in one["at"].items())
        told = (WELL if not one["waits"] else f"{BAD}: {places}") if is_loop else places
        yield name, f"{one['waits']:g} waits", told


def _sized(found: Found) -> Iterator[Row]:
    for name in ("dpo", "endpoint"):
        if name not in found:
            continue
        one = found[name]
        size = f"{name}, {found['resolution']} px, {one['rows']} latents at once"
        yield f"{size}: an update", f"{one['seconds']:.3g} s", f"{one['tflop']:.3g} TFLOP by plan"
        outside = one["outside_of_denoiser"]
        told = WELL if outside <= MOST_OUTSIDE else f"aim: at most {MOST_OUTSIDE:.0%}"
        yield f"{size}: outside of the denoiser", f"{outside:.1%}", told
        if "peak_gib" in one:
            gap = one["peak_by_plan"] - 1
            told = WELL if abs(gap) <= MOST_PEAK_GAP else f"{BAD}: the plan is off"
            planned = f"{one['planned_peak_gib']:.2f} by plan ({gap:+.0%})"
            yield f"{size}: peak", f"{one['peak_gib']:.2f} GiB", f"{told}; {planned}"
        rate = one.get("of_published")
        measured = f"{one['of_measured']:.0%} of the matrix product's rate"
        if rate is not None:
            told = WELL if rate >= LEAST_RATE or name != "dpo" else f"aim: at least {LEAST_RATE:.0%}"
            yield f"{size}: of the card's dense bf16 rate", f"{rate:.0%}", f"{told}; {measured}"
        else:
            yield f"{size}: rate", measured, ""


def _compiled(found: Found) -> Iterator[Row]:
    for name, one in found.items():
        if "skipped" in one:
            yield name, "", f"{LEFT_OUT}{one['skipped']}"
        elif "gain" in one:
            told = f"{one['seconds_to_compile']:.0f} s to compile"
            yield (
                name,
                f"{one['gain']:.2f} times as fast",
                told + (f", {one['apart']:.0e} apart" if "apart" in one else ""),
            )
        else:
            yield name, ", ".join(f"{1000 * seconds:.3g} ms" for seconds in one.values()), ""


def _short(text: str, most: int = 120) -> str:
    line = text.partition("\n")[0].replace("|", "/")
    return line if len(line) <= most else f"{line[: most - 1]}…"


ROWS: dict[str, Callable[[Found], Iterator[Row]]] = {
    "card": _card,
    "parity": _parity,
    "kinds": _kinds,
    "quickstart": _quickstart,
    "waits": _waits,
    "blocks": _compiled,
    "graphs": _compiled,
}
"""By part; of all others, checkpoints of a size."""
