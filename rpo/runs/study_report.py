"""The page of a study and its numbers: what rewards choose before training, then what training by them came to."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo.config.load import to_yaml
from rpo.evaluation.comparison import Interval
from rpo.evaluation.contest import Contest
from rpo.files.whole import write_whole
from rpo.reports.charts import Chart, Mark, Series
from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, guide, write_report
from rpo.reports.sections import (
    ContestGroup,
    ContestRow,
    ContestsSection,
    CurvesSection,
    FactsSection,
    Section,
    TextSection,
    typographic,
)
from rpo.runs.evaluate_report import scale_of
from rpo.runs.study_config import TRUTH
from rpo.runs.study_findings import AXES, TITLES, Group, StudyFindings
from rpo.runs.study_judge import OUT_OF_DOMAIN

NUMBERS, PAGE = "study.json", "report.html"

AXIS_TITLES = {
    "images_per_prompt": "images of a prompt",
    "share": "share of the prompts",
    "rounds": "rounds",
}


def write_study(found: StudyFindings, folder: Path) -> Path:
    """Write `study.json` and the page."""
    write_whole(folder / NUMBERS, json.dumps(numbers(found), indent=1, allow_nan=False) + "\n")
    sections: list[Section | None] = [
        _best_of(found),
        _order(found),
        _truth(found),
        _contrasts(found),
        *_axes(found),
        _every_judge(found),
        _how_to_read(),
        FactsSection("What it cost", (("Evaluations of the denoiser", _costs(found)),)) if found.results else None,
        FactsSection(
            "Settings and environment",
            (*settings_facts(to_yaml(found.config)), ("Environment", environment_facts())),
        ),
    ]
    done, config = len(found.results), found.config
    summary = (
        f"{done} cells of equal cost are finished. {' '.join(answers(found))}"
        if done
        else "Nothing is trained yet. The first table says what each reward is worth as a chooser."
    )
    if found.failed:
        summary += f" Failed: {', '.join(found.failed)}."
    title = f"Algorithms and rewards on {config.model.source}"
    report = Report(title, summary, tuple(one for one in sections if one), subtitle="rpo study")
    return write_report(report, folder / PAGE)


def first_table(found: StudyFindings) -> str:
    """Best-of-N of each reward for the terminal, a line each."""
    rows = {judge: [found.best_of(judge, count) for count in found.counts] for judge in found.judges}
    scale = scale_of([row for own in rows.values() for row in own], is_share=found.is_share(TRUTH))
    start = scale.number(next(iter(rows.values()))[0].means.before.value)
    lines = [f"truth out of domain, one image {f'{start} {scale.unit}'.strip()}; of the best of N by"]
    for judge, own in rows.items():
        told = [
            f"N={count} {scale.gain(row.means.gain).strip()} [{scale.gain_range(row.means.gain)}]"
            for count, row in zip(found.counts, own, strict=True)
        ]
        lines.append(f"{judge}: {'; '.join(told)}")
    return "\n".join(lines)


def answers(found: StudyFindings) -> list[str]:
    """What came of it, in sentences."""
    told = list[str]()
    for name in found.sets:
        if rows := [found.contest(group, name, TRUTH) for group in found.center]:
            scale = scale_of(rows, is_share=found.is_share(TRUTH))
            best = max(rows, key=lambda row: row.means.gain.value)
            told.append(
                f"Most is gained {name.replace('_', ' ')} by {best.means.name}: "
                f"{scale.gain(best.means.gain).strip()} [{scale.gain_range(best.means.gain)}]."
            )
    if (rho := found.agreement(found.config.algorithms)) is not None:
        told.append(
            f"Best-of-{found.config.best_of} orders rewards as training does with a rank correlation of {_rho(rho)}."
        )
    return told


def numbers(found: StudyFindings) -> dict[str, Any]:
    """All that follows, as JSON has it."""
    return {
        "best_of": [
            {"by": judge, "count": count, "truth": row.means.after.value, "gain": _ends(row.means.gain)}
            for judge in found.judges
            for count in found.counts
            for row in [found.best_of(judge, count)]
        ],
        "order": {
            "best_of": found.ordered_before,
            "after": {
                "+".join(ways): {"order": found.ordered(ways), "rank_correlation": _ends(rho)}
                for ways in _ways(found)
                if (rho := found.agreement(ways)) is not None
            },
        },
        "groups": [_group(found, group) for group in found.groups],
        "contrasts": {
            name: [{"what": row.means.name, "gain": _ends(row.means.gain)} for row in found.contrasts(name)]
            for name in found.sets
        },
        "failed": dict(found.failed),
    }


def _group(found: StudyFindings, group: Group) -> dict[str, Any]:
    names = list(group.cells[0]["scores"])
    return {
        "algorithm": group.algorithm,
        "reward": group.reward,
        **dict(zip(AXES, group.axes, strict=True)),
        "seeds": [cell["seed"] for cell in group.cells],
        "spent": [cell["spent"] for cell in group.cells],
        "gains": {name: {judge: _ends(found.gain(group, name, judge)) for judge in found.judges} for name in names},
        "by_seed": {
            name: [float(one) for one in (group.scores(name, TRUTH) - found.base.scores[name][TRUTH]).mean((1, 2))]
            for name in names
        },
    }


def _ways(found: StudyFindings) -> list[tuple[str, ...]]:
    """All algorithms together, and each."""
    every = found.config.algorithms
    return list(dict.fromkeys([tuple(every), *((way,) for way in every)]))


def _best_of(found: StudyFindings) -> ContestsSection:
    rows = {count: [found.best_of(judge, count) for judge in found.judges] for count in reversed(found.counts)}
    scale = scale_of([row for own in rows.values() for row in own], is_share=found.is_share(TRUTH))
    groups = tuple(
        ContestGroup(f"the best of {count} by", tuple(ContestRow(row.means.name, row) for row in own), scale)
        for count, own in rows.items()
    )
    note = (
        "Out of domain, by the truth, before anything is trained. The truth itself as chooser is the most that "
        "choosing can do."
    )
    return ContestsSection(
        "What each reward is worth as a chooser",
        groups,
        before="first image",
        after="chosen",
        note=note,
        counts_wins=False,
        explains=True,
    )


def _order(found: StudyFindings) -> TextSection | None:
    terms = [
        (
            TITLES[ways[0]] if len(ways) == 1 else "All algorithms",
            f"{', '.join(found.ordered(ways))}; rank correlation {_rho(rho)}",
        )
        for ways in _ways(found)
        if (rho := found.agreement(ways)) is not None
    ]
    if not terms:
        return None
    text = (
        f"By best-of-{found.config.best_of} rewards come in the order {', '.join(found.ordered_before)}, the best "
        "first. Below is the order after training, out of domain and by the truth. The intervals are over prompts and "
        "seeds, of these rewards alone: so few can be in few orders."
    )
    return TextSection("Did it tell the order after training?", (text,), tuple(terms))


def _truth(found: StudyFindings) -> ContestsSection | None:
    groups = tuple(
        _contests(found, name.replace("_", " "), TRUTH, [found.contest(one, name, TRUTH) for one in found.center])
        for name in found.sets
    )
    return _section("What training came to, by the truth", groups, note=_at(found))


def _every_judge(found: StudyFindings) -> ContestsSection | None:
    groups = tuple(
        _contests(found, f"{judge}, {name.replace('_', ' ')}", judge, rows)
        for judge in found.config.rewards
        for name in found.sets
        for rows in [[found.contest(one, name, judge) for one in found.center]]
    )
    return _section("The same by every reward", groups)


def _contrasts(found: StudyFindings) -> ContestsSection | None:
    groups = tuple(_contests(found, name.replace("_", " "), TRUTH, found.contrasts(name)) for name in found.sets)
    return _section("Algorithms against each other", groups, note="Over all rewards, by the truth.", before="the other")


def _contests(found: StudyFindings, title: str, judge: str, rows: list[Contest]) -> ContestGroup:
    scale = scale_of(rows, is_share=found.is_share(judge))
    return ContestGroup(title, tuple(ContestRow(row.means.name, row) for row in rows), scale)


def _section(
    title: str, groups: tuple[ContestGroup, ...], note: str = "", before: str = "base"
) -> ContestsSection | None:
    if not any(one.rows for one in groups):
        return None
    return ContestsSection(title, groups, before=before, after="this one", note=note)


def _at(found: StudyFindings) -> str:
    images, share, rounds = found.first
    return f"With {images} images of a prompt, {100 * share:g} % of the prompts and {rounds} round(s)."


def _axes(found: StudyFindings) -> list[CurvesSection]:
    """How the truth changes along each axis, a section for each reward with which they were walked."""
    sections = list[CurvesSection]()
    for reward in found.config.rewards:
        charts = [_chart(found, reward, place, name) for place in range(len(AXES)) for name in found.sets]
        if own := tuple(chart for chart in charts if chart is not None):
            note = "The mean of all seeds. The numbers with their intervals are in study.json."
            sections.append(CurvesSection(f"How it scales with {reward}", own, note))
    return sections


def _chart(found: StudyFindings, reward: str, place: int, name: str) -> Chart | None:
    """The gain over the base by the truth along one axis, a curve for each algorithm."""
    rest = [one for number, one in enumerate(found.first) if number != place]
    factor, unit = (100, "points") if found.is_share(TRUTH) else (1, "the truth's own unit")
    series = list[Series]()
    for way in found.config.algorithms:
        own = [
            group
            for group in found.groups
            if (group.algorithm, group.reward) == (way, reward)
            and [one for number, one in enumerate(group.axes) if number != place] == rest
        ]
        points = sorted(
            (
                float(group.axes[place]),
                factor * float((group.scores(name, TRUTH) - found.base.scores[name][TRUTH]).mean()),
            )
            for group in own
        )
        if len(points) > 1:
            series.append(Series(TITLES[way], *map(tuple, zip(*points, strict=True)), is_noisy=False))
    if not series:
        return None
    marks = [Mark("base", 0.0)]
    if name == OUT_OF_DOMAIN:
        best = found.best_of(reward, found.config.best_of).means.gain.value
        marks.append(Mark(f"best of {found.config.best_of}", factor * best))
    axis = AXES[place]
    title = f"Gain {name.replace('_', ' ')}, {unit}"
    ticks = tuple(sorted({x for one in series for x in one.x}))
    return Chart(title, tuple(series), tuple(marks), x_label=AXIS_TITLES[axis], is_log=axis != "rounds", ticks=ticks)


def _costs(found: StudyFindings) -> tuple[tuple[str, str], ...]:
    """Of every cell, what was planned and what it took."""
    return tuple(
        (
            cell["name"],
            f"{cell['spent']:,.0f} of {cell['planned']:,.0f} planned, {sum(cell['updates']):,} updates"
            + (f", {cell['edits']:,} edits" if cell.get("edits") else "")
            + (f"; stopped: {why[0]}" if (why := [one for one in cell["stopped_because"] if one]) else ""),
        )
        for cell in found.results
    )


def _how_to_read() -> TextSection:
    return TextSection("How to read this", (), tuple((one["term"], one["text"]) for one in guide("study")))


def _rho(rho: Interval) -> str:
    return typographic(f"{rho.value:.2f} [{rho.low:.2f} to {rho.high:.2f}]")


def _ends(one: Interval) -> Mapping[str, float | None]:
    """An interval; the ends of an unbounded one are nothing."""
    ends = {"low": one.low, "high": one.high}
    return {"value": one.value, **{name: end if math.isfinite(end) else None for name, end in ends.items()}}
