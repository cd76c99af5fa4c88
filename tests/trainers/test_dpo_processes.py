"""Two processes make the updates of one, from pairs on disk and one cache."""

import json
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from rpo.training.log import TIMINGS, read_metrics
from rpo.training.processes import Processes
from tests.forked import by_torchrun, together
from tests.trainers.pair_runs import steady, toy_pairs, trainer_of, weights

PAIRS = 3
SCRIPT = """
import sys
from pathlib import Path
from rpo.training.processes import Processes

Processes()  # joins the other process; what is imported from here on finds a group
from tests.trainers.test_dpo_processes import in_each_process

in_each_process(Path(sys.argv[1]))
"""
MICRO_BATCHES = (2, 1)
"""Of each of two processes: one per update, and two."""


def made(root, name, *, micro_batch):
    """Two updates of four pairs: several epochs, mirrored or not."""
    learning = {"updates": 2, "micro_batch": micro_batch, "learning_rate": 3e-3}
    settings = {"cache_folder": str(root / "cache"), "pairs": read_pairs(root / "pairs"), "flip": True}
    return steady(trainer_of(root / name, learning=learning, **settings))


def trained(root, name, *, micro_batch):
    """The trainer, and how many images it encoded."""
    trainer, encoded = made(root, name, micro_batch=micro_batch), Counter(images=0)
    trainer.run.model.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.update(images=len(args[0])))
    trainer.train()
    in_training = encoded["images"]
    trainer.save()
    return trainer, in_training


def in_each_process(root):
    torch.set_num_threads(1)
    seen = {}
    for micro_batch in MICRO_BATCHES:
        trainer, encoded = trained(root, f"two-{micro_batch}", micro_batch=micro_batch)
        seen[str(micro_batch)] = {"weights": weights(trainer).tolist(), "encoded": encoded, "plan": trainer.plan()}
    here = Processes()
    torch.distributed.destroy_process_group()
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    (root / f"seen-{here.index}.json").write_text(json.dumps({**seen, "threads": threads}))


@pytest.fixture(scope="module", params=["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def two(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    write_pairs(root / "pairs", toy_pairs(PAIRS))
    if request.param == "torchrun":
        by_torchrun("-c", SCRIPT, str(root), limit=200)
    else:
        together(2, root / "processes", in_each_process, root)
    return root, [json.loads((root / f"seen-{index}.json").read_text()) for index in range(2)]


@pytest.fixture(scope="module")
def one(two):
    return trained(two[0], "one", micro_batch=4)


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_two_processes_make_the_updates_of_one(two, one, micro_batch):
    root, seen = two
    ours, theirs = (torch.tensor(process[str(micro_batch)]["weights"]) for process in seen)
    assert torch.equal(ours, theirs)
    alone = weights(one[0])
    assert (alone - weights(made(root, "fresh", micro_batch=4))).abs().max() > 1e-3
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-6)
    both, single = read_metrics(root / f"two-{micro_batch}"), read_metrics(root / "one")
    for line, expected in zip(both, single, strict=True):
        assert line["samples"] == expected["samples"]
        # A mean of ratios depends on how the pairs are dealt to micro-batches; everything else does not.
        for name in {name for name in expected if not name.endswith("_ratio")} - set(TIMINGS):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_images_are_encoded_once_by_all_together(two, one):
    root, seen = two
    shares = [process["2"]["encoded"] for process in seen]
    connection = sqlite3.connect(root / "cache" / "latents.sqlite")
    assert connection.execute("SELECT count(*) FROM tensors").fetchone() == (sum(shares),)
    connection.close()
    assert sum(shares) > 2 * PAIRS  # some of the images mirrored too
    assert min(shares) > 0
    assert [process["1"]["encoded"] for process in seen] == [0, 0]
    assert one[1] == 0


def test_the_lora_is_written_once_and_is_that_of_both(two, one):
    root, seen = two
    files = [load_file(root / name / "lora" / WEIGHT_FILE) for name in ("two-2", "one")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], rtol=0, atol=1e-6)
    assert not list((root / "two-2" / "lora").glob(".*"))
    assert "2 pairs × 1 micro-batch × 2 processes = 4 pairs per update" in seen[0]["2"]["plan"]


def test_no_thread_of_the_group_outlives_it(two):
    # torch aborts a process, now and then, whose gloo threads still run when Python ends.
    for process in two[1]:
        assert not [name for name in process["threads"] if "gloo" in name]
