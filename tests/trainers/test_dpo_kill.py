"""kill -9 while caching, training and saving: what is resumed ends as undisturbed."""

import io
import os
import shutil
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import rpo.adapters.lora
from rpo.adapters.formats import write
from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from rpo.training.log import TIMINGS, read_metrics
from tests.forked import killed_in
from tests.trainers.pair_runs import toy_pairs, trainer_of

PAIRS = 11
LEARNING = {
    "updates": 6,
    "micro_batch": 2,
    "lr_schedule": "cosine",
    "warmup_updates": 2,
    "ema_decay": 0.5,
    "checkpoint_every": 2,
}


def trainer_in(folder):
    """As many things that a kill can lose as there are; an odd number of pairs, so that micro-batches span epochs."""
    pairs = read_pairs(folder.parent / "pairs")
    return trainer_of(folder, pairs=pairs, flip=True, draws_per_pair=1, learning=LEARNING)


# What dies, in a process of its own.


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def while_caching(trainer):
    rows = Counter()

    def count(_, args):
        rows["encoded"] += len(args[0])
        if rows["encoded"] == 20:
            die()

    trainer.run.model.vae.encoder.register_forward_pre_hook(count)


def while_updating(_):
    """When the weights have moved, and nothing else knows it yet."""
    steps = Counter()

    def count(*_):
        steps["done"] += 1
        if steps["done"] == 4:
            die()

    register_optimizer_step_post_hook(count)


def while_saving(_):
    """When half of a file is written."""
    save = torch.save

    def save_half(part, file):
        if not str(getattr(file, "name", "")).endswith("checkpoint-000004.tmp/optimizer.pt"):
            return save(part, file)
        whole = io.BytesIO()
        save(part, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    torch.save = save_half


def while_removing(_):
    """When half of an old checkpoint is gone."""
    rmtree = shutil.rmtree

    def remove_half(path, **options):
        if Path(path).name != "checkpoint-000002.tmp" or options:
            return rmtree(path, **options)
        for file in sorted(Path(path).iterdir())[:2]:
            file.unlink()
        die()

    shutil.rmtree = remove_half


def while_writing_lora(_):
    """When half of the file is written."""
    save = write.save_file

    def save_half(tensors, file, header):
        save(tensors, file, header)
        if file.name == WEIGHT_FILE:
            os.truncate(file, file.stat().st_size // 2)
            die()

    write.save_file = save_half


def while_verifying_lora(_):
    rpo.adapters.lora.verify_lora = die


STAGES = {
    "caching": while_caching,
    "updating": while_updating,
    "saving": while_saving,
    "removing": while_removing,
    "writing_lora": while_writing_lora,
    "verifying_lora": while_verifying_lora,
}
"""In the order in which one run meets them: it is killed, resumed, killed again, …"""


def run_to_death(folder, place_trap):
    trainer = trainer_in(folder)
    place_trap(trainer)
    trainer.train(resume=True)
    trainer.save()


# What is expected of the rest.


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    write_pairs(root / "pairs", toy_pairs(PAIRS))
    before = None
    for stage, place_trap in STAGES.items():
        if before is not None:
            shutil.copytree(root / before, root / stage)
        killed_in(run_to_death, root / stage, place_trap)
        before = stage
    return root


def finished(folder, *, resume):
    """Run to the end in this process: everything that the run leaves, and how much it encoded."""
    trainer, encoded = trainer_in(folder), Counter()
    trainer.run.model.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.update(images=len(args[0])))
    trainer.run.model.text_encoders["text_encoder"].register_forward_pre_hook(
        lambda _, args: encoded.update(prompts=len(args[0]))
    )
    trainer.train(resume=resume)
    in_training = Counter(encoded)  # what saving encodes is its own check of the LoRA
    saved = trainer.save()
    trainer.algorithm.data.latents.close()
    trainer.algorithm.data.embeddings.close()
    trainer.algorithm.reference.kept._store.close()
    lines = [{name: value for name, value in line.items() if name not in TIMINGS} for line in read_metrics(folder)]
    end = {
        "weights": [parameter.tolist() for parameter in trainer.run.policy.parameters],
        "lora": {name: tensor.tolist() for name, tensor in load_file(saved / WEIGHT_FILE).items()},
        "lines": lines,
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }
    return end, in_training


@pytest.fixture(scope="module")
def undisturbed(killed):
    return finished(killed / "undisturbed", resume=False)


def stored(folder, table):
    connection = sqlite3.connect(folder / "cache" / f"{table}.sqlite")
    (rows,) = connection.execute("SELECT count(*) FROM tensors").fetchone()
    connection.close()
    return rows


def unfinished(folder):
    found = [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name.startswith(".saving-")]
    return sorted(str(path.relative_to(folder)) for path in found)


def test_an_undisturbed_run_encodes_each_image_once_and_leaves_nothing_temporary(killed, undisturbed):
    end, encoded = undisturbed
    assert encoded == {"images": 2 * PAIRS, "prompts": 4}
    assert [line["update"] for line in end["lines"]] == [1, 2, 3, 4, 5, 6]
    assert any(any(row) for row in end["weights"][1])  # B has left zero
    top = sorted(name for name in end["files"] if "/" not in name)
    assert top == [".lock", "cache", "checkpoint-000004", "checkpoint-000006", "lora", "metrics.jsonl"]
    assert sorted(name for name in end["files"] if name.startswith(("lora/", "cache/"))) == [
        "cache/embeddings.sqlite",
        "cache/latents.sqlite",
        "cache/reference_errors.sqlite",
        "lora/README.md",
        "lora/kohya_lora_weights.safetensors",
        "lora/peft",
        "lora/peft/adapter_config.json",
        "lora/peft/adapter_model.safetensors",
        f"lora/{WEIGHT_FILE}",
        "lora/training_config.yaml",
    ]


def test_each_was_killed_where_it_should(killed):
    assert stored(killed / "caching", "latents") == 16  # of 19 encoded: whole chunks are kept
    assert not list(killed.glob("caching/checkpoint-*"))
    assert [line["update"] for line in read_metrics(killed / "updating")] == [1, 2, 3]
    assert not unfinished(killed / "updating")
    assert unfinished(killed / "saving") == ["checkpoint-000004.tmp"]
    assert (killed / "saving/checkpoint-000004.tmp/optimizer.pt").stat().st_size > 0
    assert unfinished(killed / "removing") == ["checkpoint-000002.tmp"]
    for stage in ("writing_lora", "verifying_lora"):
        (staged,) = (killed / stage / "lora").iterdir()
        assert staged.name.startswith(".saving-")
        assert (staged / WEIGHT_FILE).is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_killed_ends_as_if_undisturbed(killed, undisturbed, stage):
    folder = shutil.copytree(killed / stage, killed / f"{stage}-resumed")
    kept = stored(folder, "latents")
    end, encoded = finished(folder, resume=True)
    whole, whole_encoded = undisturbed
    for part, expected in whole.items():
        assert end[part] == expected, part
    assert kept + encoded["images"] == whole_encoded["images"]
    assert encoded["prompts"] == (4 if stage == "caching" else 0)
