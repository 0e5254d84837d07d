"""The demo from end to end, with small networks and few steps: stopped, gone on with, and called again."""

import io
import os
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from stopfast import demo as module
from stopfast.config import ModelConfig, to_document
from stopfast.data.digits import digits_folder
from stopfast.demo import demo, demo_configs
from stopfast.presets import PRESETS
from stopfast.step import TrainStep
from stopfast.train import Stopped

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def few_steps(monkeypatch):
    """The demo's preset with a small network and four steps an epoch; the quickest probe."""
    base = PRESETS["demo"]()
    small = ModelConfig(
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=2,
        predictor_embed_dim=16,
        predictor_depth=1,
    )
    preset = replace(base, model=small, data=replace(base.data, batch_size=256, loader="pil"))
    monkeypatch.setattr(module, "PRESETS", {"demo": lambda: preset})
    monkeypatch.setattr(module, "_PROBES", ("knn",))
    monkeypatch.setattr(module, "_LOOKS", 1)


def told(output, epochs=1) -> tuple[str, object]:
    text = io.StringIO()
    result = demo(output, Console(file=text, width=100), device="cpu", epochs=epochs)
    return text.getvalue(), result


def test_a_stopped_demo_goes_on_and_a_finished_one_is_not_made_again(
    few_steps, tmp_path, monkeypatch
):
    steps = []
    whole = TrainStep.__call__

    def stopped(self, images, step):
        steps.append(step)
        if len(steps) == 6:  # the second of the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, images, step)

    monkeypatch.setattr(TrainStep, "__call__", stopped)
    with pytest.raises(Stopped) as stop:
        told(tmp_path)
    assert stop.value.signal == signal.SIGTERM
    assert steps == [1, 2, 3, 4, 1, 2]
    assert not (tmp_path / "report.html").exists()

    text, page = told(tmp_path)
    assert steps[6:] == [3, 4]
    assert page == tmp_path / "report.html"
    assert page.as_uri() in text.replace("\n", "")
    html = page.read_text()
    for expected in ("raw pixels", "untrained", "ijepa", "stop", "kNN"):
        assert expected in text
        assert expected in html
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "digits", "evaluation.json", "ijepa", "report.html", "stop",
    ]  # fmt: skip

    told(tmp_path)
    assert len(steps) == 8

    with pytest.raises(ValueError, match=r"other optim\.epochs.*choose another --output"):
        told(tmp_path, epochs=2)


def test_runs_differ_in_their_queries_alone(tmp_path):
    configs = demo_configs(tmp_path, digits_folder(tmp_path / "digits"))
    first, second = (to_document(config) for config in configs.values())
    assert first["noise"].pop("variant") == "ijepa"
    assert second["noise"].pop("variant") == "stop"
    assert first["run"].pop("output") != second["run"].pop("output")
    assert first == second


def test_without_matplotlib_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="pip install"):
        told(tmp_path)
    assert not any(tmp_path.iterdir())
