"""The launch scripts of curation, run as they are: several processes make what one makes; slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpo.config.load import to_yaml
from tests.curation.fakes import config_of, finished, image_folder, lines_of, named
from tests.curation.test_killed import require_same_exports, require_same_shards

LAUNCH = Path(__file__).parent.parent.parent / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_parses_and_its_last_line_is_the_command(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert script.read_text().splitlines()[-1].startswith("exec ")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "slurm"])
def test_two_processes_make_what_one_makes(tmp_path, how):
    source = image_folder(tmp_path / "source", 12)
    undisturbed = finished(config_of(tmp_path / "undisturbed" / "run", source, shard=2)).store.address
    (tmp_path / "curate.yaml").write_text(to_yaml(named(config_of("elsewhere", source, shard=2))))
    words = [str(tmp_path / "curate.yaml"), f"output={tmp_path / 'run'}"]
    root, programs = LAUNCH.parent.parent, Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    if how == "torchrun":
        launch(["curate_torchrun.sh", "2", *words], environment)
    else:
        for task in range(2):  # as Slurm says it to the tasks of --array=0-1
            told = {"SLURM_ARRAY_TASK_ID": f"{task}", "SLURM_ARRAY_TASK_COUNT": "2"}
            launch(["curate_slurm.sh", *words], environment | told)
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "run", undisturbed)
    require_same_exports(tmp_path / "run", undisturbed)


def launch(words, environment):
    done = subprocess.run(["bash", str(LAUNCH / words[0]), *words[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
