"""The record of a run: every step, cut back to the checkpoint, and in other loggers on request."""

import csv
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from stopfast.journal import Journal, open_sinks, require_sinks
from stopfast.presets import demo

CONFIG = demo()


def rows_of(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write(journal, steps):
    for step in steps:
        journal.step({"step": step, "lr": step / 10}, torch.tensor(float(step) ** 2))


def test_rows_wait_for_the_flush_and_are_cut_at_the_checkpoint(tmp_path):
    journal = Journal(tmp_path, 0)
    write(journal, [1, 2, 3])
    assert not list(tmp_path.iterdir()) and journal.flush() == [1.0, 4.0, 9.0]
    assert journal.flush() == []
    journal.look({"step": 3, "rankme": 7.5})
    write(journal, [4, 5])
    journal.close()
    # A kill in the middle of a line, beyond the checkpoint or not, must not stop the next run.
    with (tmp_path / "log.csv").open("a") as file:
        file.write("6,0.6,3")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "l')
    resumed = Journal(tmp_path, 2)
    write(resumed, [3])
    resumed.close()
    expected = [{"step": n, "lr": n / 10, "loss": n**2} for n in (1, 2, 3)]
    assert rows_of(tmp_path / "log.csv") == expected
    assert rows_of(tmp_path / "monitors.csv") == []
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == expected
    assert {p.name for p in tmp_path.iterdir()} == {"log.csv", "log.jsonl", "monitors.csv"}


def test_other_loggers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = replace(CONFIG, run=replace(CONFIG.run, tensorboard=True))
    require_sinks(asked)
    journal = Journal(tmp_path, 0, open_sinks(asked, tmp_path, 0))
    write(journal, [1, 2])
    journal.look({"step": 2, "rankme": 7.5})
    journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("rankme")] == [(2, 7.5)]
    assert not open_sinks(CONFIG, tmp_path, 0)
    resumed = Journal(tmp_path, 1, open_sinks(asked, tmp_path, 1))
    write(resumed, [2])
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


def test_wandb(tmp_path, monkeypatch):
    """What the library is told, by a stand-in of its name; a resumed run is the same one there."""
    told: list = []

    class Run:
        id = "abc"
        log = staticmethod(lambda row, step: told.append((step, row)))
        finish = staticmethod(lambda: told.append("finished"))

    def init(**settings):
        told.append(settings)
        return Run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    asked = replace(CONFIG, run=replace(CONFIG.run, wandb="project"))
    require_sinks(asked)
    for done in (0, 1):
        journal = Journal(tmp_path, done, open_sinks(asked, tmp_path, done))
        write(journal, [done + 1])
        journal.close()
    first, row, end, second, *_ = told
    assert row == (1, {"lr": 0.1, "loss": 1.0}) and end == "finished"
    assert (first["project"], first["id"], second["id"]) == ("project", None, "abc")


def test_looks_keep_their_columns(tmp_path):
    """Labels may come with a resume; and a file that a kill left empty gets its header."""
    (tmp_path / "monitors.csv").touch()
    journal = Journal(tmp_path, 0)
    journal.look({"step": 1, "rankme": 2.0})
    journal.look({"step": 2, "rankme": 3.0, "knn": 0.5})
    header, *rows = csv.reader((tmp_path / "monitors.csv").open(newline=""))
    assert [dict(zip(header, row, strict=True))["knn"] for row in rows] == ["", "0.5"]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_logger_is_told():
    with pytest.raises(ValueError, match=r"expected wandb .*pip install 'stopfast\[wandb\]'"):
        require_sinks(replace(CONFIG, run=replace(CONFIG.run, wandb="project")))


def test_attempt_without_a_checkpoint_is_begun_anew(tmp_path):
    for rate in (1, 2):
        journal = Journal(tmp_path, 0)
        journal.look({"step": 0, "rankme": float(rate)})
        assert journal.looked(0) and not journal.looked(1)
        journal.step({"step": 1, "lr": float(rate)}, torch.tensor(0.5))
        journal.close()
    assert rows_of(tmp_path / "log.csv") == [{"step": 1, "lr": 2.0, "loss": 0.5}]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
