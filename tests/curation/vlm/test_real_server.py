"""A real OpenAI-compatible server, `transformers serve`, with a tiny random model: its garbage, and its sudden end.

The server ignores `response_format`, so the answer's form is only asked for; the prompt is short, so that what a random
model says still depends on the caption.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rpo.cli.main import main
from rpo.config.load import to_yaml
from rpo.curation.curate import curate
from rpo.curation.curate_config import ChatConfig, CurateConfig, DecideConfig, SourceConfig
from rpo.curation.records import Unavailable
from rpo.curation.store.run import CurationRun
from tests.curation.fakes import lines_of
from tests.curation.vlm.tiny_vlm import save_tiny_vlm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_IMAGES = 24
CONCURRENCY = 3


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen]:
    program = Path(sys.executable).with_name("transformers")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [str(program), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_until_ready(process, port, log)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(process: subprocess.Popen, port: int, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the server did not start: {log.read_text()}")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"picture number {index}")
    return folder


def settings(output: Path, pictures: Path, model: Path, port: int) -> CurateConfig:
    critic = ChatConfig(
        kind="server",
        model=str(model),
        base_url=f"http://127.0.0.1:{port}/v1",
        answer_format="prompt",
        prompt=str(model.parent / "short.txt"),
        max_tokens=24,
        max_retries=1,
        concurrency=CONCURRENCY,
    )
    return CurateConfig(
        output=str(output),
        source=SourceConfig(kind="folder", path=str(pictures)),
        critic=critic,
        decide=DecideConfig(rewards={"jpeg-compressibility": 0.0}),
        evaluation="",
        stop_after="critiques",
        progress=False,
    )


def answers(output: Path) -> set[str]:
    loose = [path.read_text() for path in output.glob("answers/*/*.json")]
    packed = [line for path in output.glob("answers/*.jsonl") for line in path.read_text().splitlines()]
    return {json.loads(one)["text"] for one in loose + packed}


def kill_after(process: subprocess.Popen, output: Path, number: int) -> None:
    while len(answers(output)) < number:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)


def num_requests(log: Path) -> int:
    return log.read_text().count("[Request received]")


def test_garbage_is_counted_and_a_killed_server_costs_what_was_in_flight(pictures, tmp_path, monkeypatch, capsys):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model, port = save_tiny_vlm(tmp_path / "model"), free_port()
    (tmp_path / "short.txt").write_text("Is it {{ caption }}?")
    log, other_log = tmp_path / "first.log", tmp_path / "second.log"
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    with serving(model, port, log) as process:
        (tmp_path / "run.yaml").write_text(to_yaml(settings(undisturbed, pictures, model, port)))
        assert main(["curate", str(tmp_path / "run.yaml")]) == 0
        assert num_requests(log) == NUM_IMAGES
        killer = threading.Thread(target=kill_after, args=(process, killed, NUM_IMAGES // 2))
        killer.start()
        with pytest.raises(Unavailable, match=r"^the server at .* does not answer for model .*; see that it runs"):
            curate(settings(killed, pictures, model, port))
        killer.join()

    before = answers(killed)
    assert NUM_IMAGES // 2 <= len(before) < NUM_IMAGES, "nothing is kept of the items in flight"
    with serving(model, port, other_log):
        curate(settings(killed, pictures, model, port), resume=True)
    assert before < answers(killed)
    assert num_requests(other_log) == NUM_IMAGES - len(before), "what was answered is not asked again"
    assert lines_of(killed) == lines_of(undisturbed), "record for record, as if nothing had happened"

    capsys.readouterr()
    assert main(["curate", "status", str(killed)]) == 0
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("  critiques"))
    assert line.endswith(f" {NUM_IMAGES} parse_error")
    run = CurationRun(killed)
    faults = [row["fault"] for shard in run.shards() for row in shard.rows["critiques"].values()]
    assert len(faults) == NUM_IMAGES
    assert {fault["kind"] for fault in faults} == {"parse_error"}
    assert all(fault["raw"] for fault in faults) and len({fault["raw"] for fault in faults}) > 1
