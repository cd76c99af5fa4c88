"""`rpo sample`: whole folders or none, files that say what they are, columns that a person asked for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rpo.adapters.lora import add_lora, load_lora, save_lora
from rpo.cli.main import main
from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig
from rpo.runs import sample as module
from rpo.runs.sample_wish import Wish, prompts_of, size_of, swept, ways_of
from rpo.sampling.sample import generate, image_generator
from rpo.sampling.select import How
from rpo.sampling.stepwise import by_potential
from tests.adapters.test_lora import disturb
from tests.sampling.choices import OnTheWay, lightness
from tests.tiny import save_tiny_sd

DRAWN = {"num_steps": 3, "guidance_scale": 2.0}
WORDS = ["--steps", "3", "--guidance", "2"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_tiny_sd(root / "model")
    for seed, name in enumerate(("one", "other=2")):
        model = Checkpoint.load(root / "model")
        disturb(add_lora(model.denoiser, rank=2, seed=seed))
        save_lora(model, root / name)
    (root / "prompts.txt").write_text("a red circle\nzwei Füchse\n")
    return root


def sampled(inputs, folder, *words, prompts="prompts.txt"):
    given = [str(inputs / prompts) if prompts.endswith(".txt") else prompts, "--output", str(folder)]
    return main(["sample", str(inputs / "model"), *WORDS, "--prompts", *given, *words])


def told(folder):
    return json.loads((folder / "samples.json").read_text())


def pixels(file):
    return np.asarray(Image.open(file))


def drawn(inputs, prompt, seed, lora=None):
    model = Checkpoint.load(inputs / "model")
    if lora:
        load_lora(model, inputs / lora)
    return to_pixels(generate(model, [prompt], seed=seed, **DRAWN))[0]


LIGHT, ON_THE_WAY = (f"{lightness.__module__}:{one.__name__}" for one in (lightness, OnTheWay))


@pytest.mark.parametrize(
    "words",
    [pytest.param((), marks=pytest.mark.slow, id="whole images"), pytest.param(("--draft-steps", "2"), id="drafts")],
)
def test_the_best_of_some_seeds_is_shown(inputs, tmp_path, words):
    assert sampled(inputs, tmp_path / "out", "--best-of", "3", "--images", "2", "--reward", LIGHT, *words) == 0
    found = told(tmp_path / "out")
    steps = 2 if words else 3
    model = Checkpoint.load(inputs / "model")
    for place, one in enumerate(found["samples"]):
        seeds = range(3 * (place % 2), 3 * (place % 2) + 3)
        drafts = [generate(model, [one["prompt"]], seed=seed, num_steps=steps, guidance_scale=2.0) for seed in seeds]
        light = [lightness(draft, []).item() for draft in drafts]
        assert one["seed"] == seeds[int(np.argmax(light))]
        near(pixels(tmp_path / "out" / one["file"]), drawn(inputs, one["prompt"], one["seed"]))
    assert found["settings"]["best_of"] == 3 and len(found["samples"]) == 4


def test_seeds_without_potential_are_dropped_on_the_way(inputs, tmp_path):
    words = ["--best-of", "3", "--images", "1", "--reward", ON_THE_WAY, "--look-after", "1,2"]
    assert sampled(inputs, tmp_path / "out", *words) == 0
    found = told(tmp_path / "out")
    how = How(3, 2.0, noise_of=lambda row, number: image_generator(number, 0, 0))
    model, prompts = Checkpoint.load(inputs / "model"), [one["prompt"] for one in found["samples"]]
    chosen = by_potential(model, prompts, OnTheWay(), 3, how, looks=[1, 2]).chosen.tolist()
    assert [one["seed"] for one in found["samples"]] == chosen
    assert found["settings"]["look_after"] == [1, 2]


@pytest.mark.parametrize(
    "words",
    [
        ["--best-of", "3"],
        ["--look-after", "1"],
        ["--best-of", "3", "--reward", LIGHT, "--look-after", "1"],
        ["--best-of", "3", "--reward", ON_THE_WAY, "--look-after", "3"],
        ["--best-of", "3", "--reward", ON_THE_WAY, "--look-after", "1", "--draft-steps", "2"],
        ["--best-of", "1", "--reward", LIGHT],
        ["--draft-steps", "2"],
        ["--best-of", "3", "--reward", LIGHT, "--lora", "one", "--sweep", "strength=0:1:1"],
        ["--best-of", "3", "--reward", LIGHT, "--draft-steps", "4"],
    ],
)
def test_a_choice_that_cannot_be_is_refused(inputs, tmp_path, capsys, words):
    given = [str(inputs / word) if word == "one" else word for word in words]
    assert sampled(inputs, tmp_path / "out", *given) == 2
    assert "expected" in capsys.readouterr().err and not (tmp_path / "out/samples.json").exists()


def near(ours, theirs):
    """The same image, drawn in a batch of another size."""
    return np.abs(ours.astype(int) - theirs).max() <= 1


def test_images_are_named_listed_and_those_of_their_seeds(inputs, tmp_path, capsys):
    assert sampled(inputs, tmp_path / "a", "--seed", "5", "--images", "2", "--reward", "jpeg-compressibility") == 0
    assert str(tmp_path / "a" / "sheet.png") in capsys.readouterr().out
    found = told(tmp_path / "a")
    names = ["001-a-red-circle-seed-5", "001-a-red-circle-seed-6", "002-zwei-fuchse-seed-5", "002-zwei-fuchse-seed-6"]
    assert [one["file"] for one in found["samples"]] == [f"images/{name}.png" for name in names]
    assert {path.name for path in (tmp_path / "a" / "images").iterdir()} == {f"{name}.png" for name in names}
    for one in found["samples"]:
        assert near(pixels(tmp_path / "a" / one["file"]), drawn(inputs, one["prompt"], one["seed"]))
        assert isinstance(one["rewards"]["jpeg-compressibility"], float)
    assert found["settings"] == {**DRAWN, "height": 64, "width": 64, "dtype": "float32"}
    assert Image.open(tmp_path / "a" / "sheet.png").width > 400
    assert sampled(inputs, tmp_path / "b", "--seed", "6", "--images", "1", prompts="zwei Füchse;") == 0
    again = pixels(tmp_path / "b/images/001-zwei-fuchse-seed-6.png")
    assert near(again, pixels(tmp_path / "a/images/002-zwei-fuchse-seed-6.png"))


def test_a_sweep_begins_at_the_base_and_passes_the_whole_adapter(inputs, tmp_path):
    words = ["--lora", str(inputs / "one"), "--sweep", "strength=0:1:0.5", "--reward", "jpeg-compressibility"]
    assert sampled(inputs, tmp_path / "a", *words, prompts="a red circle") == 0
    found = told(tmp_path / "a")
    assert [one["loras"][0]["strength"] for one in found["columns"]] == [0, 0.5, 1]
    first, _, last = (pixels(tmp_path / "a" / one["file"]) for one in found["samples"])
    assert np.array_equal(first, drawn(inputs, "a red circle", 0))
    assert np.array_equal(last, drawn(inputs, "a red circle", 0, "one"))
    distances = [one["pixel_distance"] for one in found["columns"]]
    assert distances == sorted(distances)
    assert distances[0] == found["columns"][0]["latent_distance"] == 0 < distances[-1]
    assert [one["rewards"] for one in found["columns"]] == [one["rewards"] for one in found["samples"]]


def test_a_comparison_is_of_two_models(inputs, tmp_path):
    one, other = str(inputs / "one"), str(inputs / "other=2")  # a file of that name, not a strength
    assert sampled(inputs, tmp_path / "a", "--compare", one, other, prompts="a red circle") == 0
    found = told(tmp_path / "a")
    for sample, name in zip(found["samples"], ("one", "other=2"), strict=True):
        assert np.array_equal(pixels(tmp_path / "a" / sample["file"]), drawn(inputs, "a red circle", 0, name))
    assert [one["column"] for one in found["columns"]] == ["A", "B"]
    assert sampled(inputs, tmp_path / "b", "--compare", "base", f"{one}=0.5", prompts="a red circle") == 0
    found = told(tmp_path / "b")
    assert [one["column"] for one in found["columns"]] == ["base", "B"]
    assert [one["loras"][0]["strength"] for one in found["columns"]] == [0, 0.5]
    assert found["columns"][0]["pixel_distance"] == 0 < found["columns"][1]["pixel_distance"]


def test_a_folder_that_holds_something_is_refused_before_anything_is_loaded(inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert sampled(inputs, tmp_path / "a", "--images", "1") == 0
    monkeypatch.setattr(module, "load_model", None)
    for folder, what in (("mine", "letter.txt"), ("a", "samples"), ("mine/letter.txt", "is a file")):
        assert sampled(inputs, tmp_path / folder) == 2
        assert what in capsys.readouterr().err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_killed_run_is_begun_anew(inputs, tmp_path, monkeypatch):
    whole, written = module.Image.fromarray, []

    def killed(image):
        written.append(image)
        if len(written) == 3:
            raise KeyboardInterrupt
        return whole(image)

    monkeypatch.setattr(module.Image, "fromarray", killed)
    assert sampled(inputs, tmp_path / "a", "--images", "2") == 130
    left = {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()} - {".lock"}
    assert left == {".drawing", "001-a-red-circle-seed-0.png", "001-a-red-circle-seed-1.png"}
    monkeypatch.undo()
    assert sampled(inputs, tmp_path / "a", "--images", "1") == 0
    left = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    images = {"images/001-a-red-circle-seed-0.png", "images/002-zwei-fuchse-seed-0.png"}
    assert left - {".lock"} == images | {"sheet.png", "samples.json"}


def wish(**changes):
    return replace(Wish(ModelConfig(), "a", Path("out")), **changes)


def test_what_cannot_be_drawn_is_refused_with_one_line(inputs, tmp_path, capsys):
    lora = str(inputs / "one")
    for words, what in [
        (["--sweep", "strength=0:1:0.5"], "without a LoRA"),
        (["--lora", lora, "--sweep", "strength=1:0:0.5"], "strength=FROM:TO:STEP"),
        (["--lora", lora, "--sweep", "rank=0:1:0.5"], "strength=FROM:TO:STEP"),
        (["--lora", lora, "--sweep", "strength=0:1:0.001"], "1001 columns"),
        (["--lora", f"{lora}=nan"], "finite"),
        (["--lora", lora, "--compare", "base", lora], "alone"),
        (["--compare", "base", "base"], "two LoRAs"),
        (["--lora", str(inputs / "none")], "no LoRA"),
        (["--size", "large"], "HEIGHTxWIDTH"),
        (["--size", "60"], "multiples of"),
        (["--reward", "shaps"], "'shapes'"),
        (["--guidance", "0.5"], "guidance"),
    ]:
        assert sampled(inputs, tmp_path / "x", *words) == 2, words
        err = capsys.readouterr().err.splitlines()
        assert what in err[-1], (words, err)
    assert sampled(inputs, tmp_path / "x", prompts="no_such_file.txt") == 2
    assert main(["sample", "shapes-editor", "--prompts", "a", "--output", str(tmp_path / "x")]) == 2
    assert "edits images" in capsys.readouterr().err


def test_a_distilled_checkpoint_is_drawn_as_its_card_says(tmp_path, capsys):
    save_tiny_sd(tmp_path / "tiny-turbo")
    words = ["sample", str(tmp_path / "tiny-turbo"), "--prompts", "a", "--images", "1", "--output", str(tmp_path / "a")]
    assert main(words) == 2
    assert "--steps and" not in (err := capsys.readouterr().err)
    assert "--steps 4 --guidance 1" in err
    assert main([*words, "--steps", "2", "--guidance", "1"]) == 0


def test_words_become_prompts(tmp_path):
    assert prompts_of("a fox; two dogs.") == ["a fox", "two dogs."]
    assert prompts_of("fox.") == ["fox."]
    assert len(prompts_of("shapes:in_domain")) > 100
    for words in ("", " ; a", "missing.txt", "folder/prompts"):
        with pytest.raises(InputError, match="prompt"):
            prompts_of(words)


def test_numbers_become_columns():
    assert swept("strength=0:1.5:0.25") == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    assert swept("strength=-1:1:0.7") == [-1, -0.3, 0.4]
    assert swept("strength=0:0.3:0.1") == [0, 0.1, 0.2, 0.3]
    assert (size_of("768x512"), size_of("512"), size_of("")) == ((768, 512), (512, 512), None)
    columns = ways_of(wish(loras=["a=0.5", "b"], sweep="strength=0:2:2")).columns
    assert [one.strengths for one in columns] == [{"lora-0": 0, "lora-1": 0}, {"lora-0": 1, "lora-1": 2}]
