"""Accuracies over seeds: what arms have in common, their images, figures, resuming and the table."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

pytest.importorskip("pytest_benchmark")

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.engine.results import Results
from benchmarks.engine.runner import running_marker
from benchmarks.quality import command
from benchmarks.quality.arms import (
    ARMS,
    IJEPA,
    STUDIES,
    UNTRAINED,
    UNTRAINED_TOKEN,
    Scale,
    settings,
)
from benchmarks.quality.pixels import Pixels
from benchmarks.quality.summary import Figure, interval, newest_runs
from benchmarks.report import plots
from benchmarks.report.tables import TABLES
from stopfast.build import build_objective
from stopfast.config import DataConfig, Transforms
from stopfast.data.images import open_images
from stopfast.data.loader import TrainPlan, eval_batches, train_batches

SCALE = Scale("cifar10", "preset", 32, 600)
CPU = torch.device("cpu")


@pytest.fixture
def photographs(tmp_path):
    """Twelve photographs of noise, 32 pixels a side, stored without loss."""
    generator = np.random.default_rng(3)
    for number in range(12):
        path = tmp_path / "images" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return open_images(tmp_path / "images")


@pytest.mark.parametrize(("side", "levels"), [(24, 1), (32, 0), (40, 0)])
def test_crops_are_the_loaders(photographs, side, levels):
    """Same images, boxes, mirrors and resampling over two epochs, byte for byte.

    PIL shrinks columns before it stretches rows, and rounds in between: then a byte may be one off.
    """
    plan = TrainPlan(12, 5, Transforms(size=(side, side), flip=0.5), 7)
    pixels, data = Pixels.load(photographs, CPU), DataConfig(loader="pil", threads=1)
    theirs = train_batches(photographs, plan, first_step=1, last_step=4, device=CPU, data=data)
    ours = list(pixels.training(plan, 4))
    level = torch.tensor(plan.transforms.std)[:, None, None] * 255
    for mine, batch in zip(ours, theirs, strict=True):
        assert ((mine - batch.images) * level).abs().max() < levels + 1e-3
    whole = torch.cat(list(pixels.whole(plan.transforms, batch_size=5)))
    (batch,) = eval_batches(photographs, plan.transforms, batch_size=12, device=CPU, data=data)
    assert ((whole - batch.images) * level).abs().max() < 1e-3
    blurred = TrainPlan(12, 5, Transforms(size=(side, side), blur=0.5), 7)
    with pytest.raises(ValueError, match="without gray and blur"):
        next(pixels.training(blurred, 1))


def test_photographs_of_one_size(photographs, tmp_path):
    Image.new("RGB", (31, 32)).save(tmp_path / "images" / "0" / "other.png")
    with pytest.raises(ValueError, match="one size"):
        Pixels.load(open_images(tmp_path / "images"), CPU)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.trained])
def test_only_what_is_learned_differs(name):
    """One encoder, recipe, augmentation and budget; the beginning is the untrained arm's."""
    config, other = settings(ARMS[name], SCALE, 3), settings(ARMS[IJEPA], SCALE, 3)
    rate = other.optim.lr * ARMS[name].rate
    clip = {"clip": config.optim.clip, "clip_norm": config.optim.clip_norm}  # part of DropPos
    assert config.optim == replace(other.optim, lr=rate, **clip)
    token = config.model.class_token
    assert config.model == replace(other.model, class_token=token)
    assert (config.data, config.run, config.step) == (other.data, other.run, other.step)
    assert (config.data.batch_size, config.run.seed) == (32, 3)
    beginning = UNTRAINED_TOKEN if token else UNTRAINED
    first = build_objective(config, 60).modules()["encoder"].state_dict()
    untrained = build_objective(settings(ARMS[beginning], SCALE, 3), 60).modules()["encoder"]
    for key, value in untrained.state_dict().items():
        assert torch.equal(first[key], value), key


def test_noise_at_every_width():
    """Levels are of the preset's; projected, noise keeps its share of a position's length."""
    levels = {arm.name: settings(arm, SCALE, 0).noise for arm in STUDIES["covariance"]}
    assert levels["stop"].noise_var == pytest.approx(0.7)
    assert levels["stop, 0.5 of its noise"].noise_var == pytest.approx(0.35)
    fixed = levels["stop, fixed covariance"]
    assert (fixed.cov, fixed.noise_var) == ("fixed", pytest.approx(0.7 * 0.02 * 96**0.5))
    wide = settings(ARMS["stop"], Scale("cifar10", "small", 32, 600), 0)
    assert wide.noise.noise_var**2 * wide.model.embed_dim == pytest.approx(0.7**2 * 96)
    assert settings(ARMS["stop without noise"], SCALE, 0).noise.variant == "stop_off"


def test_the_average_of_short_runs():
    """Reaches back over the same part of a run as the preset's own; never shorter than the preset's."""
    starts = [
        settings(ARMS[IJEPA], SCALE._replace(steps=steps), 0).optim.ema
        for steps in (10, 600, 100_000)
    ]
    assert starts == [
        (pytest.approx(0.06), 1.0),
        (pytest.approx(0.98433, abs=1e-5), 1.0),
        (0.996, 1.0),
    ]


def test_intervals():
    """Student's, of seeds; none of one seed."""
    scores = [0.31, 0.35, 0.30]
    low, high = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
    found = interval(scores)
    assert found is not None and found.half is not None
    assert found.mean == pytest.approx(0.32)
    assert (
        found.half == pytest.approx((high - low) / 2) == pytest.approx(4.3027 * 0.0152753, rel=1e-4)
    )
    assert interval([0.5]) == Figure(0.5, None) and interval([]) is None


def row(arm, seed, knn, linear=0.5, **more):
    told = {**SCALE._asdict(), "images": 20, "known": 20, "asked": 10, "precision": "fp32", **more}
    info = {"kind": "quality", "arm": arm, "seed": seed, "key": f"{arm} {seed}", "settings": told}
    seconds = {"train_s": 2.0, "evaluate_s": 1.0, "processor_s": 2.0 + 2 * seed}
    return {"extra_info": {**info, **seconds, "knn": knn, "linear": linear}}


def written(path, rows, commit="abcdef0"):
    results = Results.open(path)
    results.begin({"commit": commit, "dirty": False})
    for one in rows:
        results.add(one)
    return results


ROWS = [
    *(row("droppos", seed, 0.4 + 0.1 * seed) for seed in (0, 1, 2)),
    *(row(IJEPA, seed, 0.3 + 0.1 * seed) for seed in (1, 0)),
    *(row(UNTRAINED_TOKEN, seed, 0.3 + 0.2 * seed) for seed in (0, 1, 2)),
    row(UNTRAINED, 0, 0.25),
]


def test_table(tmp_path):
    """Differences are of the seeds that both have, and to the encoder that the arm began as."""
    written(tmp_path / "cpu" / "2026-01-01-abcdef0-quality.json", ROWS)
    table = TABLES["quality"](tmp_path)
    cells = {line[1]: dict(zip(table.headings, line, strict=True)) for line in table.rows}
    assert list(cells) == [UNTRAINED, UNTRAINED_TOKEN, IJEPA, "droppos"]
    told = cells["droppos"]
    assert (told["seeds"], told["kNN, %"]) == ("3", "50.0 ± 24.8")
    assert (told["s a run"], told["of the processor"]) == ("3", "4")
    assert told["kNN less untrained"] == "+0.0 ± 24.8"  # 0.1, 0 and -0.1
    assert told["kNN less ijepa"] == "+10.0 ± 0.0"
    assert cells[IJEPA]["kNN less untrained"] == "+5.0" and cells[IJEPA]["kNN less ijepa"] == ""
    assert cells[UNTRAINED]["kNN less untrained"] == ""
    assert "600 steps of 32 images" in table.notes[0] and "abcdef0" in table.notes[0]
    assert TABLES["noise"](tmp_path).rows == [] == TABLES["rates"](tmp_path).rows


def test_table_and_plot_of_noise(tmp_path):
    """Where levels were taken; a newer file of them leaves the table of objectives as it was."""
    pytest.importorskip("matplotlib")
    written(tmp_path / "cpu" / "2026-01-01-abcdef0-quality.json", ROWS)
    before = TABLES["quality"](tmp_path).rows
    levels = [row("stop", 0, 0.5), row("stop without noise", 0, 0.4), row(IJEPA, 0, 0.3)]
    written(tmp_path / "cpu" / "2026-01-01-bbbbbbb-quality.json", levels, "bbbbbbb")
    table = TABLES["noise"](tmp_path)
    assert [line[1] for line in table.rows] == [IJEPA, "stop without noise", "stop"]
    assert table.rows[2][table.headings.index("kNN less stop without noise")] == "+10.0"
    assert TABLES["quality"](tmp_path).rows == before
    shown = plots.numbers(tmp_path)
    assert shown["cpu-noise"]["kNN"]["stop"] == [0.5, 0.5, 0.5]
    assert shown["cpu-quality"]["kNN"]["droppos"] == pytest.approx([0.2516, 0.5, 0.7484], abs=1e-4)
    drawn = plots.write_plots(tmp_path)
    assert [path.name for path in drawn] == ["cpu-noise.svg", "cpu-quality.svg"]
    assert b"droppos" in drawn[1].read_bytes() and plots.stale(tmp_path) == []


def test_budgets_are_never_mixed(tmp_path):
    """The newest budget and code of a device count alone, in however many files they are."""
    cpu = tmp_path / "cpu"
    old = written(cpu / "2026-01-01-aaaaaaa-quality.json", ROWS, "aaaaaaa")
    for one in old.document["benchmarks"]:
        one["extra_info"]["taken"] = "1999-01-01T00:00:00"
    old.document["datetime"] = "2999-01-01T00:00:00"  # begun last
    old.write()
    results = written(cpu / "a.json", [row(IJEPA, 0, 0.9, steps=10)], "bbbbbbb")
    written(cpu / "b.json", [row("mae", 0, 0.8, steps=10), row("stop", 0, 0.1)], "bbbbbbb")
    written(cpu / "c.json", [row("droppos", 0, 0.7, steps=10)], "ccccccc")

    def shown():
        (runs,) = newest_runs(tmp_path, {IJEPA})
        return {arm: runs.figure(arm, "knn").mean for arm in runs.rows}, runs.commits

    assert shown() == ({IJEPA: 0.9, "mae": 0.8}, ("bbbbbbb",))
    again = row(IJEPA, 0, 0.5, steps=10)["extra_info"]
    results.add({"extra_info": {**again, "key": "again"}})
    for taken, score in (("2000-01-01T00:00:00", 0.9), ("2999-01-01T00:00:00", 0.5)):
        results.document["benchmarks"][-1]["extra_info"]["taken"] = taken
        results.write()
        assert shown()[0][IJEPA] == score
    for path in (cpu / "a.json", cpu / "b.json"):
        file = Results.open(path)
        file.document["provenance"][0]["dirty"] = True
        file.write()
    assert shown() == ({IJEPA: 0.5}, ("bbbbbbb, altered",))


SMALL = ("--steps", "10", "--batch", "8", "--images", "200", "--known", "100", "--asked", "50")


def call(path, *more):
    return main(["quality", "--device", "cpu", "--results", str(path), *SMALL, *more])


def test_a_run_of_digits(tmp_path):
    """Two objectives and their beginnings, really trained: repeatable, and finished rows are kept."""
    path, arms = tmp_path / "cpu" / "now.json", ("--arm", "mae", "droppos", UNTRAINED_TOKEN)
    assert call(path, "--seeds", "1", *arms) == 0
    first = Results.open(path).rows(kind="quality")
    assert [r["extra_info"]["arm"] for r in first] == [UNTRAINED_TOKEN, "droppos", "mae"]
    assert not running_marker(path).exists()
    assert all(r["stats"]["data"] == [r["extra_info"]["train_s"]] for r in first)
    beginning, *trained = (r["extra_info"] for r in first)
    assert beginning["losses"] == [] and beginning["knn"] > 0.1
    for info in trained:
        assert len(info["losses"]) == 10 and info["losses"][-1] < info["losses"][0]
    assert call(path, "--seeds", "2", *arms) == 0
    both = Results.open(path).rows(kind="quality")
    assert both[:3] == first and [r["extra_info"]["seed"] for r in both[3:]] == [1, 1, 1]
    again = tmp_path / "again.json"
    call(again, "--seeds", "1", "--arm", "mae")
    (repeated,) = Results.open(again).rows()
    names = ("losses", "knn", "linear")
    assert [repeated["extra_info"][n] for n in names] == [trained[1][n] for n in names]
    assert both[5]["extra_info"]["losses"] != trained[1]["losses"]


def test_resuming_and_refusing(tmp_path, monkeypatch, capsys):
    """Killed: goes on behind its rows. A failed run is a row, the others go on, and it is taken again."""
    path, taken = tmp_path / "now.json", []

    def fake(arm, seed, budget, data, device):
        taken.append((arm.name, seed))
        if len(taken) == 3:
            raise KeyboardInterrupt
        if len(taken) == 4:
            raise FloatingPointError("not finite")
        return {"knn": 0.1, "linear": 0.2, "train_s": 1.0, "evaluate_s": 1.0, "losses": []}

    monkeypatch.setattr(command, "run_arm", fake)
    arms = ("--seeds", "2", "--arm", "mae", "ijepa")
    with pytest.raises(KeyboardInterrupt):
        call(path, *arms)
    assert taken == [("ijepa", 0), ("mae", 0), ("ijepa", 1)]
    assert json.loads(running_marker(path).read_text())["seed"] == 1
    assert call(path, *arms) == 1
    assert taken[3:] == [("ijepa", 1), ("mae", 1)]
    (failed,) = Results.open(path).not_timed()
    assert failed["extra_info"]["reason"] == "FloatingPointError: not finite"
    assert call(path, *arms) == 0 and taken[5:] == [("ijepa", 1)]
    assert not Results.open(path).not_timed()
    assert call(path, *arms, "--seconds", "0") == 0 and len(taken) == 6
    capsys.readouterr()
    before = path.read_bytes()
    assert call(path, "--steps", "20", *arms) == 2
    assert "'steps': 10" in capsys.readouterr().err and path.read_bytes() == before
    assert call(tmp_path / "none.json", "--steps", "15") == 2
    for wrong in (("--arm", "nothing"), ("--seeds", "0")):
        with pytest.raises(SystemExit):
            call(tmp_path / "none.json", *wrong)
    assert not (tmp_path / "none.json").exists()


def test_script_takes_accuracies(tmp_path):
    """On a GPU with small photographs alone; a rehearsal on digits."""
    rehearsal = gpu.GpuOptions(output=tmp_path, device="cpu")
    (task,) = [task for task in gpu.tasks(rehearsal) if task.name.startswith("quality")]
    kind, *rest = task.command
    assert kind == "quality" and rest[:2] == ["--arm", "untrained"]
    options = asdict(rehearsal) | {"small": tmp_path}
    found = object.__new__(gpu.GpuOptions)
    found.__dict__.update(options, device="cuda")
    names = [task.name for task in gpu.tasks(found) if task.name.startswith("quality")]
    assert names == ["quality-objectives", "quality-noise", "quality-combinations"]
