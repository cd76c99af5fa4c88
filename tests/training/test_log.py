"""What is written, what is refused, and what resuming cuts."""

import json
import math
import time

import pytest
from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class

from rpo.training.log import HEADLINE, METRICS, TIMINGS, MetricLog, check_metric_names, cut_metrics, read_metrics


def entry(update, **more):
    return {"update": update, "samples": 8 * update, "seconds": 0.5, "loop/loss": 1.0 / update, **more}


def write(folder, updates):
    log = MetricLog(folder, updates=10, progress=False)
    for update in updates:
        log.write(entry(update))
    log.close()


def test_one_json_object_per_line(tmp_path):
    write(tmp_path, [1, 2, 3])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entry(1), entry(2), entry(3)] == read_metrics(tmp_path)


def test_a_line_is_on_the_disk_before_the_next_update(tmp_path):
    log = MetricLog(tmp_path, updates=10, progress=False)
    log.write(entry(1))
    assert read_metrics(tmp_path) == [entry(1)]
    log.sync()
    log.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    log = MetricLog(tmp_path, updates=10, progress=False)
    log.write(entry(1, **{"loop/grad_norm": math.inf, "dpo/margin": math.nan}))
    log.close()
    assert read_metrics(tmp_path)[0]["loop/grad_norm"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_cutting_drops_later_lines_and_a_torn_one(tmp_path):
    write(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "los')
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    cut_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps(entry(n)) + "\n" for n in (1, 2))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\nnot json\n{"update": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON .* remove the line"):
        read_metrics(tmp_path)


def test_an_undefined_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"metric 'dpo/implicit_acc' is not defined; .* nearest is 'dpo/implicit_accu"):
        check_metric_names(["loop/loss", "dpo/implicit_acc"])


def test_the_table_defines_what_the_log_itself_uses():
    check_metric_names([*HEADLINE, *(name for name in TIMINGS if "/" in name)])
    assert all(len(name.split("/")) == 2 and definition for name, definition in METRICS.items())


def test_other_processes_write_nothing(tmp_path):
    log = MetricLog(tmp_path, updates=10, is_main=False)
    log.write(entry(1))
    log.advance({"loop/loss": 1.0})
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_bar_shows_the_telling_numbers(tmp_path, capsys):
    log = MetricLog(tmp_path, updates=2, first_update=1)
    time.sleep(0.15)  # tqdm redraws at most ten times a second
    log.advance({"loop/loss": 0.693147, "dpo/implicit_accuracy": 0.5, "loop/learning_rate": 1.0})
    log.close()
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "loss=0.6931" in shown
    assert "implicit_accuracy=0.5" in shown
    assert "learning_rate" not in shown


class ListTracker(GeneralTracker):
    name = "list_tracker"
    requires_logging_directory = False
    heard: list = []

    @on_main_process
    def __init__(self, run_name):
        super().__init__()
        self.heard.append(("start", run_name))

    @property
    def tracker(self):
        return self.heard

    @on_main_process
    def store_init_configuration(self, values):
        self.heard.append(("config", values))

    @on_main_process
    def log(self, values, step=None):
        self.heard.append((step, values))

    @on_main_process
    def finish(self):
        self.heard.append("finish")


def test_trackers_get_the_settings_and_the_metrics(tmp_path):
    register_tracker_class(ListTracker)
    log = MetricLog(
        tmp_path,
        updates=2,
        progress=False,
        trackers=("list_tracker",),
        config={"updates": 2, "ema_decay": None, "trackers": ["list_tracker"]},
    )
    log.write(entry(1))
    log.close()
    assert ListTracker.heard == [("start", "rpo"), ("config", {"updates": 2}), (1, {"loop/loss": 1.0}), "finish"]


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_tracker_that_is_not_installed_is_not_left_out_silently(tmp_path):
    with pytest.raises(ValueError, match="tracker 'dvclive' is not installed; .* pip install dvclive"):
        MetricLog(tmp_path, updates=2, trackers=("dvclive",))
    with pytest.raises(ValueError, match="nonsense"):
        MetricLog(tmp_path, updates=2, trackers=("nonsense",))
    assert list(tmp_path.iterdir()) == []
