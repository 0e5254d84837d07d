"""Monitors tell collapse from health, and change nothing; a slow reader shows as waiting."""

import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from stopfast.build import build_objective
from stopfast.data.digits import digits_folder
from stopfast.data.images import open_images
from stopfast.monitors import Monitors
from stopfast.presets import demo
from stopfast.progress import Meter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return digits_folder(tmp_path_factory.mktemp("data") / "digits")


def small(root):
    config = demo()
    model = replace(
        config.model, embed_dim=32, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=1
    )
    monitor = replace(config.monitor, every=10, images=64, labelled_images=120)
    data = replace(config.data, root=root, loader="pil")
    return replace(config, model=model, monitor=monitor, data=data)


def test_collapse_is_told_once_and_health_is_not(digits, capsys):
    config = small(digits)
    objective = build_objective(config, 10)
    monitors = Monitors(config, open_images(digits / "train"), Console(soft_wrap=True), CPU)
    assert monitors.labelled is not None
    assert len(monitors.watched) == 64 and [len(i) for i in monitors.labelled] == [120, 120]
    healthy = monitors.look(objective)
    assert set(healthy) == {"feature_std", "rankme", "target_variance", "knn"}
    assert healthy["knn"] > 0.15 and "collapsed" not in capsys.readouterr().out
    state = torch.get_rng_state()
    assert monitors.look(objective) == healthy and torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        # Every token the same: nothing of the image, nothing of the place.
        objective.target_encoder.patch_embed.proj.weight.zero_()
        objective.target_encoder.pos_embed.zero_()
        objective.target_encoder.norm.bias.copy_(torch.randn(32))
    fallen = monitors.look(objective)
    monitors.look(objective)
    assert fallen["target_variance"] < 1e-6 < healthy["target_variance"]
    assert fallen["knn"] < 0.15
    assert capsys.readouterr().out.count("collapsed") == 1


def test_when_and_on_what(digits, tmp_path):
    config = small(digits)
    images = open_images(digits / "train")
    monitors = Monitors(config, images, Console(), CPU)
    assert [n for n in range(1, 26) if monitors.due(n, 25)] == [10, 20, 25]
    never = replace(config, monitor=replace(config.monitor, every=0))
    assert not Monitors(never, images, Console(), CPU).due(25, 25)
    unlabelled = replace(config, data=replace(config.data, root=digits / "train"))
    assert Monitors(unlabelled, images, Console(), CPU).labelled is None
    asked = replace(config, monitor=replace(config.monitor, labelled=digits / "train"))
    with pytest.raises(ValueError, match="the same two classes or more"):
        Monitors(asked, images, Console(), CPU)
    absent = replace(config, monitor=replace(config.monitor, labelled=tmp_path / "absent"))
    with pytest.raises(ValueError, match="absent"):
        Monitors(absent, images, Console(), CPU)


@pytest.mark.parametrize(("waits", "computes", "share"), [(0.03, 0.01, 0.75), (0.01, 0.03, 0.25)])
def test_waiting_and_computing(waits, computes, share):
    meter = Meter(8, CPU)
    for _ in range(10):
        with meter.waiting():
            time.sleep(waits)
        time.sleep(computes)
        meter.count()
    timing = meter.report()
    assert timing.waiting == pytest.approx(share, abs=0.1)
    assert timing.images_per_second == pytest.approx(8 / (waits + computes), rel=0.2)
    with meter.waiting():
        pass
    with meter.paused():
        time.sleep(0.1)
    time.sleep(0.01)
    meter.count()
    assert meter.report().seconds_per_step < 0.05
    told = timing.describe(100)
    assert f"{100 * timing.waiting:.0f} % waiting for data" in told and "0:00:0" in told


def test_waiting_on_a_gpu_is_idleness_of_its_stream(monkeypatch):
    """A stream's clock in place of a GPU's: it works on while the host waits."""
    clock = {"host": 0.0, "stream": 0.0}

    class Event:
        def __init__(self):
            clock["stream"] = max(clock["stream"], clock["host"])
            self.at = clock["stream"]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(Meter, "_event", staticmethod(Event))
    monkeypatch.setattr(time, "perf_counter", lambda: clock["host"])

    def steps(meter, waits, works, pause=0.0):
        for _ in range(10):
            with meter.waiting():
                clock["host"] += waits
            clock["stream"] = max(clock["stream"], clock["host"]) + works
            meter.count()
            if pause:
                with meter.paused():
                    clock["host"] = max(clock.values()) + pause
        clock["host"] = max(clock["host"], clock["stream"])
        return meter.report()

    hidden = steps(Meter(8, torch.device("cuda")), waits=0.5, works=1.0)
    assert hidden.waiting == pytest.approx(0, abs=0.05)  # the device never lay idle
    shown = steps(Meter(8, torch.device("cuda")), waits=3.0, works=1.0)
    assert shown.waiting == pytest.approx(2 / 3, abs=0.1)
    paused = steps(Meter(8, torch.device("cuda")), waits=0.5, works=1.0, pause=100.0)
    assert 0 <= paused.waiting < 0.4 and paused.seconds_per_step < 2
