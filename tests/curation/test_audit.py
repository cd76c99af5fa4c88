"""The audit finds the biases that a critic or judge was built with, and counts faults apart."""

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image

from rpo.cli.main import main
from rpo.config.load import to_yaml
from rpo.curation.audit import AUDIT_FILE, CONTROLS, Audit, AuditConfig, audit, format_audit
from rpo.curation.curate_config import ChatConfig, CurateConfig
from rpo.curation.records import Critique, Fault, Unavailable
from rpo.curation.store.mark import STAGES
from rpo.curation.store.shard import Shard
from rpo.errors import InputError
from rpo.shapes.prompts import sample_prompts
from rpo.shapes.world import draw_scene, render
from tests.curation.fakes import write_run

NUM_RECORDS = 24
HONEST = ChatConfig()
MADE_BY = {stage: {"kind": "test"} for stage in STAGES}


@cache
def scenes():
    rng = np.random.default_rng(0)
    wanted, other = sample_prompts("train", NUM_RECORDS, 0), sample_prompts("train", NUM_RECORDS, 1)
    return [
        (prompt.text, *(Image.fromarray(render(draw_scene(one, rng))) for one in (wrong, prompt)))
        for prompt, wrong in zip(wanted, other, strict=True)
    ]


@pytest.fixture
def folder(tmp_path):
    """A run whose edits are right and whose sources mostly are not; one critique and two instructions are faults."""
    path, shards = tmp_path / "run", []
    fault = {"fault": {"kind": "parse_error", "message": "no", "raw": "prose"}}
    critique = {"critique": {"problems": [{"what": "x", "severity": 1}], "overall": 3}}
    for index, (caption, source, edit) in enumerate(scenes()):
        key = f"{index:016x}"
        shard = Shard(index, index, [key])
        image = {"image": shard.save_image(source), "order": index, "origin": {}, "group": key, "side": ""}
        shard.record("sources", key, {"caption": caption, "look": "0" * 16, **image})
        shard.record("critiques", key, fault if index == 0 else critique)
        if index:
            is_fault = index in (1, 2)
            shard.record("instructions", key, fault if is_fault else {"instructions": ["add a red circle"]})
            if not is_fault:
                shard.record("edits", key, {"image": shard.save_image(edit), "seed": 0})
        shard.num_through = 4
        shards.append(shard)
    write_run(path, MADE_BY, shards)
    (path / "run.yaml").write_text(to_yaml(CurateConfig()))
    return path


def num_colors(image):
    return len(np.unique(np.asarray(image).reshape(-1, 3), axis=0))


class OwnJudge:
    """Answers as `config.model` says."""

    batch_size = 2
    concurrency = 1

    def __init__(self, config):
        self._habit = config.model
        self.identity = {"kind": "own", "model": self._habit}

    def __call__(self, first_images, second_images, captions):
        if self._habit == "down":
            raise Unavailable("no server")
        return [self._one(*pair) for pair in zip(first_images, second_images, strict=True)]

    def _one(self, first, second):
        if self._habit == "shown first":
            return "first"
        if self._habit == "breaks on noise" and any(num_colors(image) > 3000 for image in (first, second)):
            raise ValueError("cannot look at this")
        if self._habit == "broken":
            raise RuntimeError("no weights")
        if self._habit == "prose":
            return Fault("parse_error", "no JSON", raw="Lovely!")
        busy = [num_colors(first), num_colors(second)]
        return "tie" if busy[0] == busy[1] else "first" if busy[0] > busy[1] else "second"


class BrokenCritic:
    batch_size = 4
    concurrency = 1
    identity = {"kind": "broken"}

    def __init__(self, config):
        pass

    def __call__(self, images, captions):
        raise RuntimeError("no eyes")


class ContentCritic:
    batch_size = 4
    concurrency = 1
    identity = {"kind": "content"}

    def __init__(self, config):
        pass

    def __call__(self, images, captions):
        return [Critique(problems=(), overall=10) for _ in images]


OTHERS = CONTROLS[2]


def own(habit):
    return ChatConfig(kind=f"{__name__}:OwnJudge", model=habit)


def test_an_honest_judge_and_critic(folder):
    found = audit(folder, AuditConfig(second_judge=own("busy"), controls=8))
    judge, busy = found.judges
    assert judge.identity["model"] == "shapes" and judge.answers.asked == 2 * (NUM_RECORDS - 3) + 2 * 3 * 8
    assert judge.answers.faults == {} and judge.answers.fault_rate.value == 0
    assert judge.position_bias.value == 0 and judge.shown_first.value == 0.5
    assert {kind: judge.prefers_control[kind].value for kind in ("noise", "blank")} == {"noise": 0, "blank": 0}
    assert judge.prefers_control[OTHERS].value <= 0.25, "some of the images are wrong, too"
    assert {share.value for share in found.critic.finds_nothing.values()} == {0}
    assert found.critic.answers.asked == 24
    assert busy.prefers_control["noise"].value == 1 and busy.prefers_control["blank"].value == 0
    assert found.num_agreement_pairs == NUM_RECORDS - 3
    assert found.agreement is not None and found.agreement.low <= found.agreement.value < 1


def test_what_the_run_recorded_is_counted(folder):
    records = audit(folder, AuditConfig(second_judge=None, controls=1)).records
    assert (records["critiques"].asked, records["critiques"].faults) == (NUM_RECORDS, {"parse_error": 1})
    assert (records["instructions"].asked, records["instructions"].faults) == (NUM_RECORDS - 1, {"parse_error": 2})
    rate = records["instructions"].fault_rate
    assert rate.value == pytest.approx(2 / (NUM_RECORDS - 1)) and rate.low < rate.value < rate.high


def test_a_judge_that_always_takes_the_first_is_found_out(folder):
    found = audit(folder, AuditConfig(judge=own("shown first"), second_judge=HONEST))
    biased = found.judges[0]
    assert biased.position_bias.value == 1 and biased.position_bias.low > 0.8
    assert biased.shown_first.value == 1
    assert biased.prefers_control == dict.fromkeys(CONTROLS), "it is sure of nothing in both orders"
    assert found.agreement is None and found.num_agreement_pairs == 0
    assert biased.answers.faults == {}


def test_a_judge_that_talks_is_counted_and_not_guessed(folder):
    (judge,) = audit(folder, AuditConfig(judge=own("prose"), second_judge=None, pairs=5, controls=2)).judges
    assert judge.answers.asked == 10 + 12 and judge.answers.faults == {"parse_error": 22}
    assert judge.answers.fault_rate.value == 1
    assert judge.position_bias is judge.shown_first is None


def test_an_exception_is_a_fault_of_its_own_pair_only(folder):
    (judge,) = audit(folder, AuditConfig(judge=own("breaks on noise"), second_judge=None, controls=4)).judges
    assert judge.answers.faults == {"raised": 8}
    assert judge.prefers_control["noise"] is None and judge.prefers_control["blank"].value == 0
    assert judge.position_bias.value == 0


def test_a_model_that_cannot_be_asked_stops_the_audit(folder):
    with pytest.raises(Unavailable, match="^no server$"):
        audit(folder, AuditConfig(judge=own("down"), second_judge=None))
    assert not (folder / AUDIT_FILE).exists()


def test_a_component_that_raises_on_everything_is_not_audited(folder):
    message = (
        r"^audit: the judge \(kind own, model broken\) raised on all 18 items .* 'RuntimeError: no weights'; expect"
    )
    with pytest.raises(ValueError, match=message):
        audit(folder, AuditConfig(judge=own("broken"), second_judge=None, pairs=3, controls=2))
    with pytest.raises(ValueError, match=r"^audit: the critic \(kind broken\) raised on all 6 items .*no eyes"):
        audit(folder, AuditConfig(critic=ChatConfig(kind=f"{__name__}:BrokenCritic"), second_judge=None, controls=2))
    assert not (folder / AUDIT_FILE).exists()


def test_a_critic_that_is_content_with_noise_is_found_out(folder):
    critic = ChatConfig(kind=f"{__name__}:ContentCritic")
    found = audit(folder, AuditConfig(critic=critic, second_judge=None, controls=5)).critic
    assert {kind: share.value for kind, share in found.finds_nothing.items()} == dict.fromkeys(CONTROLS, 1)


def test_the_same_seed_audits_the_same(folder):
    config = AuditConfig(second_judge=own("busy"), pairs=7, controls=3, seed=5)
    assert audit(folder, config) == audit(folder, config)


def test_a_run_without_edits_has_no_pairs(tmp_path):
    write_run(tmp_path, MADE_BY, [])
    found = audit(tmp_path, AuditConfig(critic=HONEST, second_judge=HONEST))
    assert found.judges[0].position_bias is None and found.agreement is None
    assert found.critic.finds_nothing == dict.fromkeys(CONTROLS)
    assert "nothing to tell it from" in format_audit(found)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run of curation; expected a folder with manifest.json"):
        audit(tmp_path, AuditConfig())


def test_what_a_person_reads(folder):
    found = audit(folder, AuditConfig(judge=own("shown first"), second_judge=own("busy"), controls=4))
    assert isinstance(found, Audit)
    text = format_audit(found)
    assert "judge own shown first" in text and "judge own busy" in text and "critic shapes" in text
    assert "  depends on the order        100.0%  (84.5% to 100.0%)   should be 0 %" in text.splitlines()
    assert any(
        line.startswith("  instructions") and "of 23 answers (2 parse_error)" in line for line in text.splitlines()
    )
    kept = json.loads((folder / AUDIT_FILE).read_text())
    assert kept["judges"][0]["position_bias"]["value"] == 1
    assert kept["judges"][1]["identity"] == {"kind": "own", "model": "busy", "orders": "both"}


def test_the_critic_of_the_run_is_audited_unless_another_is_named(folder):
    content = f"{__name__}:ContentCritic"
    (folder / "run.yaml").write_text(to_yaml(CurateConfig(critic=ChatConfig(kind=content))))
    assert audit(folder, AuditConfig(second_judge=None, pairs=1, controls=1)).critic.identity == {"kind": "content"}
    other = AuditConfig(critic=ChatConfig(), second_judge=None, pairs=1, controls=1)
    assert audit(folder, other).critic.identity == {"kind": "shapes"}
    (folder / "run.yaml").unlink()
    assert audit(folder, other).critic.identity == {"kind": "shapes"}
    with pytest.raises(InputError, match=r"run\.yaml is missing.*critic\.kind="):
        audit(folder, AuditConfig(second_judge=None, pairs=1, controls=1))


def test_from_the_command_line(folder, capsys):
    words = ["curate", "audit", str(folder), "second_judge=null", "pairs=3", "controls=1"]
    assert main(words) == 0
    assert "judge reward shapes" in capsys.readouterr().out
    assert main([*words, f"judge.kind={__name__}:OwnJudge", "judge.model=down"]) == 2
    assert "no server; run the same command again: what was answered is kept" in capsys.readouterr().err
    assert main([*words, "judge.modell=x"]) == 2
    assert "AuditConfig has no such key; the nearest is 'judge.model'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["curate", "audit", "--help"])
    assert "second_judge.kind=" in capsys.readouterr().out
