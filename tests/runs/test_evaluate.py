"""`rpo evaluate`: the same noise for all, nothing drawn or asked twice, and no number beside one of another kind."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from rpo.adapters.lora import add_lora, load_lora, save_lora
from rpo.cli.main import main
from rpo.data.pixels import to_pixels
from rpo.errors import InputError
from rpo.evaluation.held_out import Sampling
from rpo.evaluation.result import read_evaluation
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig
from rpo.publishing.evaluated import add_evaluation
from rpo.publishing.model_card import NOT_MEASURED, CardFacts, write_model_card
from rpo.rewards.jpeg import COMPRESSIBILITY as JPEG
from rpo.runs.evaluate import evaluate
from rpo.runs.evaluate_report import lineups_of
from rpo.runs.evaluate_store import Kept
from rpo.runs.evaluate_wish import EvaluationWish, entrants_of, labels_of, shown
from rpo.sampling.sample import generate
from tests.adapters.test_lora import disturb
from tests.rewards.remote.servers import serving
from tests.tiny import save_tiny_sd

ROWS = [
    {"prompt": "a red circle", "category": "colour", "wanted": 1},
    {"prompt": "two dogs", "category": "count"},
    {"prompt": "ein Fuchs", "category": "colour"},
]
TEXTS = [row["prompt"] for row in ROWS]
ASKED: list[str] = []
"""The prompt of every image that `redness` was asked about."""
STOP_AFTER: list[int] = []


def redness(images, prompts):
    ASKED.extend(prompts)
    if STOP_AFTER and len(ASKED) > STOP_AFTER[0]:
        raise KeyboardInterrupt
    return images[:, 0].mean(dim=(1, 2))


def blueness(images, prompts, metadata):
    return [float(image[2].mean()) + one.get("wanted", 0) for image, one in zip(images, metadata, strict=True)]


def darkness(images, prompts):
    return -images.mean(dim=(1, 2, 3))


RED, BLUE, DARK = (f"{__name__}:{name}" for name in ("redness", "blueness", "darkness"))


@pytest.fixture(autouse=True)
def fresh():
    ASKED.clear()
    STOP_AFTER.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_tiny_sd(root / "model")
    for seed, name in enumerate(("one", "other")):
        model = Checkpoint.load(root / "model")
        disturb(add_lora(model.denoiser, rank=2, seed=seed))
        save_lora(model, root / name)
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return root


def wish(inputs, output, **changes):
    usual = {
        "prompts": str(inputs / "prompts.jsonl"),
        "loras": [str(inputs / "one")],
        "images_per_prompt": 2,
        "steps": 2,
        "guidance": 2.0,
        "seed": 3,
        "batch_size": 4,
        "progress": False,
    }
    model = ModelConfig(source=str(inputs / "model"))
    return EvaluationWish(model, changes.pop("rewards", [RED, BLUE]), output, **{**usual, **changes})


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "e"
    evaluate(wish(inputs, folder, checkpoints=[str(inputs / "model")]))
    return folder


def pixels(file):
    return np.asarray(Image.open(file))


def test_images_are_those_of_one_sampling_for_all(inputs, tmp_path):
    found, page = evaluate(wish(inputs, tmp_path / "e", loras=[str(inputs / "one"), f"{inputs / 'other'}=0.5"]))
    assert [one["label"] for one in found.models] == ["base", "one", "other=0.5"]
    sampling = Sampling(3, 2, 2, 2.0)
    for number, lora in ((0, None), (1, "one")):
        model = Checkpoint.load(inputs / "model")
        if lora:
            load_lora(model, inputs / lora)
        drawn = to_pixels(sampling.draw(model, TEXTS)).reshape(3, 2, 64, 64, 3)
        (folder,) = (tmp_path / "e" / "images").glob(f"{number}-*")
        for prompt, image in np.ndindex(3, 2):
            ours = pixels(folder / f"{prompt:04d}-{image}.png")
            assert np.abs(ours.astype(int) - drawn[prompt, image]).max() <= 1, "in a batch of another size"
            score = ours[..., 0].mean() / 255
            label = found.models[number]["label"]
            assert found.scores[label][RED][2 * prompt + image] == pytest.approx(score, abs=1e-6)
    assert found.scores["base"][BLUE][0] > 1 > found.scores["base"][BLUE][2], "metadata goes to the reward"
    assert [(one.before, one.after) for one in found.compared[::2]] == [
        ("base", "one"),
        ("base", "other=0.5"),
        ("one", "other=0.5"),
    ]
    assert [row.means.name for row in found.compared[0].rows] == ["all", "colour", "count"]
    differences = np.subtract(found.scores["one"][RED], found.scores["base"][RED])
    assert found.compared[0].rows[0].means.gain.value == pytest.approx(differences.mean())
    assert read_evaluation(tmp_path / "e") == found
    text = page.read_text()
    assert all(prompt in text for prompt in TEXTS) and "http" not in text.replace("http-equiv", "")
    assert str(tmp_path) not in text + (tmp_path / "e" / "evaluation.json").read_text()


def test_parts_of_a_set_are_drawn_as_the_whole_is(inputs):
    model = Checkpoint.load(inputs / "model")
    words = {"seed": 1, "num_steps": 2, "guidance_scale": 1.0}
    whole = generate(model, TEXTS, images_per_prompt=3, batch_size=2, **words).unflatten(0, (3, 3))
    part = generate(model, TEXTS[1:], images_per_prompt=2, first=(1, 1), batch_size=2, **words).unflatten(0, (2, 2))
    assert torch.allclose(whole[1:, 1:], part, atol=1e-4)


def test_the_base_against_itself_differs_by_exactly_nothing(inputs, tmp_path):
    same = {"loras": [f"{inputs / 'one'}=0"], "checkpoints": [str(inputs / "model")]}
    found, _ = evaluate(wish(inputs, tmp_path / "e", **same))
    assert [one["kind"] for one in found.models] == ["base", "lora", "checkpoint"]
    for one in (*found.compared, *found.diversity):
        for row in one.rows:
            gain = row.means.gain
            assert gain.value == 0 and (row.means.num_prompts == 1 or (gain.low, gain.high) == (0, 0))
            assert (row.wins, row.losses, row.win_rate.value) == (0, 0, 0.5)
    assert {one.by for one in found.diversity} == {"pixels"}


def test_the_best_of_several_is_chosen_by_one_reward_and_judged_by_the_other(inputs, tmp_path):
    found, page = evaluate(wish(inputs, tmp_path / "e", best_of=3, best_by=BLUE))
    assert [one["label"] for one in found.models] == ["base", "best of 3", "one"]
    drawn = Sampling(3, 6, 2, 2.0).draw(Checkpoint.load(inputs / "model"), TEXTS)
    blue = to_pixels(drawn)[..., 2].mean((1, 2)).reshape(3, 3, 2)  # prompt, candidate, image
    best = blue.argmax(1)
    assert list(found.chosen) == (2 * best + np.arange(2)).ravel().tolist()
    assert {one.by for one in found.compared if "best of 3" in (one.before, one.after)} == {RED}
    assert {one.by for one in found.of("base", "one")} == {RED, BLUE}
    is_own = np.asarray(found.chosen) < 2
    red = {label: np.array(scores[RED]) for label, scores in found.scores.items()}
    assert np.array_equal(red["best of 3"] == red["base"], is_own), "an image of the base is not judged anew"
    assert (np.array(found.scores["best of 3"][BLUE]) >= found.scores["base"][BLUE]).all()
    # 6 images of each of two models by the judge, and those that are not the base's own.
    assert len(ASKED) == 12 + (~is_own).sum()
    assert "best of 3" in page.read_text()


def test_of_the_best_of_several_alone_the_judge_sorts_the_images(inputs, tmp_path):
    found, _ = evaluate(wish(inputs, tmp_path / "e", loras=[], best_of=3, best_by=BLUE, rewards=[BLUE, DARK]))
    kept = Kept(tmp_path / "e", list(found.scores), json.loads((tmp_path / "e" / "pinned.json").read_text()))
    judged = np.subtract(found.scores["best of 3"][DARK], found.scores["base"][DARK])
    assert [len(one.lineups) for one in lineups_of(found, kept).groups] == [(judged > 0).sum(), (judged < 0).sum()]


@pytest.mark.parametrize("stop_after", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 9, 11))])
def test_a_killed_evaluation_goes_on_to_the_same_result(inputs, tmp_path, monkeypatch, stop_after):
    whole, drawn = tmp_path / "whole", list[tuple[int, int]]()
    words = {"best_of": 2, "best_by": BLUE}
    draw = Sampling.draw

    def counted(self, model, prompts, **more):
        drawn.append((len(prompts) * self.images_per_prompt, more["first"]))
        return draw(self, model, prompts, **more)

    monkeypatch.setattr(Sampling, "draw", counted)
    evaluate(wish(inputs, whole, **words))
    asked, at_once = list(ASKED), list(drawn)
    ASKED.clear()
    drawn.clear()
    STOP_AFTER.append(stop_after)
    with pytest.raises(KeyboardInterrupt):
        evaluate(wish(inputs, tmp_path / "killed", **words))
    with (tmp_path / "killed" / "scores.jsonl").open("a") as file:
        file.write('{"model": "ba')  # what a kill within a line leaves
    STOP_AFTER.clear()
    answered = len([row for row in _rows(tmp_path / "killed") if row["by"] == RED])
    ASKED.clear()
    with pytest.raises(InputError, match="--resume"):
        evaluate(wish(inputs, tmp_path / "killed", **words))
    evaluate(wish(inputs, tmp_path / "killed", **words), resume=True)
    assert drawn == at_once, "no image is drawn twice, and none in another batch"
    assert len(ASKED) == len(asked) - _images(whole, answered)
    for name in ("evaluation.json", "report.html", "pinned.json"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    drawn.clear()
    ASKED.clear()
    evaluate(wish(inputs, whole, **words), resume=True)
    assert not drawn and not ASKED


def _rows(folder):
    lines = (folder / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _images(folder, answers):
    """Images of which the reward gave its first so many answers; of best-of-N's, those that are not the base's own."""
    rows, count = [row for row in _rows(folder) if row["by"] == RED][:answers], 0
    base = {row["first"]: row["values"] for row in rows if row["model"] == "base"}
    for row in rows:
        own = base[row["first"]] if row["model"].startswith("best") else [None] * len(row["values"])
        count += sum(one != value for one, value in zip(own, row["values"], strict=True))
    return count


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 3}, "sampling.num_steps was 2 and is 3"),
        pytest.param({"seed": 4}, "sampling.seed", marks=pytest.mark.slow),
        pytest.param({"guidance": 1.0}, "sampling.guidance_scale", marks=pytest.mark.slow),
        pytest.param({"eta": 1.0}, "sampling.eta", marks=pytest.mark.slow),
        ({"size": "128"}, "sampling.height"),
        pytest.param({"images_per_prompt": 1}, "sampling.images_per_prompt", marks=pytest.mark.slow),
        pytest.param({"batch_size": 2}, "sampling.images_at_once", marks=pytest.mark.slow),
        ({"count": 1}, "prompts.sha256"),
        ({"rewards": [RED]}, "blueness"),
        ({"loras": []}, "models was base, one, .* and is base, inputs[^:]*;"),
        ({"best_of": 2}, "models was base, one, .* and is base, best of 2, one, inputs[^:]*;"),
        ({"loras": ["other"]}, "no LoRA at other"),
    ],
)
def test_an_evaluation_of_another_kind_is_refused(inputs, finished, change, name):
    before = (finished / "evaluation.json").read_bytes()
    with pytest.raises(InputError, match=name):
        evaluate(wish(inputs, finished, **{"checkpoints": [str(inputs / "model")], **change}), resume=True)
    assert (finished / "evaluation.json").read_bytes() == before


def test_what_a_file_holds_counts_and_not_where_it_lies(inputs, tmp_path):
    folder = tmp_path / "e"
    shutil.copytree(inputs, tmp_path / "copy")
    evaluate(wish(inputs, folder))
    evaluate(wish(tmp_path / "copy", folder), resume=True)
    shutil.rmtree(tmp_path / "copy" / "one")
    shutil.copytree(inputs / "other", tmp_path / "copy" / "one")
    with pytest.raises(InputError, match=r"models.one.hashes.sha256 was"):
        evaluate(wish(tmp_path / "copy", folder), resume=True)


def test_a_served_reward_is_the_same_wherever_it_is_served_and_another_one_is_not(inputs, tmp_path):
    folder = tmp_path / "e"
    with (
        serving({"red": redness}) as one,
        serving({"red": redness}) as other,
        serving({"red": JPEG}) as third,
    ):
        evaluate(wish(inputs, folder, rewards=[f"{one.address}/red?batch=1"]))
        before, asked = (folder / "evaluation.json").read_bytes(), len(ASKED)
        found, _ = evaluate(wish(inputs, folder, rewards=[f"{other.address}/red"]), resume=True)
        assert (folder / "evaluation.json").read_bytes() == before and len(ASKED) == asked
        with pytest.raises(InputError, match="rewards.http:red was code"):
            evaluate(wish(inputs, folder, rewards=[f"{third.address}/red"]), resume=True)
    assert one.address not in (folder / "scores.jsonl").read_text()
    plain, _ = evaluate(wish(inputs, tmp_path / "plain", rewards=[RED]))
    for label, own in plain.scores.items():
        assert np.allclose(found.scores[label]["http:red"], own[RED], rtol=1e-6)
    assert shown("http://host:1/ocr?files=/dev/shm/images") == "http:ocr"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loras": []}, "nothing to compare"),
        ({"rewards": []}, "--rewards is nothing"),
        ({"rewards": [RED, RED]}, "each once"),
        ({"best_of": 2, "rewards": [RED]}, "judged by the other rewards"),
        ({"best_of": 1}, "2 candidates"),
        ({"best_of": 2, "best_by": "ocr"}, "with ocr among them"),
        ({"best_by": RED}, "without --best-of"),
        ({"loras": ["nowhere"]}, "no LoRA at nowhere"),
        ({"size": "65"}, "multiples of"),
        ({"eta": 1.5}, "eta from 0 to 1"),
        ({"guidance": float("nan")}, "finite guidance"),
        ({"solver": "dpm_solver", "eta": 1.0}, "ODE solver"),
        ({"categories": ["shape"]}, "no category 'shape'"),
        ({"categories": ["count"]}, "has one prompt"),
    ],
)
def test_what_cannot_be_compared_is_refused(inputs, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate(wish(inputs, tmp_path / "e", **change))
    assert not (tmp_path / "e" / "images").exists()


def test_a_folder_of_something_else_is_refused(inputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(InputError, match="letter.txt"):
            evaluate(wish(inputs, tmp_path / "mine"), resume=resume)
    with pytest.raises(InputError, match="is a file"):
        evaluate(wish(inputs, tmp_path / "mine" / "letter.txt"))
    evaluate(wish(inputs, tmp_path / "e"))
    with pytest.raises(InputError, match="a finished evaluation"):
        evaluate(wish(inputs, tmp_path / "e"))


def test_an_evaluation_goes_into_the_card_of_its_own_lora_alone(inputs, finished, tmp_path, capsys):
    for name in ("one", "other"):
        shutil.copytree(inputs / name, tmp_path / name)
        write_model_card(tmp_path / name, CardFacts(method="Diffusion-DPO", license="mit"))
    folder, command = tmp_path / "one", ["publish", str(tmp_path / "one"), "--repo", "me/mine"]
    found = read_evaluation(finished)
    before = (folder / "README.md").read_text()
    assert NOT_MEASURED in before
    assert main([*command, "--evaluation", str(finished)]) == 0
    assert "evaluation.json" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    gain = found.of("base", "one")[0].rows[0].means.gain
    assert f"{gain.value:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]" in card and NOT_MEASURED not in card
    assert ModelCard(card).data.to_dict() == ModelCard(before).data.to_dict()
    assert read_evaluation(folder) == found
    add_evaluation(folder, finished)
    add_evaluation(folder, folder)
    assert (folder / "README.md").read_text() == card
    with pytest.raises(InputError, match="but not the LoRA in"):
        add_evaluation(tmp_path / "other", finished)
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match="no model card"):
        add_evaluation(folder, finished)


def test_models_are_called_by_what_tells_them_apart():
    assert labels_of(["runs/a/lora", "runs/b/lora"], [1, 1]) == ["a", "b"]
    assert labels_of(["x/run/lora", "y/run/lora"], [1, 1]) == ["x/run", "y/run"]
    assert labels_of(["a/pytorch_lora_weights.safetensors", "mine.safetensors"], [1, 0.5]) == ["a", "mine=0.5"]
    assert labels_of(["a", "a", "a"], [1, 1, 0.5]) == ["a", "a (2)", "a=0.5"]
    assert labels_of(["base"], [1]) == ["base (2)"]
    assert labels_of([], []) == []
    assert shown("clip-score:/home/me/clip") == "clip-score:clip" and shown("my.module:Score") == "my.module:Score"


def test_entrants_are_the_base_then_best_of_n_then_the_others(inputs, tmp_path):
    found = entrants_of(wish(inputs, tmp_path, best_of=4, checkpoints=["owner/name"]))
    assert [(one.label, one.kind) for one in found] == [
        ("base", "base"),
        ("best of 4", "best-of"),
        ("one", "lora"),
        ("name", "checkpoint"),
    ]


def test_the_command_says_what_came_of_it(inputs, tmp_path, capsys):
    words = ["--rewards", "jpeg-compressibility", "--steps", "2", "--guidance", "1", "--count", "1"]
    output = ["--output", str(tmp_path / "e"), "--prompts", str(inputs / "prompts.jsonl")]
    command = ["evaluate", str(inputs / "model"), "--lora", str(inputs / "one"), *words, *output]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "one: jpeg-compressibility" in told and str(tmp_path / "e" / "report.html") in told
    assert main(command) == 2
    assert main([*command, "--resume"]) == 0
