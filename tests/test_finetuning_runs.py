"""Fine-tuning from images to a folder for timm: data, accuracy, and whole runs that stop and go on."""

import csv
import json
import math
import os
import random
import re
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from stopfast.build import build_objective, build_step
from stopfast.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from stopfast.cli import main
from stopfast.config import Transforms
from stopfast.data.images import open_images
from stopfast.data.loader import TrainPlan
from stopfast.finetuning import FinetuneSettings, finetune
from stopfast.finetuning.accuracy import measure_accuracy
from stopfast.finetuning.data import (
    TrainKeys,
    in_order,
    load,
    share_of,
)
from stopfast.finetuning.step import FinetuneStep
from stopfast.progress import Stopped
from stopfast.run_state import DataState, save_run
from tests.small_classifier import (
    CLASSES,
    CPU,
    PLAIN,
    RANDOM,
    labelled,
    small_config,
    write_stripes,
)

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.data.config import resolve_model_data_config  # noqa: E402

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A run's folder whose checkpoint has done one step."""
    folder, config = tmp_path_factory.mktemp("pretrained") / "tiny", small_config()
    objective = build_objective(config, 10)
    step = build_step(config, objective, CPU)
    step(torch.randn(4, 3, 16, 16), 1)
    save_run(folder, config, objective, step, DataState(4, "none", "pil"), 1)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes"))


def settings(pretrained, photographs, output, recipe=PLAIN, **other):
    return FinetuneSettings(
        checkpoint=pretrained,
        data=photographs,
        name="small",
        output=output,
        workers=0,
        recipe=recipe,
        **other,
    )


def test_an_image_is_a_function_of_its_epoch_and_number(photographs):
    images = labelled(photographs, "train", RANDOM)
    first, label = images[2, 7]
    _ = random.random(), np.random.rand(), torch.rand(1)
    again, _ = images[2, 7]
    assert torch.equal(first, again) and label == images.images.labels[7]
    assert not any(torch.equal(first, images[key][0]) for key in [(3, 7), (2, 8)])


def test_workers_change_nothing(photographs):
    images = labelled(photographs, "train", RANDOM)
    keys = [[(0, 3), (1, 3)], [(0, 20), (5, 0)]]
    here, there = (list(load(images, keys, workers, CPU)) for workers in (0, 1))
    for (mine, labels), (theirs, others) in zip(here, there, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(labels, others)


def test_steps_read_what_they_would_without_a_resume():
    plan = TrainPlan(10, 4, Transforms(), seed=1)
    whole = list(TrainKeys(plan, 1, 6, 2))
    assert list(TrainKeys(plan, 4, 6, 2)) == whole[6:] and {len(part) for part in whole} == {2}
    for epoch in range(3):  # two steps of two parts each
        read = [key for part in whole[4 * epoch : 4 * epoch + 4] for key in part]
        assert {e for e, _ in read} == {epoch} and len({sample for _, sample in read}) == 8


def test_share_is_of_each_class(photographs):
    images = open_images(photographs / "train")
    first, again, other = (
        share_of(images, replace(PLAIN, share=0.25, seed=seed)) for seed in (0, 0, 1)
    )
    assert first.names == again.names != other.names
    assert Counter(first.labels) == {0: 2, 1: 2, 2: 2}
    assert share_of(images, PLAIN) is images


def test_evaluation_resizes_bicubically_and_cuts_the_centre(photographs):
    recipe = replace(PLAIN, center=16 / 18)
    images = labelled(photographs, "test", recipe, training=False)
    with Image.open(photographs / "test" / images.images.names[5]) as stored:
        resized = stored.resize((18, 18), Image.Resampling.BICUBIC).crop((1, 1, 17, 17))
    expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255
    transforms = small_config().data.transforms
    mean, std = (torch.tensor(v)[:, None, None] for v in (transforms.mean, transforms.std))
    torch.testing.assert_close(images[0, 5][0], (expected - mean) / std)


@pytest.mark.parametrize("classes", [5, 8])
def test_accuracy_by_hand(classes):
    """Logits are the images themselves: the true class is first in two of four, fifth in one."""
    logits = torch.arange(classes, 0, -1.0).expand(4, classes)
    labels = torch.tensor([0, 0, 4, classes - 1])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    blind_in_training = torch.nn.Dropout(1.0)
    found = measure_accuracy(blind_in_training, batches, "fp32", CPU)
    assert found.top1.value == 0.5 and found.top1.low < 0.5 < found.top1.high
    assert (found.top5 and found.top5.value) == (None if classes == 5 else 0.75)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item())


@pytest.fixture(autouse=True)
def _verdicts_of_its_own(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def losses(output):
    with (output / "log.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_a_run_learns_and_timm_loads_what_it_learned(pretrained, photographs, tmp_path):
    recipe = replace(PLAIN, epochs=12, blr=0.4, positions="learned")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    model = finetune(settings(pretrained, photographs, tmp_path / "run", recipe), QUIET)
    assert (before[0], before[1]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())
    taken = [loss for _, loss in losses(tmp_path / "run")]
    assert taken[0] == pytest.approx(math.log(CLASSES), rel=0.01)
    assert np.mean(taken[-4:]) < 0.7 * taken[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["top1"]["value"] > 0.6 and result["top5"] is None
    with (tmp_path / "run" / "monitors.csv").open() as file:
        looks = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in looks] == list(range(1, 13))
    assert float(looks[-1]["top1"]) == result["top1"]["value"]

    loaded = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    images = labelled(photographs, "test", recipe, training=False)
    batches = load(images, in_order(12, 12), 0, CPU)
    assert measure_accuracy(loaded, batches, "fp32", CPU).loss == pytest.approx(
        result["loss"], rel=1e-5
    )
    assert resolve_model_data_config(loaded)["interpolation"] == "bicubic"
    assert json.loads((model / "config.json").read_text())["label_names"] == list(
        images.images.classes
    )
    # Once more is not twice.
    assert finetune(settings(pretrained, photographs, tmp_path / "run", recipe), QUIET) == model


def test_a_stopped_run_goes_on_to_the_same_bits(pretrained, photographs, tmp_path, monkeypatch):
    def asked(name, **other):
        return settings(pretrained, photographs, tmp_path / name, RANDOM, log_every=1, **other)

    finetune(asked("whole"), QUIET)
    whole = FinetuneStep.__call__

    def stopped(self, parts, number):
        if number in (2, 3):  # in the middle of an epoch, and before the test at its end
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, parts, number)

    monkeypatch.setattr(FinetuneStep, "__call__", stopped)
    for done in (2, 3):
        with pytest.raises(Stopped) as stop:
            finetune(asked("stopped", resume=True), QUIET)
        assert stop.value.checkpoint.name == f"step-{done:07d}"
    with pytest.raises(ValueError, match="holds 3 of 6 steps; go on with --resume"):
        finetune(asked("stopped"), QUIET)
    other = replace(asked("stopped", resume=True), recipe=replace(RANDOM, seed=1))
    with pytest.raises(CheckpointError, match=re.escape("recipe.seed: 1 instead of 0")):
        finetune(other, QUIET)
    finetune(asked("stopped", resume=True), QUIET)

    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    looks = [(tmp_path / name / "monitors.csv").read_text() for name in ("whole", "stopped")]
    assert looks[0] == looks[1] and looks[0].count("\n") == 3
    first, second = (
        load_checkpoint(newest_checkpoint(tmp_path / name / "checkpoints"))[0]
        for name in ("whole", "stopped")
    )
    for part in ("model", "optimizer"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])


def test_what_cannot_be_trained_on_is_refused(
    pretrained, photographs, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "one.png")
    good = settings(pretrained, photographs, output)
    for wrong, told in [
        (replace(good, checkpoint=tmp_path), "expected a checkpoint or a folder of them"),
        (replace(good, data=flat), "with train/ of at least two classes"),
        (replace(good, recipe=replace(PLAIN, batch_size=64)), "at least one batch of 64 images"),
    ]:
        with pytest.raises(ValueError, match=re.escape(told)):
            finetune(wrong, QUIET)
    flags = ["finetune", str(tmp_path), "--data", str(flat), "--recipe", "small"]
    assert main([*flags, "--output", str(output)]) == 2
    assert "expected a checkpoint or a folder of them" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'stopfast[timm]'")):
        finetune(good, QUIET)
    assert not output.exists()
