"""A run of curation as it lies on disk, with records of every kind, without any model: scenes, edits and their rows."""

from dataclasses import asdict, replace

import numpy as np
from PIL import Image

from rpo.curation.curate_config import DecideConfig
from rpo.curation.decide import outcomes_across, outcomes_of
from rpo.curation.records import Critique, Fault, Instructions, Problem, history_of
from rpo.curation.score import distance
from rpo.curation.sources import record_id
from rpo.curation.store.mark import STAGES
from rpo.curation.store.shard import Shard
from rpo.shapes.world import render
from scripts.shapes.edit_world import triples
from tests.curation.fakes import write_run

NASTY = "<script>alert('caption')</script> <!-- a \"red\" circle & </script> \u2028"

PROMPT_SHA256 = "5f2b" * 16

IDENTITIES = {
    "sources": {"kind": "generate", "model": "shapes", "seed": "0"},
    "critiques": {"kind": "server", "model": "some/critic-7b", "prompt_sha256": PROMPT_SHA256, "temperature": "0.0"},
    "instructions": {"kind": "shapes"},
    "edits": {"kind": "instruct-pix2pix", "model": "some/editor", "revision": "0123456789abcdef", "licence": ""},
    "scores": {"reward shapes-clip": "rpo.shapes.proxy:load", "evaluation": "shapes"},
    "decisions": {name: str(value) for name, value in asdict(DecideConfig()).items()},
}

RULES = DecideConfig({"shapes-clip": 0.05, "jpeg": 0.0})

SCORES = {
    "kept_edit": ((0.21, 1.5), (0.58, 1.75)),
    "got_worse": ((0.61, 1.5), (0.22, 1.25)),
    "small_margin": ((0.31, 1.5), (0.32, 1.75)),
    "disagreement": ((0.31, 1.5), (0.62, 1.25)),
    "equal_scores": ((0.31, 1.5), (0.31, 1.5)),
    "kept_source": ((0.61, 1.5), (0.22, 1.25)),
}

FAULTS = {
    "critique_fault": Fault("parse_error", "there is no JSON object in the answer; expected one", raw="Lovely! " * 300),
    "instruction_fault": Fault("invalid", "instructions.0: too long", raw='{"instructions": ["<img src=x>"]}'),
    "edit_fault": Fault("raised", "RuntimeError: the editor fell over"),
    "score_fault": Fault("invalid", "the reward gave nan"),
    "empty": Fault("empty", "the answer is empty; expected a JSON object"),
}

KINDS = (
    *("kept_edit", "kept_edit", "kept_edit", "got_worse", "nothing_to_fix", "small_margin", "disagreement"),
    *("equal_scores", "too_close", "too_far", "no_instructions", "critique_fault", "instruction_fault", "edit_fault"),
    *("score_fault", "kept_source", "empty", "sources", "critiques", "instructions", "edits", "scores"),
)
"""What becomes of the records, in turn; the last five are as far as a run got that is under way."""


def make_run(path, kinds=KINDS, *, size=64, captions=None, has_pair=True):
    """Write a run.

    Args:
        path: Its folder.
        kinds: What becomes of each record.
        size: Side of the images.
        captions: Of the records; None for plain ones.
        has_pair: Whether a given pair is at the end, with outcomes across its sides.
    """
    shards, drawn = [], triples(0)
    for order, kind in enumerate(kinds):
        triple = next(drawn)
        caption = captions[order] if captions else f"{triple.instruction.split(' ', 1)[-1]} number {order}"
        images = [Image.fromarray(render(scene)) for scene in (triple.source, triple.edited)]
        images = [_resized(image, size) for image in images]
        shards.append(_shard(len(shards), order, kind, caption, triple.instruction, images))
    if has_pair:
        images = [Image.fromarray(render(next(drawn).source)) for _ in range(4)]
        shards.append(_shard_of_pair(len(shards), len(kinds), images))
    write_run(path, IDENTITIES, shards)
    return path


def _resized(image, size):
    return image if size == image.width else image.resize((size, size), Image.Resampling.BICUBIC)


def _shard(number, order, kind, caption, instruction, images):
    record = record_id(caption, f"test/{order}")
    shard = Shard(number, order, [record])
    shard.num_through = STAGES.index(kind) + 1 if kind in STAGES else len(STAGES)
    add = {name: _adder(shard, name, record) for name in STAGES}
    source, edit = images
    if kind == "too_close":
        edit = source
    if kind == "too_far":
        edit = Image.fromarray(255 - np.asarray(source))
    origin = {"kind": "generated", "seed": 0, "prompt": order, "image": 0}
    add["sources"](**_source(shard, caption, source, order, origin=origin, group=record))
    _critique(kind, add, instruction)
    _edit(shard, order, kind, add, source, edit)
    if kind not in ("sources", "critiques", "instructions", "edits", "scores"):
        policy = "both_directions" if kind == "kept_source" else "keep_improved"
        found = outcomes_of(history_of(shard, record), replace(RULES, policy=policy))
        add["decisions"](outcomes=[asdict(one) for one in found])
    return shard


def _source(shard, caption, image, order, *, origin, group, side=""):
    look = "0" * 16
    found = {"caption": caption, "image": shard.save_image(image), "order": order, "origin": origin, "group": group}
    return found | {"side": side, "look": look}


def _edit(shard, order, kind, add, source, edit):
    """The rows of the edit and its scores, as far as the kind goes."""
    if kind in ("critique_fault", "empty", "nothing_to_fix", "no_instructions", "instruction_fault", "edit_fault"):
        return
    if kind in ("sources", "critiques", "instructions"):
        return
    add["edits"](image=shard.save_image(edit), seed=1000 + order)
    if kind == "edits":
        return
    if kind == "score_fault":
        add["scores"](fault=asdict(FAULTS[kind]))
        return
    before, after = ({"shapes-clip": one[0], "jpeg": one[1]} for one in SCORES.get(kind, SCORES["kept_edit"]))
    gap = distance(source, edit)
    add["scores"](source=before, edit=after, distance=gap, similarity=0.9375, evaluation={"source": 0.0, "edit": 1.0})


def _critique(kind, add, instruction):
    """The rows up to the edit, as far as the kind goes."""
    if kind == "sources":
        return
    if kind in ("critique_fault", "empty"):
        add["critiques"](fault=asdict(FAULTS[kind]))
        return
    problem = Problem(what=f"one should {instruction} & <b>more</b>", where="upper left", severity=3)
    problems = () if kind == "nothing_to_fix" else (problem, Problem(what="edges are soft", severity=1))
    critique = Critique(problems=problems, keep=("the background",), overall=9 if not problems else 4)
    add["critiques"](critique=critique.model_dump(mode="json"))
    if kind in ("critiques", "nothing_to_fix"):
        return
    if kind == "instruction_fault":
        add["instructions"](fault=asdict(FAULTS[kind]))
        return
    told = Instructions(instructions=() if kind == "no_instructions" else tuple(instruction.split("; ")))
    add["instructions"](instructions=list(told.instructions))
    if kind == "edit_fault":
        add["edits"](fault=asdict(FAULTS[kind]))


def _shard_of_pair(number, order, images):
    """The two sides of a given pair, both edited, and what is decided across them."""
    ids = [record_id("a pair", f"test/pair/{side}") for side in ("chosen", "rejected")]
    shard = Shard(number, order, ids)
    shard.num_through = len(STAGES)
    for place, (record, side) in enumerate(zip(ids, ("chosen", "rejected"), strict=True)):
        add = {name: _adder(shard, name, record) for name in STAGES}
        source, edit = images[2 * place : 2 * place + 2]
        origin = {"kind": "pair", "pair": "7", "side": side, "from": "given"}
        add["sources"](**_source(shard, "a pair", source, order + place, origin=origin, group=ids[0], side=side))
        _critique("kept_edit", add, "add a red circle")
        add["edits"](image=shard.save_image(edit), seed=place)
        scores = [{"shapes-clip": 0.2 * place + gain, "jpeg": gain} for gain in (0.1, 0.5)]
        gap = distance(source, edit)
        add["scores"](source=scores[0], edit=scores[1], distance=gap, similarity=None, evaluation={})
    both = [history_of(shard, record) for record in ids]
    for one, more in zip(both, (outcomes_across(*both, RULES), []), strict=True):
        rows = [asdict(outcome) for outcome in [*outcomes_of(one, RULES), *more]]
        shard.record("decisions", one.source.id, {"outcomes": rows})
    return shard


def _adder(shard, stage, record):
    return lambda **values: shard.record(stage, record, values)
