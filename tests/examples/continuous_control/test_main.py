"""The continuous-control example runs as a story: it prints how close every method came, and draws one figure."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[3]


def test_continuous_control_prints_its_distance_from_the_closed_form_and_draws_a_figure(tmp_path):
    command = [sys.executable, "-m", "examples.continuous_control", "--updates", "3", "--paths", "50"]
    command += ["--folder", str(tmp_path / "runs/control")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {line[:16].strip(): line.split() for line in done.stdout.splitlines()}
    assert rows["closed form"][-4:] == ["-0.4200", "-0.3645", "0.0948", "-0.26222"]
    for name in ("CPG", "CPPO, √KL", "CPPO, linear KL"):
        assert rows[name][-1].endswith("%")
        assert float(rows[name][-1].rstrip("%")) > 2  # three updates are not enough, and the number says so
    assert [path.name for path in (tmp_path / "runs/control").iterdir()] == ["continuous_control.svg"]
    text = "".join(ElementTree.parse(tmp_path / "runs/control/continuous_control.svg").getroot().itertext())
    for words in ("Value of the policy", "optimum", "CPG", "CPPO, √KL", "CPPO, linear KL", "target of CPPO"):
        assert words in text
