"""What is published, exported or sent names no folder of this machine, and no key."""

import getpass
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from rpo import DPO, DPOConfig, Trainer
from rpo.adapters.lora import add_lora, lora_parameters, save_lora
from rpo.config.load import load_config, to_yaml
from rpo.curation.curate import curate
from rpo.curation.curate_config import ChatConfig, CurateConfig
from rpo.curation.export import export, push_to_hub
from rpo.curation.page import write_page
from rpo.data.preference import PreferencePair, pair_set
from rpo.files.local_paths import clean_configs, refuse_private, shown_path, without_paths
from rpo.models.checkpoint import Checkpoint
from rpo.publishing.model_card import CardFacts, write_model_card
from rpo.publishing.publish import publish
from rpo.trainers.settings import AdapterConfig, LearningConfig
from tests.curation.fakes import config_of, image_folder, whole
from tests.curation.test_server_run import own_editor
from tests.curation.vlm.fake_server import Response, fake_server, text_of
from tests.tiny import save_tiny_sd, tiny_sd
from tests.trainers.online_runs import grpo as grpo_trainer
from tests.trainers.online_runs import learning

KEY = "sk-key-of-alice"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/client-x/pairs", "pairs"),
        ("/home/alice smith/pairs of today/", "pairs of today"),
        ("~/pairs", "pairs"),
        ("~alice/pairs", "pairs"),
        ("../alice/pairs", "pairs"),
        (r"C:\Users\alice\pairs", "pairs"),
        ("C:/Users/alice/pairs", "pairs"),
        (r"\\server\alice\pairs", "pairs"),
        ("file:///home/alice/pairs", "pairs"),
        ("/root/.cache/hub/models--org--a-model/snapshots/0123abcd/unet", "org/a-model"),
        ("trained on /home/alice/pairs, twice", "trained on pairs, twice"),
        ("['/home/alice/pairs', '/home/alice/more']", "['pairs', 'more']"),
        ("a=/home/alice/pairs:/srv/alice/more", "a=pairs:more"),
        ("owner/name", "owner/name"),
        ("runs/dpo", "runs/dpo"),
        ("https://huggingface.co/owner/name/tree/main", "https://huggingface.co/owner/name/tree/main"),
        ("and/or 1/2 a / b", "and/or 1/2 a / b"),
        ("tests.curation.fakes:brightness", "tests.curation.fakes:brightness"),
        ("", ""),
    ],
)
def test_a_path_is_called_by_its_last_name(text, shown):
    assert shown_path(text) == shown


def test_plain_data_without_paths():
    value = {"a": ["/home/alice/x", 1, None], "/home/alice/y": Path("/home/alice/z"), "t": ("/srv/alice/q", True)}
    assert without_paths(value) == {"a": ["x", 1, None], "y": "z", "t": ("q", True)}


def test_a_vocabulary_is_left_alone(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    vocabulary = tmp_path / "tokenizer" / "vocab.json"
    vocabulary.write_text('{"/home/x": 1}')
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text('{"name_or_path": "/home/alice/x", "unk_token": "/", "text": "say /home/you", "id": "a/b"}')
    clean_configs(tmp_path)
    assert vocabulary.read_text() == '{"/home/x": 1}'
    assert json.loads(config.read_text()) == {
        "name_or_path": "x",
        "unk_token": "/",
        "text": "say /home/you",
        "id": "a/b",
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "home-of-alice" / "client-x"
    folder.mkdir(parents=True)
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    save_tiny_sd(folder / "base-model")
    return folder


def needles(home):
    user = getpass.getuser()
    places = ["home-of-alice", "client-x", str(home), str(Path.home()) + "/", KEY]
    return [*places, user] if len(user) > 5 and user not in ("runner", "ubuntu") else places  # noqa: PLR2004


def holding(folder, names, wanted):
    return [(name, one) for name in names for one in wanted if one.encode() in (folder / name).read_bytes()]


def from_base(home):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(home / "base-model", safety_checker=None)


def dpo(home, train):
    pairs = pair_set([PreferencePair("a circle", home / "red.png", home / "blue.png")], origin=str(home))
    config = DPOConfig(
        output=str(home / train),
        cache_folder=str(home / "cache"),
        adapter=AdapterConfig(train=train),
        pairs_per_update=1,
        learning=LearningConfig(updates=1, micro_batch=1, progress=False),
    )
    return Trainer(from_base(home), DPO(pairs, config))


def grpo(home, train):
    adapter = AdapterConfig(train=train)
    return grpo_trainer(home / f"grpo-{train}", pipe=from_base(home), learning=learning(1), adapter=adapter)


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [dpo, grpo])
def test_nothing_of_a_run_that_is_published_says_where_it_was_made(home, make, train):
    trainer = make(home, train)
    trainer.train()
    folder = trainer.save()
    plan = publish(folder, "me/model")
    names = [file.path for file in plan.files]
    assert {"README.md", "training_config.yaml"} <= set(names)
    assert not holding(folder, names, needles(home))
    assert "base-model" in (folder / "README.md").read_text(), "the name of the base is told"
    assert load_config(type(trainer.run.config), folder / "training_config.yaml"), "and the settings can be read again"


def test_the_lora_of_a_text_encoder_does_not_say_where_it_came_from(home, tmp_path):
    model = Checkpoint(from_base(home))
    add_lora(model.text_encoders["text_encoder"], rank=2, target_modules=("q_proj",))
    for parameter in lora_parameters(model.text_encoders["text_encoder"]):
        parameter.data = torch.ones_like(parameter) * 0.1
    save_lora(model, tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 1 and not holding(tmp_path, files, needles(home))


def test_a_card_names_no_folder(home, tmp_path):
    model = Checkpoint(tiny_sd())
    add_lora(model.denoiser, rank=2)
    for parameter in lora_parameters(model.denoiser):
        parameter.data = torch.ones_like(parameter) * 0.1
    save_lora(model, tmp_path)
    settings = {"start": str(home / "start"), "from": [str(home / "a"), {"b": home / "b"}], str(home / "r"): 1.0}
    card = write_model_card(tmp_path, CardFacts("DPO", base_model=str(home / "base-model"), settings=settings))
    text = card.read_text()
    assert not [one for one in needles(home) if one in text]
    assert "| start | start |" in text and "| r | 1.0 |" in text


@pytest.mark.parametrize(
    "line",
    [
        'base: "HOME/x"',
        "from: /home/alice/x",
        "on: /Users/alice/x",
        "by: /root/x",
        r"at: C:\\Users\\alice\\x",
        "in PARENT/elsewhere",
        f"token: {KEY}",
    ],
)
@pytest.mark.parametrize("name", ["notes.yaml", "deep/config.json", "README.md"])
def test_a_folder_that_gives_something_away_is_not_published(tmp_path, monkeypatch, line, name):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(Path, "home", lambda: Path("/nethome/a/alice"))
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(line.replace("HOME", "/nethome/a/alice").replace("PARENT", str(tmp_path)))
    with pytest.raises(ValueError, match=f"nobody else's business: {name} .*save the model again") as caught:
        refuse_private(folder, [name])
    assert KEY not in str(caught.value)


def test_what_is_no_home_may_be_published(tmp_path):
    (tmp_path / "README.md").write_text("https://example.org/root/x, the/root/of, /rooted/x and a home/ of all /Users")
    refuse_private(tmp_path, ["README.md"])


def test_the_header_of_a_lora_is_looked_at_too(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"from": "/home/alice/x"})
    with pytest.raises(ValueError, match=r"x.safetensors \(a path of somebody's home\)"):
        refuse_private(tmp_path, ["x.safetensors"])


# a run of curation with a key in its settings


def listener(request):
    text = text_of(request)
    schema = request.get("response_format", {}).get("json_schema", {}).get("name")
    if schema == "Instructions":
        return Response('{"instructions": ["make it red"]}')
    if "caption 1" in text:
        return Response(f"Who sent me Bearer {KEY}?")
    return Response('{"problems": [{"what": "blue", "where": "", "severity": 2}], "keep": [], "overall": 4}')


@pytest.fixture(scope="module")
def curated(home):
    """A run whose file takes model and address from the environment, against a server that repeats the key."""
    patch = pytest.MonkeyPatch()
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    image_folder(home / "source", 6)
    with fake_server(listener) as server:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setenv("MODEL", "model-of-alice")
        patch.setenv("ADDRESS", server.url)
        base = config_of(home / "run", home / "source")
        asked = {"kind": "server", "max_retries": 0}
        base = replace(base, critic=ChatConfig(**asked), instructor=ChatConfig(**asked))
        text = to_yaml(base).replace("kind: shapes", f"kind: {own_editor.__module__}:own_editor")
        text = text.replace("base_url: ''", "base_url: ${oc.env:ADDRESS}").replace(
            "\n  model: ''", "\n  model: ${oc.env:MODEL}"
        )
        file = home / "curate.yaml"
        file.write_text(text)
        curate(load_config(CurateConfig, file))
        write_page(home / "run")
        yield file, server
    patch.undo()


def files_of(folder):
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def test_no_file_of_a_run_holds_a_key_or_what_the_environment_gave(home, curated):
    run = home / "run"
    names = files_of(run)
    assert {"run.yaml", "manifest.json", "pairs.html", "shards/0000000.json"} <= set(names)
    assert any(name.startswith("answers/") for name in names)
    assert not holding(run, names, [KEY, "model-of-alice", curated[1].url])
    said = json.dumps(whole(run).rows)
    assert not [one for one in (KEY, "model-of-alice", curated[1].url) if one in said]
    assert "[key]" in said, "the server did repeat it"
    for name in ("run.yaml", "manifest.json", "pairs.html"):
        assert "${oc.env:MODEL}" in (run / name).read_text(), name
    assert not holding(run, ["pairs.html"], needles(home))


@pytest.mark.parametrize("form", ["native", "parquet", "pickapic"])
def test_no_file_of_an_export_holds_a_path_or_a_key(home, curated, form):
    done = export(home / "run", form)
    plan = push_to_hub(done.path, "me/pairs")
    names = files_of(done.path)
    assert {file.path for file in plan.files} < set(names)
    assert not holding(done.path, names, [*needles(home), "model-of-alice", curated[1].url])
    assert KEY not in str(plan)


def test_a_run_is_resumed_with_the_same_environment_and_refused_with_another(home, curated, monkeypatch):
    file, server = curated
    config, asked = load_config(CurateConfig, file), len(server.requests)
    curate(config, resume=True)
    assert len(server.requests) == asked
    monkeypatch.setenv("MODEL", "model-of-bob")
    before = (home / "run" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="'critiques' were made otherwise: model was '.*MODEL}' and is") as caught:
        curate(load_config(CurateConfig, file), resume=True)
    assert "of-alice" not in str(caught.value).replace(str(home), "") and "of-bob" not in str(caught.value)
    assert (home / "run" / "manifest.json").read_bytes() == before
