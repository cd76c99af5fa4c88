"""What is going to be criticised: ids, forms of import, drawn images, and items that cannot be used."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rpo import shapes
from rpo.curation.curate import curate
from rpo.curation.curate_config import SourceConfig
from rpo.curation.generate import plan_generation
from rpo.curation.records import histories, image_of
from rpo.curation.sources import plan_import, record_id
from rpo.curation.store.run import CurationRun
from rpo.data.pixels import to_pixels
from rpo.data.writers import write_pairs
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import ModelConfig
from rpo.sampling.sample import generate
from tests.curation.fakes import config_of, fakes, image_folder, picture
from tests.data.samples import pair


def folder_plan(path, **changes):
    return plan_import(SourceConfig(kind="folder", path=str(path), **changes))


def lines(path, rows):
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_id_is_a_function_of_caption_and_origin():
    assert record_id("a", "b") == record_id("a", "b")
    assert len({record_id("a", "bc"), record_id("ab", "c"), record_id("a", "b"), record_id("b", "a")}) == 4
    assert len(record_id("ü", "b")) == 16
    int(record_id("ü", "b"), 16)


def test_a_folder_with_texts_beside_its_images(tmp_path):
    plan = folder_plan(image_folder(tmp_path, 3))
    assert [item.caption for item in plan.items] == ["caption 0", "caption 1", "caption 2"]
    assert np.array_equal(np.asarray(plan.draw(plan.items[1:2])[0]), np.asarray(picture(1)))
    assert [item.origin["file"] for item in plan.items] == ["000.png", "001.png", "002.png"]
    assert folder_plan(tmp_path, limit=2).items == plan.items[:2]


def test_a_folder_with_lines(tmp_path):
    image_folder(tmp_path, 2)
    lines(tmp_path, [{"file_name": "001.png", "text": "one"}, {"file_name": "000.png", "text": "none"}])
    plan = folder_plan(tmp_path, caption_column="text")
    assert [(item.caption, item.name) for item in plan.items] == [
        ("one", "metadata.jsonl:1"),
        ("none", "metadata.jsonl:2"),
    ]


def test_the_same_image_and_caption_are_done_once(tmp_path):
    image_folder(tmp_path, 2)
    for name in ("again.png", "other.png"):
        (tmp_path / name).write_bytes((tmp_path / "000.png").read_bytes())
    (tmp_path / "again.txt").write_text("caption 0")
    (tmp_path / "other.txt").write_text("another caption")
    plan = folder_plan(tmp_path)
    assert (len(plan.items), plan.num_duplicates) == (3, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "000.png", "caption": "  "}, r"^metadata\.jsonl:1: the caption is empty"),
        ({"file_name": "000.png", "caption": 3}, r"^metadata\.jsonl:1: the caption is 3; expected text"),
        ({"file_name": "000.png"}, r"^metadata\.jsonl:1: found file_name; expected file_name and caption"),
        ({"file_name": "gone.png", "caption": "x"}, r"^metadata\.jsonl:1: the image does not exist"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(tmp_path, row, message):
    image_folder(tmp_path, 1)
    lines(tmp_path, [row])
    with pytest.raises(ValueError, match=message):
        folder_plan(tmp_path)


def test_folders_that_hold_nothing_to_use(tmp_path):
    with pytest.raises(ValueError, match="holds no images; expected at least one with a caption"):
        folder_plan(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        folder_plan(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"source\.path is empty"):
        folder_plan("")
    picture(0).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"^cat\.png: there is no cat\.txt beside it, nor metadata\.jsonl"):
        folder_plan(tmp_path)


def test_a_table(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    rows = {"picture": [picture(index) for index in range(3)], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    config = SourceConfig(kind="table", path=str(tmp_path / "table"), image_column="picture", caption_column="text")
    plan = plan_import(config)
    assert [(item.caption, item.origin["row"]) for item in plan.items] == [("a", 0), ("b", 1), ("c", 2)]
    assert np.array_equal(np.asarray(plan.draw(plan.items[2:])[0]), np.asarray(picture(2)))
    assert len(plan_import(replace(config, limit=1)).items) == 1
    with pytest.raises(ValueError, match="there is no column caption among picture, text; expected one of images"):
        plan_import(replace(config, caption_column="caption"))


def test_both_sides_of_a_pair_become_records_that_belong_together(tmp_path):
    pairs = [pair(index) for index in range(3)]
    write_pairs(tmp_path, pairs)
    plan = plan_import(SourceConfig(kind="pairs", path=str(tmp_path)))
    assert [(item.side, item.caption) for item in plan.items[:2]] == [("chosen", "prompt 0"), ("rejected", "prompt 0")]
    assert [item.origin["pair"] for item in plan.items[::2]] == [one.key for one in pairs]
    assert plan.items[0].group == plan.items[1].group == plan.items[0].id != plan.items[2].group
    drawn = plan.draw(plan.items[:2])
    assert [np.asarray(one).tolist() for one in drawn] == [
        np.asarray(pairs[0].decode(side)).tolist() for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("share", ["0/2", "1/2"])
def test_the_sides_of_a_pair_are_done_by_one_process(tmp_path, share):
    write_pairs(tmp_path / "pairs", [pair(index) for index in range(8)])
    config = config_of(tmp_path / "run", tmp_path, shards=share, shard=2, stop_after="sources")
    config = replace(config, source=SourceConfig(kind="pairs", path=str(tmp_path / "pairs"), batch_size=4))
    curate(config, components=fakes())
    found = list(histories(CurationRun(config.output)))
    sides = {
        one.source.group: {other.source.side for other in found if other.source.group == one.source.group}
        for one in found
    }
    assert 0 < len(sides) < 8
    assert all(one == {"chosen", "rejected"} for one in sides.values())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Four drawn images of two shapes prompts, of a run, and its configuration."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    source = SourceConfig(
        prompts=str(folder / "prompts.txt"), num_steps=2, guidance_scale=2.0, eta=1.0, seed=7, batch_size=3
    )
    config = replace(config_of(folder / "run", folder), source=source, stop_after="sources")
    curate(config, components=fakes())
    return config


def test_drawn_images_are_those_of_the_sampler(drawn):
    found = list(histories(CurationRun(drawn.output)))
    assert [one.source.caption for one in found] == ["a red circle"] * 2 + ["a blue square"] * 2
    assert [(one.source.origin["prompt"], one.source.origin["image"]) for one in found] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    run = CurationRun(drawn.output)
    images = np.stack([np.asarray(image_of(run, one, "source")) for one in found])
    model = Checkpoint.load("shapes")
    prompts = ["a red circle", "a blue square"]
    expected = generate(model, prompts, seed=7, images_per_prompt=2, num_steps=2, guidance_scale=2.0, eta=1.0)
    assert np.abs(images.astype(int) - to_pixels(expected).astype(int)).max() <= 1


def test_another_seed_or_checkpoint_is_another_run(drawn):
    with pytest.raises(ValueError, match="stage 'sources' were made otherwise: seed was '7' and is '8'"):
        curate(replace(drawn, source=replace(drawn.source, seed=8)), resume=True, components=fakes())


@pytest.mark.slow
def test_more_prompts_may_be_drawn_later(drawn, tmp_path):
    one = replace(drawn, output=str(tmp_path), source=replace(drawn.source, limit=1))
    curate(one, components=fakes())
    curate(replace(one, source=drawn.source), resume=True, components=fakes())
    ids = [[history.source.id for history in histories(CurationRun(path))] for path in (tmp_path, drawn.output)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "gone.txt"}, "prompts is 'gone.txt'"),
        ({"images_per_prompt": 0}, "sets 'images_per_prompt' to 0, but a whole number"),
        ({"prompts": "shapes", "limit": 0}, r"sets 'limit' to 0, but a whole number"),
    ],
)
def test_generation_that_makes_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_generation(SourceConfig(**changes))


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (4, 4), 100).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    plan = folder_plan(tmp_path)
    assert [image.mode for image in plan.draw(plan.items)] == ["RGB", "RGB"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type=v_prediction.*as epsilon"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "does not state the noise schedule"),
    ],
)
def test_a_checkpoint_that_would_draw_rubbish_is_refused_before_it_draws(tmp_path, changes, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(shapes.path(), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    index = folder / "model_index.json"
    name = changes.get("_class_name", json.loads(index.read_text())["scheduler"][1])
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    with pytest.raises(ValueError, match=message):
        plan_generation(SourceConfig(prompts="shapes", limit=1, model=ModelConfig(source=str(folder))))
