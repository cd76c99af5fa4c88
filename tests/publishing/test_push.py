"""`rpo publish` from the command line, against a stand-in of the hub's HTTP interface."""

import shutil

import pytest
from huggingface_hub import constants

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.cli.main import main
from rpo.publishing.publish import CardFacts, write_model_card
from tests.publishing.hub import hub_on_this_machine
from tests.publishing.test_publish import SD15, base, trained  # noqa: F401, fixtures

REPO = "me/aligned"


@pytest.fixture
def run(trained, tmp_path):  # noqa: F811
    """The folder of a run that has ended."""
    shutil.copytree(trained, tmp_path / "run" / "lora")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    write_model_card(tmp_path / "run" / "lora", CardFacts(method="Diffusion-DPO", base_model=SD15))
    return tmp_path / "run"


@pytest.fixture
def published(monkeypatch, capsys):
    """Calls the command, with the Hub where the stand-in is; gives exit code, stdout and stderr."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name, value in {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)

    def call(run, hub, *words):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        capsys.readouterr()
        code = main(["publish", str(run), "--repo", REPO, *words])
        return code, *capsys.readouterr()

    return call


def test_what_is_listed_is_what_arrives_and_nothing_before_it_is_asked_for(run, published):
    with hub_on_this_machine() as hub:
        code, plan, _ = published(run, hub)
        assert (code, hub.repositories) == (0, {})
        code, *told = published(run, hub, "--push")
        assert code == 0
        folder = run / "lora"
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert hub.repositories[REPO] == {name: path.read_bytes() for name, path in files.items()}
        assert all(name in plan for name in files)
        assert hub.private[REPO] is True and hub.tokens == {"Bearer hf_secret"}
        assert REPO.encode() in hub.repositories[REPO]["README.md"]
        assert not any("hf_secret" in one for one in told)


def test_a_failed_push_can_be_repeated(run, published):
    with hub_on_this_machine() as hub:
        hub.failures = 1
        code, _, told = published(run, hub, "--push")
        assert code == 2 and WEIGHT_FILE not in hub.repositories[REPO]
        assert "again" in told
        assert published(run, hub, "--push")[0] == 0
        assert WEIGHT_FILE in hub.repositories[REPO]


def test_a_hub_that_is_not_there_is_told(run, published):
    with hub_on_this_machine() as hub:
        pass
    code, _, told = published(run, hub, "--push")
    assert code == 2 and f"{REPO} was not uploaded" in told


def test_a_run_without_a_result_is_refused(tmp_path, published):
    with hub_on_this_machine() as hub:
        code, _, told = published(tmp_path, hub)
    assert code == 2 and "no result" in told
