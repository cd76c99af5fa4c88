"""`rpo align` killed anywhere, again and again, ends in the bits of a run that nobody disturbed."""

import multiprocessing
import random
import time

import pytest

from rpo.adapters.lora_file import WEIGHT_FILE
from tests.run_state import result_of
from tests.runs.test_same_bits import ALIGN, assert_same

KILLS = 20


def align(words, log):
    """One call of the command, in a process of its own; what it says goes to a file."""
    import os
    import sys

    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8")  # noqa: SIM115 - the process ends with it
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from rpo.cli.main import main

    torch.set_num_threads(1)
    os._exit(main(words))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_at_random_ends_as_one_that_is_not(tmp_path):
    (tmp_path / "align.yaml").write_text(ALIGN, encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rpo.runs.align", "rpo.cli.main"])  # a start costs no import
    draw, log = random.Random(3), tmp_path / "log.txt"

    def start(folder):
        words = ["align", str(tmp_path / "align.yaml"), f"output={folder}", "--resume"]
        process = context.Process(target=align, args=(words, str(log)))
        process.start()
        return process

    began = time.monotonic()
    undisturbed = start(tmp_path / "whole")
    undisturbed.join()
    seconds = time.monotonic() - began
    assert undisturbed.exitcode == 0, log.read_text(encoding="utf-8")[-3000:]
    expected = result_of(tmp_path / "whole")
    assert f"lora/{WEIGHT_FILE}" in expected

    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{runs}"
        runs += 1
        while True:
            process = start(folder)
            process.join(timeout=draw.uniform(0.1, 0.6) * seconds if kills < KILLS else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                continue
            assert process.exitcode == 0, log.read_text(encoding="utf-8")[-3000:]
            break
        assert_same(expected, result_of(folder))
