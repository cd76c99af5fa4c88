"""Shards with something of everything in them."""

from dataclasses import asdict

from rpo.curation.records import Outcome, Scores
from rpo.curation.store.mark import STAGES
from rpo.curation.store.shard import Shard
from tests.curation.fakes import picture, write_run

MADE_BY = {stage: {"kind": "test", "of": stage} for stage in STAGES}


def shard(number, start, ids, num_stages=6):
    """A shard whose first record has a fault, and whose others have pairs."""
    found = Shard(number, start, ids)
    for place, record in enumerate(ids):
        image, edits = picture(start + place), [picture(1000 * k + start + place) for k in (1, 2)]
        source = {"caption": f"ü {record}", "image": found.save_image(image), "order": start + place}
        source |= {"origin": {"kind": "test", "row": place}, "group": record, "side": "", "look": f"{start:016x}"}
        digests = [found.save_image(one) for one in edits]
        fault = {"fault": {"kind": "parse_error", "message": "no", "raw": "\u2028 prose"}}
        outcome = Outcome(f"{record}/source", f"{record}/edit", f"{record}/edit", "reward:bright")
        scores = Scores({"bright": 0.1}, {"bright": 0.9}, 0.5, None, {"source": 0.0, "edit": 1.0})
        rows = {
            "sources": source,
            "critiques": fault if place == 0 else {"critique": {"problems": [], "keep": [], "overall": 3}},
            "instructions": {"instructions": ["mend it"]},
            "edits": {"image": digests[0], "seed": 2**60, "others": digests[1:]},
            "scores": asdict(scores) | {"others": []},
            "decisions": {"outcomes": [asdict(outcome)]},
        }
        for stage in STAGES[:num_stages]:
            found.record(stage, record, rows[stage])
    found.num_through = num_stages
    found.forget(num_stages)
    return found


def made(path, shards, identities=None):
    """A run of such shards."""
    write_run(path, identities or MADE_BY, shards)
