"""A run at any address that fsspec knows, as on an object store: it ends as one in a folder, killed or not."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpo.config.load import to_yaml
from rpo.curation.curate import curate
from rpo.curation.export import export
from rpo.curation.page import write_page
from rpo.curation.status import status_of
from rpo.curation.store.address import Store
from rpo.curation.store.mark import read_marks
from tests.curation.fakes import config_of, fakes, finished, image_folder, lines_of, named
from tests.curation.test_killed import require_same_shards

ROOT = Path(__file__).parent.parent.parent
COUNT, SHARD = 24, 4
KILLS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    return finished(config_of(tmp_path_factory.mktemp("undisturbed") / "run", source, shard=SHARD)).store.address


def require_same(address, undisturbed, tmp_path):
    assert lines_of(address) == lines_of(undisturbed)
    require_same_shards(address, undisturbed)
    there, here = status_of(address), status_of(undisturbed)
    assert (there.kept, there.dropped, there.records) == (here.kept, here.dropped, here.records)
    one, two = (export(place, to=tmp_path / name).path for place, name in ((address, "one"), (undisturbed, "two")))
    assert (one / "metadata.jsonl").read_bytes() == (two / "metadata.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_run_at_an_address_is_one_in_a_folder(request, kind, undisturbed, source, tmp_path):
    place = request.getfixturevalue("bucket") if kind == "s3" else f"{kind}://{tmp_path}"
    address = f"{place}/whole"
    config = config_of(address, source, shard=SHARD)
    curate(config, components=fakes())
    with pytest.raises(ValueError, match="holds a run already"):
        curate(config, components=fakes())
    curate(config, resume=True, components=fakes())
    require_same(address, undisturbed, tmp_path)
    assert write_page(address) == f"{address}/pairs.html" and Store(address).read("pairs.html")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_on_an_object_store_are_killed(bucket, undisturbed, source, tmp_path):
    address, chance = f"{bucket}/killed", random.Random(0)
    config = named(config_of(address, source, shard=SHARD, workers=2))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "rpo.cli", "curate", str(tmp_path / "run.yaml"), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed, code = 0, None
    while code != 0:
        done = num_done(address)
        run = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        while killed < KILLS and run.poll() is None:
            time.sleep(0.05)
            if num_done(address) > done:
                time.sleep(chance.uniform(0, 0.5))
                run.kill()
                killed += 1
                break
        code = run.wait(300)
        assert code in (0, -9)
    assert killed == KILLS
    require_same(address, undisturbed, tmp_path)


def num_done(address):
    return sum(len(mark.stages) for mark in read_marks(Store(address)))
