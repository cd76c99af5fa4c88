"""What a preference set is, and everything that is wrong with it: `rpo data check PATH`.

Unlike reading for training, checking never stops at the first fault, and it decodes every image to its last pixel.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from PIL.Image import Image

from rpo.data.columns import FormName
from rpo.data.preference import SIDES, PreferencePair, pair_key
from rpo.data.readers import PairSource, scan
from rpo.models.captions import CutCaptions, cut_captions, surely_cut

Progress = Callable[[int, int], object]
"""Called with (records done, records in all)."""

_AHEAD = 16  # records for each thread that are looked at before the next are begun
_SHOWN = 5  # items of one kind that the text names before it counts the rest


@dataclass(frozen=True)
class Margins:
    """Chosen minus rejected score, over the records that have both."""

    count: int
    minimum: float
    median: float
    maximum: float
    negative: int
    """Records whose chosen image has the lower score."""


@dataclass(frozen=True)
class CheckReport:
    """What a set holds; the last fields are what is wrong with it, each item naming its record."""

    origin: str
    records: int
    dropped: Mapping[str, int]
    """Rows that hold no preference, by reason."""
    ignored_columns: tuple[str, ...]
    distinct_prompts: int
    prompt_words: tuple[int, float, int]
    """Least, median and most words of a prompt."""
    sizes: Mapping[tuple[int, int], int]
    """(width, height) to number of images, most frequent first."""
    margins: Margins | None
    long_captions: str = ""
    """How many captions the text encoder cuts, in a sentence."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """What decoding had to do to show images as viewers do, and to how many."""
    faults: tuple[str, ...] = ()
    """Rows that are no record."""
    unreadable: tuple[str, ...] = ()
    """Images that are missing or corrupt."""
    empty_prompts: tuple[str, ...] = ()
    mismatched_sizes: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    """Records that repeat an earlier one."""
    conflicts: tuple[str, ...] = ()
    """Records that say the opposite of an earlier one."""
    same_image: tuple[str, ...] = ()
    """Records whose two images have the same pixels."""

    @property
    def is_trainable(self) -> bool:
        """Whether `read_pairs` accepts the set as it is and no image will fail later."""
        broken = self.faults or self.unreadable or self.empty_prompts or self.mismatched_sizes or self.same_image
        return self.records > 0 and not broken


@dataclass(frozen=True)
class _Look:
    """What one record was found to be; made on any thread."""

    sizes: tuple[tuple[int, int], ...]
    changes: tuple[str, ...]
    errors: tuple[str, ...]
    is_same: bool
    """Whether the two images have the same pixels."""


def _look(pair: PreferencePair) -> _Look:
    images: list[Image] = []
    changes: list[str] = []
    errors: list[str] = []
    for side in SIDES:
        try:
            seen = pair.seen(side)
        except ValueError as error:
            errors.append(str(error))
            continue
        images.append(seen.image)
        changes += seen.changes
        if not errors:
            pair.facts(side)  # hashed here, beside other threads
    is_same = len(images) == len(SIDES) and images[0] == images[1]
    return _Look(tuple(image.size for image in images), tuple(changes), tuple(errors), is_same)


@dataclass
class _Tally:
    """What has been seen so far."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    first_by_key: dict[bytes, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    empty_prompts: list[str] = field(default_factory=list)
    mismatched_sizes: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    same_image: list[str] = field(default_factory=list)

    def take(self, pair: PreferencePair, look: _Look) -> None:
        """Take one record into account."""
        if not pair.prompt.strip():
            self.empty_prompts.append(pair.name)
        self.unreadable += look.errors
        self.sizes.update(look.sizes)
        self.changes.update(look.changes)
        if not look.errors:
            self._compare(pair, look)

    def _compare(self, pair: PreferencePair, look: _Look) -> None:
        if look.sizes[0] != look.sizes[1]:
            shown = " and ".join(f"{width}x{height}" for width, height in look.sizes)
            self.mismatched_sizes.append(f"{pair.name} ({shown})")
        chosen, rejected = (pair.facts(side).digest for side in SIDES)
        orders = ((chosen, rejected), (rejected, chosen))
        key, swapped = (bytes.fromhex(pair_key(pair.prompt, *order)) for order in orders)
        if look.is_same:
            self.same_image.append(pair.name)
        elif swapped in self.first_by_key:
            self.conflicts.append(f"{pair.name} (against {self.first_by_key[swapped]})")
        if key in self.first_by_key:
            self.duplicates.append(f"{pair.name} (of {self.first_by_key[key]})")
        else:
            self.first_by_key[key] = pair.name


def check_pairs(
    source: PairSource,
    *,
    split: str = "train",
    form: FormName | Literal["auto"] = "auto",
    limit: int | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read a whole set and say what it is and what is wrong with it.

    Args:
        model: Checkpoint whose tokenizer counts the captions that are too long; None counts words.
    """
    found = scan(source, split=split, form=form, limit=limit, streaming=streaming, cache_dir=cache_dir)
    tally = _Tally()
    for done, (pair, look) in enumerate(_looks(found.pairs), start=1):
        tally.take(pair, look)
        if progress is not None:
            progress(done, len(found.pairs))
    words = [len(pair.prompt.split()) for pair in found.pairs] or [0]
    return CheckReport(
        origin=found.origin,
        records=len(found.pairs),
        dropped=dict(found.dropped),
        ignored_columns=found.ignored_columns,
        distinct_prompts=len({pair.prompt for pair in found.pairs}),
        prompt_words=(min(words), median(words), max(words)),
        sizes=dict(tally.sizes.most_common()),
        margins=_margins(found.pairs),
        long_captions=str(_cut(found.pairs, model)),
        changes=dict(tally.changes.most_common()),
        faults=tuple(found.faults),
        unreadable=tuple(tally.unreadable),
        empty_prompts=tuple(tally.empty_prompts),
        mismatched_sizes=tuple(tally.mismatched_sizes),
        duplicates=tuple(tally.duplicates),
        conflicts=tuple(tally.conflicts),
        same_image=tuple(tally.same_image),
    )


def format_report(report: CheckReport) -> str:
    """The report as text for a terminal."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(report.dropped.items()))
    sizes = ", ".join(f"{width}x{height} ({count})" for (width, height), count in list(report.sizes.items())[:_SHOWN])
    more_sizes = f" and {len(report.sizes) - _SHOWN} more sizes" if len(report.sizes) > _SHOWN else ""
    least, middle, most = report.prompt_words
    lines = [
        report.origin,
        f"  records    {report.records}" + (f"; left out: {left_out}" if left_out else ""),
        f"  prompts    {report.distinct_prompts} distinct, {least} to {most} words (median {middle:g})",
        f"  images     {sizes or 'none'}{more_sizes}",
        f"  margins    {_margins_text(report.margins)}",
    ]
    lines += [f"  captions   {report.long_captions}"] if report.long_captions else []
    if report.changes:
        lines.append("  decoded    " + ", ".join(f"{count} {what}" for what, count in report.changes.items()))
    if report.ignored_columns:
        lines.append(f"  not used   columns {', '.join(report.ignored_columns)}")
    problems = {
        "rows that are no record": report.faults,
        "unreadable images": report.unreadable,
        "empty prompts": report.empty_prompts,
        "pairs of two sizes": report.mismatched_sizes,
        "duplicates": report.duplicates,
        "conflicting preferences": report.conflicts,
        "chosen and rejected are one image": report.same_image,
    }
    for title, items in problems.items():
        lines += _problem_lines(title, items)
    lines.append("  can be trained on as it is" if report.is_trainable else "  cannot be trained on as it is")
    return "\n".join(lines)


def _problem_lines(title: str, items: tuple[str, ...]) -> list[str]:
    if not items:
        return []
    more = [f"    … and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [f"  {title}: {len(items)}", *(f"    {item}" for item in items[:_SHOWN]), *more]


def _looks(pairs: Sequence[PreferencePair]) -> Iterator[tuple[PreferencePair, _Look]]:
    """Each record with what it is; decoded on all cores, for decoders release the interpreter lock."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pairs), _AHEAD * workers):
            some = pairs[start : start + _AHEAD * workers]
            yield from zip(some, pool.map(_look, some), strict=True)


def _cut(pairs: Sequence[PreferencePair], model: str | None) -> CutCaptions:
    captions = (pair.prompt for pair in pairs)
    if model is None:
        return surely_cut(captions)
    from rpo.models.tokens import kept_tokens, load_tokenizer  # not at the top: looking at a folder needs no torch

    tokenizer = load_tokenizer(model)
    return cut_captions(
        captions,
        kept_tokens(tokenizer, tokenizer.model_max_length),
        f"the {tokenizer.model_max_length} tokens of {model}",
    )


def _margins(pairs: list[PreferencePair]) -> Margins | None:
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    if not margins:
        return None
    negative = sum(margin < 0 for margin in margins)
    return Margins(len(margins), min(margins), median(margins), max(margins), negative)


def _margins_text(margins: Margins | None) -> str:
    if margins is None:
        return "no record has both scores"
    low, middle, high = (f"{value:.4g}" for value in (margins.minimum, margins.median, margins.maximum))
    share = margins.negative / margins.count
    return f"{low} to {high} (median {middle}) over {margins.count} records; {share:.1%} negative"
