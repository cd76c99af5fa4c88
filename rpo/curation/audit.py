"""How far the critic and the judges of a run can be trusted, measured on the run's own images.

- position bias: the share of pairs on which a judge changes its mind when the two images change places;
- parse errors: the share of questions to which there was no answer in the form asked for, by kind;
- agreement of two judges beyond chance (Cohen's kappa);
- controls: a critic must find something to fix in noise, in a blank image and in an image of another caption, which is
  a question with a false premise; and no judge may prefer them to an image that was made for the caption.

Every share counts prompts for its interval. Faults are counted apart and are in no other share.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from rpo.config.load import load_config
from rpo.curation.agreement import cohen_kappa
from rpo.curation.components import load_critic
from rpo.curation.curate_config import AuditConfig, ChatConfig, CurateConfig
from rpo.curation.faults import ask_each, broken, in_words, is_raised
from rpo.curation.judge import BothOrders, OrderedVerdicts, load_judge
from rpo.curation.records import Component, Critic, Critique, Fault, History, fault_in, histories, image_of
from rpo.curation.store.keys import key_of
from rpo.curation.store.mark import StageName
from rpo.curation.store.run import SETTINGS, CurationRun
from rpo.curation.vlm.answers import AnswerCache
from rpo.errors import InputError
from rpo.evaluation.intervals import Interval, accuracy
from rpo.from_environment import as_written
from rpo.reports.html import environment

AUDIT_FILE = "audit.json"
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


Control = Literal["noise", "blank", "another caption's image"]
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
    """Share of real images that lose against a control, in both orders."""


@dataclass(frozen=True)
class CriticAudit:
    """What a critic does with controls."""

    identity: Mapping[str, str]
    answers: Answers
    finds_nothing: Mapping[Control, Interval | None]
    """Share of the controls in which it finds nothing to fix."""


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


@dataclass(frozen=True)
class Pair:
    """Two images for one caption."""

    caption: str
    first: Image.Image
    second: Image.Image


def audit(folder: str | Path, config: AuditConfig) -> Audit:
    """Audit a run, and write what was found to `audit.json` in its folder."""
    run = CurationRun(folder)
    answers = AnswerCache(run.store)
    critic = load_critic(config.critic or _critic_of(run), answers)
    configs = [one for one in (config.judge, config.second_judge) if one is not None]
    judges = [load_judge(one, answers) for one in configs]
    rng = np.random.default_rng(config.seed)
    edited, plain = _drawn(run, config.pairs, rng, kind="edit"), _drawn(run, config.controls, rng, kind="source")
    pairs = [Pair(one.source.caption, image_of(run, one, "source"), image_of(run, one, "edit")) for one in edited]
    sources = [(one.source.caption, image_of(run, one, "source")) for one in plain]
    controls: dict[Control, list[Pair]] = {kind: _controls(kind, sources, rng) for kind in CONTROLS}
    with answers.of("audit"):
        verdicts = [_judge(judge, pairs) for judge in judges]
        kappa, number = _agreement(pairs, verdicts)
        found = Audit(
            records=_recorded(run),
            critic=audit_critic(critic, controls),
            judges=tuple(audit_judge(*one, pairs, controls) for one in zip(judges, verdicts, strict=True)),
            agreement=kappa,
            num_agreement_pairs=number,
        )
    answers.pack("audit")
    text = json.dumps(as_written(asdict(found)), indent=2, ensure_ascii=False)
    run.store.write(AUDIT_FILE, (text + "\n").encode())
    return found


def format_audit(found: Audit) -> str:
    """The findings in lines; every share with its 95 % interval, and what it should be."""
    return environment(is_html=False).get_template("audit.txt.j2").render(found=found).rstrip()


def audit_critic(critic: Critic, controls: Mapping[Control, Sequence[Pair]]) -> CriticAudit:
    """What a critic says of images that show nothing."""
    answers: list[Critique | Fault] = []
    shares: dict[Control, Interval | None] = {}
    for kind, pairs in controls.items():
        found = _ask(critic, lambda some: critic([p.first for p in some], [p.caption for p in some]), pairs)
        judged = [(pair.caption, one) for pair, one in zip(pairs, found, strict=True) if isinstance(one, Critique)]
        shares[kind] = _share([one.nothing_to_fix for _, one in judged], [caption for caption, _ in judged])
        answers += found
    _require_an_answer(in_words("critic", critic.identity), answers)
    asked = [pair.caption for pairs in controls.values() for pair in pairs]
    return CriticAudit(dict(critic.identity), count_answers(answers, asked), shares)


def audit_judge(
    judge: BothOrders,
    verdicts: Sequence[OrderedVerdicts],
    pairs: Sequence[Pair],
    controls: Mapping[Control, Sequence[Pair]],
) -> JudgeAudit:
    """What a judge has said of pairs, and what it says of controls."""
    answered = [
        (pair.caption, one)
        for pair, one in zip(pairs, verdicts, strict=True)
        if not (isinstance(one.forward, Fault) or isinstance(one.backward, Fault))
    ]
    winners = [
        (pair.caption, word == shown)
        for pair, one in zip(pairs, verdicts, strict=True)
        for word, shown in ((one.forward, "first"), (one.backward, "second"))
        if word in ("first", "second")
    ]
    said, asked = _both(verdicts), [pair.caption for pair in pairs for _ in range(2)]
    shares: dict[Control, Interval | None] = {}
    for kind, some in controls.items():
        found = _judge(judge, some)
        sure = [(pair.caption, one.verdict) for pair, one in zip(some, found, strict=True)]
        sure = [(caption, verdict) for caption, verdict in sure if not isinstance(verdict, Fault)]
        shares[kind] = _share([verdict == "first" for _, verdict in sure], [caption for caption, _ in sure])
        said += _both(found)
        asked += [pair.caption for pair in some for _ in range(2)]
    _require_an_answer(in_words("judge", judge.identity), said)
    return JudgeAudit(
        identity=dict(judge.identity),
        answers=count_answers(said, asked),
        position_bias=_share([not one.is_consistent for _, one in answered], [caption for caption, _ in answered]),
        shown_first=_share([is_first for _, is_first in winners], [caption for caption, _ in winners]),
        prefers_control=shares,
    )


def count_answers(answers: Sequence[object], captions: Sequence[object]) -> Answers:
    """How many of the answers are faults.

    Args:
        captions: The caption of every question, or a number that stands for it.
    """
    faults = [one for one in answers if isinstance(one, Fault)]
    rate = _share([isinstance(one, Fault) for one in answers], captions)
    return Answers(len(answers), dict(sorted(Counter(one.kind for one in faults).items())), rate)


def _critic_of(run: CurationRun) -> ChatConfig:
    """The critic that the settings of the run name."""
    try:
        text = run.store.read(SETTINGS)
    except FileNotFoundError:
        raise InputError(
            f"{run.store.place(SETTINGS)} is missing, which names the critic of the run; restore it, or say whom to "
            "audit: critic.kind=…"
        ) from None
    with TemporaryDirectory() as folder:
        settings = Path(folder) / SETTINGS
        settings.write_bytes(text)
        return load_config(CurateConfig, settings).critic


def _recorded(run: CurationRun) -> dict[str, Answers]:
    """How many answers of a run are faults; of the others nothing is held."""
    found: dict[StageName, list[Fault | None]] = {"critiques": [], "instructions": []}
    captions = {stage: array("Q") for stage in found}
    for shard in run.shards():
        for stage, answers in found.items():
            for record, row in shard.rows[stage].items():
                answers.append(fault_in(row))
                captions[stage].append(key_of(shard.rows["sources"][record]["caption"]))
    return {stage: count_answers(answers, captions[stage]) for stage, answers in found.items()}


def _drawn(run: CurationRun, number: int, rng: np.random.Generator, *, kind: str) -> list[History]:
    """Some records that have such an image, in the order of the plan."""
    places = array("Q", (place for place, one in enumerate(histories(run)) if one.image_of(kind)))
    chosen = {places[index] for index in rng.permutation(len(places))[:number]}
    return [one for place, one in enumerate(histories(run)) if place in chosen]


def _controls(kind: Control, sources: Sequence[tuple[str, Image.Image]], rng: np.random.Generator) -> list[Pair]:
    """Of each source the control first and its image second; none where no other caption has an image."""
    if kind == "another caption's image":
        every = [*sources, *sources]
        followers = [
            next((other for text, other in every[place + 1 :] if text != caption), None)
            for place, (caption, _) in enumerate(sources)
        ]
        pairs = zip(sources, followers, strict=True)
        return [Pair(caption, other, image) for (caption, image), other in pairs if other is not None]
    if kind == "blank":
        return [Pair(caption, Image.new("RGB", image.size, (128, 128, 128)), image) for caption, image in sources]
    shapes = [(image.size[1], image.size[0], 3) for _, image in sources]
    noise = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    return [Pair(caption, control, image) for (caption, image), control in zip(sources, noise, strict=True)]


def _judge(judge: BothOrders, pairs: Sequence[Pair]) -> list[OrderedVerdicts]:
    def orders(some: Sequence[Pair]) -> list[OrderedVerdicts | Fault]:
        return [*judge.orders([p.first for p in some], [p.second for p in some], [p.caption for p in some])]

    found = _ask(judge, orders, pairs)
    return [OrderedVerdicts(one, one) if isinstance(one, Fault) else one for one in found]


def _ask(
    component: Component, ask: Callable[[Sequence[_Item]], Sequence[_Answer | Fault]], items: Sequence[_Item]
) -> list[_Answer | Fault]:
    """All answers, in batches that keep a server busy."""
    size = max(component.batch_size, component.concurrency)
    return [answer for start in range(0, len(items), size) for answer in ask_each(ask, items[start : start + size])]


def _require_an_answer(who: str, answers: Sequence[object]) -> None:
    """Refuse what raised on everything; not earlier, for an audit is short, and noise may be too much for a critic."""
    faults = [one for one in answers if isinstance(one, Fault) and is_raised(one)]
    if faults and len(faults) == len(answers):
        raise broken(f"audit: {who}", faults[-1], f"all {len(faults)} items that there are")


def _agreement(pairs: Sequence[Pair], verdicts: Sequence[Sequence[OrderedVerdicts]]) -> tuple[Interval | None, int]:
    """Kappa over the pairs of which both judges are sure, and how many these are."""
    if len(verdicts) < 2:  # noqa: PLR2004
        return None, 0
    both = [
        (pair.caption, one.verdict, other.verdict)
        for pair, one, other in zip(pairs, *verdicts, strict=True)
        if not (isinstance(one.verdict, Fault) or isinstance(other.verdict, Fault))
    ]
    captions = [caption for caption, _, _ in both]
    kappa = cohen_kappa([str(one) for _, one, _ in both], [str(other) for _, _, other in both], groups=captions)
    return kappa, len(both)


def _both(verdicts: Sequence[OrderedVerdicts]) -> list[object]:
    return [answer for one in verdicts for answer in (one.forward, one.backward)]


def _share(holds: Sequence[bool], captions: Sequence[object]) -> Interval | None:
    return accuracy(holds, groups=captions) if holds else None
