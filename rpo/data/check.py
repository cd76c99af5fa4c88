"""What a preference set is, and everything that is wrong with it: `rpo data check PATH`.

Unlike reading for training, checking never stops at the first fault, and it decodes every image to its last pixel.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median

from PIL.Image import Image

from rpo.data.preference import PreferencePair, counted, pair_key
from rpo.data.readers import PairSource, scan
from rpo.models.captions import cut_captions, kept_tokens, load_tokenizer, surely_cut

Progress = Callable[[int, int], object]
"""Called with (records done, records in all)."""

_AHEAD = 16  # records for each thread that are looked at before the next are begun
_SHOWN = 5  # items of one kind that the text names before it counts the rest


@dataclass
class CheckReport:
    """What a set holds; the last fields are what is wrong with it, each item naming its record."""

    origin: str
    records: int
    dropped: Counter[str]
    """Rows that hold no preference, by reason."""
    ignored_columns: tuple[str, ...]
    distinct_prompts: int
    prompt_words: tuple[int, float, int]
    """Least, median and most words of a prompt."""
    margins: list[float]
    """Chosen minus rejected score, of the records that have both."""
    long_captions: str
    """How many captions the text encoder cuts, in a sentence."""
    faults: list[str]
    """Rows that are no record."""
    buckets: str = ""
    """The sizes that it would be trained at, in a sentence."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height) to number of images."""
    changes: Counter[str] = field(default_factory=Counter)
    """What decoding had to do to show images as viewers do, and to how many."""
    unreadable: list[str] = field(default_factory=list)
    """Images that are missing or corrupt."""
    empty_prompts: list[str] = field(default_factory=list)
    mismatched_sizes: list[str] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)
    """Records of which an image is below every bucket, where buckets were asked for."""
    duplicates: list[str] = field(default_factory=list)
    """Records that repeat an earlier one."""
    conflicts: list[str] = field(default_factory=list)
    """Records that say the opposite of an earlier one."""
    same_image: list[str] = field(default_factory=list)
    """Records whose two images have the same pixels."""

    @property
    def is_trainable(self) -> bool:
        """Whether `read_pairs` accepts the set as it is and no image will fail later."""
        broken = (
            *(self.faults, self.unreadable, self.empty_prompts),
            *(self.mismatched_sizes, self.too_small, self.same_image),
        )
        return self.records > 0 and not any(broken)


@dataclass(frozen=True)
class _Look:
    """What one record was found to be; made on any thread."""

    sizes: tuple[tuple[int, int], ...]
    changes: tuple[str, ...]
    errors: tuple[str, ...]
    is_same: bool
    """Whether the two images have the same pixels."""


def check_pairs(
    source: PairSource,
    *,
    split: str = "train",
    model: str | None = None,
    buckets: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read a whole set and say what it is and what is wrong with it.

    Args:
        model: Checkpoint whose tokenizer counts the captions that are too long; None counts words.
        buckets: Sides of the canvas and `bucket_step` of a run, whose buckets are told.

    Raises `InputError` if there can be no buckets of such a step.
    """
    found = scan(source, split=split)
    words = [len(pair.prompt.split()) for pair in found.pairs] or [0]
    report = CheckReport(
        origin=found.origin,
        records=len(found.pairs),
        dropped=found.dropped,
        ignored_columns=found.ignored_columns,
        distinct_prompts=len({pair.prompt for pair in found.pairs}),
        prompt_words=(min(words), median(words), max(words)),
        margins=[pair.margin for pair in found.pairs if pair.margin is not None],
        long_captions=_cut([pair.prompt for pair in found.pairs], model),
        faults=found.faults,
    )
    names: dict[bytes, str] = {}
    sound: list[PreferencePair] = []
    for done, (pair, look) in enumerate(_looks(found.pairs), start=1):
        _take(report, pair, look, names)
        sound += [] if look.errors else [pair]
        if progress is not None:
            progress(done, len(found.pairs))
    if buckets:
        _sort_into_buckets(report, sound, *buckets)
    return report


def _sort_into_buckets(report: CheckReport, pairs: Sequence[PreferencePair], side: int, step: int) -> None:
    from rpo.data.buckets import (  # not at the top: torch comes with it
        bucket_of,
        common_size,
        make_buckets,
        require_step,
    )
    from rpo.types import Canvas

    canvas = Canvas(side, side)
    require_step(canvas, step)
    fitting: list[PreferencePair] = []
    for pair in pairs:
        width, height = common_size(pair)
        if bucket_of((width, height), canvas, step) is None:
            report.too_small.append(f"{pair.name} ({width}x{height})")
        else:
            fitting.append(pair)
    report.buckets = "; ".join(make_buckets(fitting, canvas, step).notes()) if fitting else "none"


def _looks(pairs: Sequence[PreferencePair]) -> Iterator[tuple[PreferencePair, _Look]]:
    """Each record with what it is; decoded on all cores, for decoders release the interpreter lock."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pairs), _AHEAD * workers):
            some = pairs[start : start + _AHEAD * workers]
            yield from zip(some, pool.map(_look, some), strict=True)


def _look(pair: PreferencePair) -> _Look:
    images: list[Image] = []
    changes: list[str] = []
    errors: list[str] = []
    for side in pair.pictures:
        try:
            seen = pair.seen(side)
        except ValueError as error:
            errors.append(str(error))
            continue
        images.append(seen.image)
        changes += seen.changes
        if not errors:
            pair.facts(side)  # hashed here, beside other threads
    is_same = len(images) == len(pair.pictures) and images[0] == images[1]
    return _Look(tuple(image.size for image in images), tuple(changes), tuple(errors), is_same)


def _take(report: CheckReport, pair: PreferencePair, look: _Look, names: dict[bytes, str]) -> None:
    """Take one record into account; `names` are those of the earlier ones, by what they say."""
    if not pair.prompt.strip():
        report.empty_prompts.append(pair.name)
    report.unreadable += look.errors
    report.sizes.update(look.sizes)
    report.changes.update(look.changes)
    if look.errors:
        return
    if len(set(look.sizes)) > 1:
        shown = " and ".join(f"{width}x{height}" for width, height in look.sizes)
        report.mismatched_sizes.append(f"{pair.name} ({shown})")
    chosen, rejected, *original = (pair.facts(one).digest for one in pair.pictures)
    orders = (chosen, rejected), (rejected, chosen)
    key, swapped = (bytes.fromhex(pair_key(pair.prompt, *order, *original)) for order in orders)
    if look.is_same:
        report.same_image.append(pair.name)
    elif swapped in names:
        report.conflicts.append(f"{pair.name} (against {names[swapped]})")
    if key in names:
        report.duplicates.append(f"{pair.name} (of {names[key]})")
    names.setdefault(key, pair.name)


def _cut(captions: list[str], model: str | None) -> str:
    if model is None:
        return surely_cut(captions)
    tokenizer = load_tokenizer(model)
    length = tokenizer.model_max_length
    return cut_captions(captions, kept_tokens(tokenizer, length), f"the {length} tokens of {model}")


def format_report(report: CheckReport) -> str:
    """The report as text for a terminal."""
    left_out = counted(report.dropped)
    sizes = ", ".join(f"{width}x{height} ({n})" for (width, height), n in report.sizes.most_common(_SHOWN))
    more_sizes = f" and {len(report.sizes) - _SHOWN} more sizes" if len(report.sizes) > _SHOWN else ""
    least, middle, most = report.prompt_words
    facts = {
        "records": f"{report.records}" + (f"; left out: {left_out}" if left_out else ""),
        "prompts": f"{report.distinct_prompts} distinct, {least} to {most} words (median {middle:g})",
        "images": f"{sizes or 'none'}{more_sizes}",
        "buckets": report.buckets,
        "margins": _margins(report.margins),
        "captions": report.long_captions,
        "decoded": ", ".join(f"{count} {what}" for what, count in report.changes.most_common()),
        "not used": report.ignored_columns and f"columns {', '.join(report.ignored_columns)}",
    }
    problems = {
        "rows that are no record": report.faults,
        "unreadable images": report.unreadable,
        "empty prompts": report.empty_prompts,
        "pairs of two sizes": report.mismatched_sizes,
        "pairs smaller than every bucket": report.too_small,
        "duplicates": report.duplicates,
        "conflicting preferences": report.conflicts,
        "chosen and rejected are one image": report.same_image,
    }
    lines = [report.origin, *(f"  {name:<10} {text}" for name, text in facts.items() if text)]
    for title, items in problems.items():
        if items:
            lines += [f"  {title}: {len(items)}", *(f"    {item}" for item in items[:_SHOWN])]
            lines += [f"    … and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    lines.append("  can be trained on as it is" if report.is_trainable else "  cannot be trained on as it is")
    return "\n".join(lines)


def _margins(margins: Sequence[float]) -> str:
    if not margins:
        return "no record has both scores"
    low, middle, high = (f"{value:.4g}" for value in (min(margins), median(margins), max(margins)))
    share = sum(margin < 0 for margin in margins) / len(margins)
    return f"{low} to {high} (median {middle}) over {len(margins)} records; {share:.1%} negative"
