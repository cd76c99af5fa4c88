"""What an audit has found, and how a person reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rpo.evaluation.intervals import Interval

Control = Literal["noise", "blank"]
CONTROLS: tuple[Control, ...] = get_args(Control)


@dataclass(frozen=True)
class Answers:
    """How many questions were asked, and how many had no proper answer, by kind of fault."""

    asked: int
    faults: Mapping[str, int]
    fault_rate: Interval | None
    """None if nothing was asked."""


@dataclass(frozen=True)
class JudgeAudit:
    """What a judge does with the pairs of the run and with controls."""

    identity: Mapping[str, str]
    answers: Answers
    """Each order is a question."""
    position_bias: Interval | None
    """Share of pairs whose verdict depends on the order; None if no pair was judged in both."""
    shown_first: Interval | None
    """Share of the answers that name a winner in which it is the image shown first; 0.5 without bias."""
    prefers_control: Mapping[Control, Interval | None]
    """Share of real images that lose against noise, or against a blank image, in both orders."""


@dataclass(frozen=True)
class CriticAudit:
    """What a critic does with controls."""

    identity: Mapping[str, str]
    answers: Answers
    finds_nothing: Mapping[Control, Interval | None]
    """Share of noise, or blank, images in which it finds nothing to fix."""


@dataclass(frozen=True)
class Audit:
    """Everything that an audit has found."""

    records: Mapping[str, Answers]
    """What the run itself recorded of its critic and its instructor."""
    critic: CriticAudit
    judges: tuple[JudgeAudit, ...]
    agreement: Interval | None
    """Cohen's kappa of two judges; None without a second one, or where it is not defined."""
    num_agreement_pairs: int


def format_audit(found: Audit) -> str:
    """The findings in lines; every share with its 95 % interval, and what it should be."""
    lines = ["Share with 95 % interval; every prompt counts once for its width.", "", "answers recorded by the run"]
    lines += [f"  {name:<28}{_answers(one)}" for name, one in found.records.items()]
    lines += ["", f"critic {_name(found.critic.identity)}", f"  {'faults':<28}{_answers(found.critic.answers)}"]
    for kind, share in found.critic.finds_nothing.items():
        lines.append(f"  {f'nothing to fix in {kind}':<28}{_shown(share)}   should be 0 %")
    for one in found.judges:
        lines += ["", f"judge {_name(one.identity)}", f"  {'faults':<28}{_answers(one.answers)}"]
        lines.append(f"  {'depends on the order':<28}{_shown(one.position_bias)}   should be 0 %")
        lines.append(f"  {'prefers what is shown first':<28}{_shown(one.shown_first)}   should be 50 %")
        for kind, share in one.prefers_control.items():
            lines.append(f"  {f'prefers {kind} to an image':<28}{_shown(share)}   should be 0 %")
    if len(found.judges) > 1:
        lines += ["", f"agreement of the judges on {found.num_agreement_pairs} pairs (Cohen's kappa)"]
        lines.append(f"  {'1 is full, 0 is chance':<28}{_kappa(found.agreement)}")
    return "\n".join(lines)


def _name(identity: Mapping[str, str]) -> str:
    return " ".join(identity[key] for key in ("kind", "model") if key in identity)


def _answers(one: Answers) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in one.faults.items())
    return f"{_shown(one.fault_rate)}   of {one.asked} answers{f' ({kinds})' if kinds else ''}"


def _shown(share: Interval | None) -> str:
    if share is None:
        return "   –  nothing to tell it from"
    return f"{share.value:6.1%}  ({share.low:.1%} to {share.high:.1%})"


def _kappa(kappa: Interval | None) -> str:
    if kappa is None:
        return "   –  not defined: no pairs, or both always say the same word"
    return f"{kappa.value:6.2f}  ({kappa.low:.2f} to {kappa.high:.2f})"
