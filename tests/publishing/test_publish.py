import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from rpo.adapters.lora import adapter_layers, add_lora, lora_parameters, save_lora
from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora
from rpo.evaluation.comparison import Interval, PairedComparison
from rpo.models.checkpoint import Checkpoint
from rpo.publishing.model_card import PLACEHOLDER
from rpo.publishing.publish import CardFacts, Sample, format_size, publish, write_model_card
from rpo.trainers.identity import card_of
from rpo.trainers.rollouts.settings import StepsConfig
from tests.tiny import save_tiny_sd, tiny_sd
from tests.tiny_pixart_sigma import tiny_pixart_sigma

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_sd(tmp_path_factory.mktemp("base") / "tiny-base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a LoRA that does something, made once."""
    model = Checkpoint(tiny_sd())
    add_lora(model.denoiser, rank=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.denoiser):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("lora")
    save_lora(model, folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A fresh copy of it."""
    return shutil.copytree(trained, tmp_path / "lora")


def pixels(seed, size=64):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def full_facts():
    row = PairedComparison(
        "all | kinds",
        400,
        97,
        Interval(0.521, 0.47, 0.57),
        Interval(0.663, 0.61, 0.71),
        Interval(0.142, 0.09, 0.19),
        (),
    )
    return CardFacts(
        method="Diffusion-DPO",
        base_model=SD15,
        title="Shapes, aligned",
        description="Draws what was asked for.",
        data="1,200 pairs, ordered by a verifier.",
        datasets=("someone/pairs",),
        settings={
            "beta": 150.0,
            "rank": 4,
            "cache_folder": "/home/joe",
            "seed": None,
            "loop": {"updates": 300, "lr": 3e-4},
        },
        call={"guidance_scale": 3.0, "num_inference_steps": 2},
        results={"In-domain prompts": (row,)},
        results_note="Run `rpo shapes evaluate`.",
        samples=(Sample("a red circle", pixels(0)), Sample('a "blue" square: #2', pixels(1, 512))),
        samples_note="Drawn at random.",
        license_notes="That of the base applies.",
        limitations=("Knows 64 px only.",),
        tags=("dpo", "lora"),
        versions={"torch": "2.13.0"},
    )


class FakeHub:
    """The part of `HfApi` that publishing uses, with a repository in memory; records what it was asked for."""

    def __init__(self, *, existing_is_private=None):
        self.is_private, self.calls, self.uploaded = existing_is_private, [], {}

    def create_repo(self, repo_id, *, token, private, repo_type, exist_ok):
        assert exist_ok and repo_type == "model"
        self.calls.append(("create_repo", repo_id, token))
        if self.is_private is None:
            self.is_private = private
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id, *, repo_type, token):
        assert repo_type == "model"
        self.calls.append(("repo_info", repo_id, token))
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, *, repo_id, folder_path, token, repo_type, allow_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        assert repo_type == "model" and commit_message
        self.calls.append(("upload_folder", repo_id, token))
        everything = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(everything, allow_patterns=allow_patterns):
            self.uploaded[name] = (folder_path / name).read_bytes()


# the card


def test_the_header_round_trips_through_the_hub_library(folder):
    path = write_model_card(folder, full_facts())
    data = ModelCard.load(path).data
    assert data.base_model == SD15
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert data.license == "creativeml-openrail-m"  # inherited from a base that everybody knows
    assert data.datasets == ["someone/pairs"]
    assert data.tags == ["text-to-image", "diffusers", "lora", "template:sd-lora", "rpo", "dpo"]
    assert data.widget == [
        {"text": "a red circle", "output": {"url": "images/0.png"}},
        {"text": 'a "blue" square: #2', "output": {"url": "images/1.png"}},
    ]


def test_the_body_has_every_fact(folder):
    text = write_model_card(folder, full_facts()).read_text()
    lora = inspect_lora(folder)
    for expected in [
        "# Shapes, aligned", f"https://huggingface.co/{SD15}", "trained by Diffusion-DPO", "Draws what was asked for.",
        "<Gallery />", "Drawn at random.", "1,200 pairs, ordered by a verifier.", "In-domain prompts",
        "| all \\| kinds | 400 | 97 | 52.1 % [47.0, 57.0] | 66.3 % [61.0, 71.0] | +14.2 points [+9.0, +19.0] |",
        "Run `rpo shapes evaluate`.", "rank 4, alpha 4", "layers of unet", f"{lora.num_parameters:,} parameters",
        lora.sha256,
        "| beta | 150.0 |", "| loop.updates | 300 |", "| loop.lr | 0.0003 |", "- Knows 64 px only.",
        "That of the base applies.", "- torch 2.13.0", "ComfyUI", "models/loras", "A1111, Forge",
    ]:  # fmt: skip
        assert expected in text, expected


def test_what_is_not_known_is_left_out(folder):
    path = write_model_card(folder, CardFacts(method="Diffusion-DPO"))
    assert set(ModelCard.load(path).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    text = path.read_text()
    for absent in [
        "None",
        "<Gallery",
        "## Measured",
        "Data:",
        "## Licence",
        "| setting |",
        "Undefined",
        "{{",
        "license:",
    ]:
        assert absent not in text, absent
    assert "No measurement against the base is recorded here" in text
    assert not (folder / "images").exists()


def test_settings_of_the_machine_and_empty_ones_stay_private(folder):
    text = write_model_card(folder, full_facts()).read_text()
    assert "cache_folder" not in text and "/home/joe" not in text and "| seed |" not in text


def test_of_a_local_base_only_the_name_is_told(folder, base):
    path = write_model_card(folder, CardFacts(method="DPO", base_model=str(base)))
    text = path.read_text()
    assert "base_model" not in ModelCard.load(path).data.to_dict()
    assert "the checkpoint `tiny-base`" in text and str(base.parent) not in text


def test_samples_are_saved_and_small_ones_enlarged_pixel_by_pixel(folder):
    write_model_card(folder, full_facts())
    small = np.asarray(Image.open(folder / "images" / "0.png"))
    assert small.shape == (256, 256, 3)
    assert (small[::4, ::4] == pixels(0)).all() and (small[3::4, 3::4] == pixels(0)).all()
    assert (np.asarray(Image.open(folder / "images" / "1.png")) == pixels(1, 512)).all()


def test_a_new_card_removes_the_samples_of_the_old_one_and_nothing_else(folder):
    write_model_card(folder, full_facts())
    (folder / "images" / "mine.png").write_bytes(b"kept")
    write_model_card(folder, CardFacts(method="DPO", samples=(Sample("a", pixels(2, 256)),)))
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["0.png", "mine.png"]
    assert (np.asarray(Image.open(folder / "images" / "0.png")) == pixels(2, 256)).all()


def test_the_snippet_runs_and_the_lora_acts(folder, base):
    facts = CardFacts(
        method="DPO",
        base_expression="str(pathlib.Path(BASE))",
        imports=("import pathlib",),
        call={"num_inference_steps": 2, "height": 64},
    )
    text = write_model_card(folder, facts).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"BASE": str(base)}
    exec(code.replace(PLACEHOLDER, str(folder)), names)
    assert names["image"].size == (64, 64)
    adapted = names["pipe"](**SEEDED()).images
    plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)(**SEEDED()).images
    assert np.abs(adapted - plain).max() > 1e-3


def test_the_snippet_prepares_a_pipeline_whose_class_loads_no_lora(tmp_path):
    pipe = tiny_pixart_sigma()
    pipe.save_pretrained(tmp_path / "base")
    model = Checkpoint(pipe)
    add_lora(model.denoiser, rank=4)
    for parameter in lora_parameters(model.denoiser):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(model, tmp_path)
    card = card_of(model, "DPO", StepsConfig(), is_lora=True)
    facts = replace(card, base_expression="BASE", call={"num_inference_steps": 2, "use_resolution_binning": False})
    (code,) = re.findall(r"```python\n(.*?)```", write_model_card(tmp_path, facts).read_text(), re.DOTALL)
    names = {"BASE": str(tmp_path / "base")}
    exec(code.replace(PLACEHOLDER, str(tmp_path)), names)
    assert names["image"].size == (64, 64)
    assert len(adapter_layers(names["pipe"].transformer)) == len(adapter_layers(model.denoiser))


def SEEDED():
    generator = torch.Generator().manual_seed(0)
    return {"prompt": "a", "num_inference_steps": 2, "generator": generator, "output_type": "np"}


def test_a_lora_that_other_programs_apply_at_another_strength_says_so(tmp_path):
    tensors = {"unet.a.lora.down.weight": torch.ones(2, 8), "unet.a.lora.up.weight": torch.ones(8, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    save_file(tensors, tmp_path / WEIGHT_FILE, metadata)
    text = write_model_card(tmp_path, CardFacts(method="DPO")).read_text()
    assert "alpha 8" in text and "applies it at another strength" in text
    assert any("alpha differs from the rank" in note for note in publish(tmp_path, "me/model").notes)


def test_writing_twice_gives_the_same_card(folder):
    first = write_model_card(folder, full_facts()).read_bytes()
    assert write_model_card(folder, full_facts()).read_bytes() == first
    assert not list(folder.glob("*.partial"))


def test_no_card_for_a_lora_that_does_nothing(tmp_path):
    tensors = {"unet.a.lora.down.weight": torch.ones(2, 8), "unet.a.lora.up.weight": torch.zeros(8, 2)}
    save_file(tensors, tmp_path / WEIGHT_FILE)
    with pytest.raises(ValueError, match="changes nothing"):
        write_model_card(tmp_path, CardFacts(method="DPO"))
    assert not (tmp_path / "README.md").exists()


# the plan


def test_a_dry_run_lists_every_file_and_touches_no_network(folder):
    write_model_card(folder, full_facts())
    (folder / "training_config.yaml").write_text("beta: 150\n")
    (folder / ".token").write_text("secret")
    hub = FakeHub()
    before = (folder / "README.md").read_bytes()
    plan = publish(folder, "me/model", api=hub)
    assert hub.calls == [] and plan.url is None and plan.private
    assert [file.path for file in plan.files] == [
        *("README.md", "images/0.png", "images/1.png", "kohya_lora_weights.safetensors"),
        *("peft/adapter_config.json", "peft/adapter_model.safetensors", WEIGHT_FILE, "training_config.yaml"),
    ]
    assert all(file.size_bytes == (folder / file.path).stat().st_size for file in plan.files)
    assert plan.notes == ("left out, being hidden: .token",)
    assert (folder / "README.md").read_bytes() == before
    text = str(plan)
    assert text.startswith("dry run: nothing was sent; would go to me/model (private)")
    assert all(file.path in text for file in plan.files) and "push=True" in text and "in 8 files" in text


def test_the_plan_names_what_the_card_lacks(folder):
    write_model_card(folder, CardFacts(method="DPO"))
    assert publish(folder, "me/model").notes == ("the card names no license", "the card names no base_model")


def test_pushing_sends_exactly_the_plan(folder):
    write_model_card(folder, full_facts())
    (folder / ".token").write_text("secret")
    (folder / "a [odd] name*.txt").write_text("x")
    (folder / "a o name.txt").write_text("would match the pattern of the odd name, and is planned in its own right")
    hub = FakeHub()
    plan = publish(folder, "me/model", push=True, token="hf_x", api=hub)
    assert hub.calls == [(name, "me/model", "hf_x") for name in ("create_repo", "repo_info", "upload_folder")]
    assert hub.is_private is True
    assert sorted(hub.uploaded) == sorted(file.path for file in plan.files)
    assert plan.url == "https://hub/me/model" and str(plan).startswith("uploaded to https://hub/me/model (private)")
    card = hub.uploaded["README.md"].decode()
    assert PLACEHOLDER not in card and 'load_lora_weights("me/model"' in card


def test_a_public_repository_is_not_taken_for_a_private_one(folder):
    write_model_card(folder, full_facts())
    hub = FakeHub(existing_is_private=False)
    message = "me/model exists already and is public, but private=True was asked for; nothing was uploaded: give"
    with pytest.raises(ValueError, match=re.escape(message)):
        publish(folder, "me/model", push=True, api=hub)
    assert hub.uploaded == {}
    assert publish(folder, "me/model", push=True, private=False, api=hub).url


def test_a_whole_pipeline_is_published_too(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "pipeline")
    text = write_model_card(folder, CardFacts(method="Diffusion-DPO", base_model=SD15)).read_text()
    assert f'from_pretrained("{PLACEHOLDER}")' in text and "load_lora_weights" not in text and "LoRA" not in text
    assert "lora" not in ModelCard.load(folder / "README.md").data.tags
    names = [file.path for file in publish(folder, "me/model").files]
    assert "unet/diffusion_pytorch_model.safetensors" in names and "model_index.json" in names
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        publish(folder, "me/model")


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.safetensors",
        "checkpoint-000100/state.json",
        "random_states_0.pkl",
        "model.ckpt",
        "sub/weights.bin",
        "a.pt",
    ],
)
def test_training_state_is_refused(folder, name):
    write_model_card(folder, full_facts())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    hub = FakeHub()
    message = f"{folder} holds 1 files of training state or pickles, such as {name}, but only what a user of"
    with pytest.raises(ValueError, match=re.escape(message)):
        publish(folder, "me/model", push=True, api=hub)
    assert hub.calls == []


def test_a_folder_without_weights_or_without_a_card_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no model card README\.md, and nobody can use a model without"):
        publish(folder, "me/model")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=rf"holds neither {re.escape(WEIGHT_FILE)} nor model_index\.json"):
        publish(empty, "me/model")


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "me/mo del", "me/-model", "", "me/a--b", "https://hub/me/model"])
def test_a_name_that_is_no_repository_is_refused(folder, repo_id):
    write_model_card(folder, full_facts())
    with pytest.raises(ValueError, match=r"repo_id .*owner/name"):
        publish(folder, repo_id)


def test_sizes():
    assert [format_size(n) for n in (812, 1024, 3 * 1024**2 + 200_000, 5 * 1024**3)] == [
        "812 B",
        "1.0 KiB",
        "3.2 MiB",
        "5.0 GiB",
    ]
