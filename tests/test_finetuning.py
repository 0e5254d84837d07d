"""Fine-tuning: published values, what each part computes, and whole runs on small images made here."""

import csv
import json
import math
import os
import random
import re
import signal
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from stopfast import VisionTransformer
from stopfast.build import build_objective, build_step
from stopfast.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from stopfast.cli import main
from stopfast.config import ModelConfig, Transforms
from stopfast.data.images import open_images
from stopfast.data.loader import TrainPlan
from stopfast.finetuning import RECIPES, FinetuneSettings, Recipe, finetune, finetune_settings
from stopfast.finetuning.accuracy import measure_accuracy
from stopfast.finetuning.chance import Stream, seed_device
from stopfast.finetuning.data import (
    LabelledImages,
    TrainKeys,
    eval_transform,
    in_order,
    load,
    share_of,
    train_transform,
)
from stopfast.finetuning.model import build_classifier
from stopfast.finetuning.step import FinetuneStep, decayed_groups, rate_schedule
from stopfast.networks import build_encoder, seeded
from stopfast.presets import demo
from stopfast.progress import Stopped
from stopfast.run_state import DataState, save_run

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.data import Mixup, resolve_model_data_config  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402

CPU = torch.device("cpu")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
CLASSES = 3
PLAIN = Recipe(
    epochs=2,
    batch_size=6,
    warmup=0.5,
    blr=0.1,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    rand_augment="",
    erase=0.0,
    crop_scale=(0.7, 1.0),
    center=1.0,
    precision="fp32",
)
RANDOM = replace(
    PLAIN,
    batch_size=8,
    accumulate=2,
    drop_path=0.2,
    mixup=0.8,
    cutmix=1.0,
    rand_augment="rand-m9-mstd0.5-inc1",
    erase=0.5,
    positions="learned",
)


def small_config():
    """An encoder of three blocks for 16-pixel images."""
    model = ModelConfig(
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        predictor_embed_dim=16,
        predictor_depth=1,
    )
    base = demo()
    data = replace(base.data, transforms=Transforms(size=(16, 16)), batch_size=4)
    return replace(base, model=model, data=data)


SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "norm_layer": {"eps": 1e-6}}


def randomised(encoder):
    """The encoder with noise on all that is trained, norms and biases too."""
    with seeded(3):
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return randomised(build_encoder(small_config()))


def classifier(encoder, recipe, classes=CLASSES):
    with seeded(4):
        return build_classifier(encoder, small_config().data.transforms, classes, recipe)


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
    """24 JPEGs to train on and 12 to test: stripes, each class of a colour and a direction of its own."""
    root, draws = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    row, column = np.mgrid[0:20, 0:20]
    for split, count in (("train", 8), ("test", 4)):
        for label, way in enumerate((row, column, row + column)):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                wave = 90 * np.sin(way * 1.2 + draws.uniform(0, 6))
                pixels = 127 + wave[..., None] + draws.normal(0, 10, (20, 20, 3))
                pixels[..., label] += 60
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{number}.jpg", quality=95)
    return root


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


DROPPOS = {
    "epochs": 100,
    "batch_size": 1024,
    "top_lr": 4e-3,
    "min_lr": 1e-6,
    "warmup": 5,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "drop_path": 0.1,
    "positions": "frozen",
    "fc_norm": True,
    "head_std": 2e-5,
    "init_values": None,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erase": 0.25,
    "center": 224 / 256,
    "share": 1.0,
    "precision": "fp16",
}
ONE_PERCENT = {
    "epochs": 50,
    "batch_size": 512,
    "top_lr": 3e-5,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "mixup": 0.0,
    "cutmix": 0.0,
    "erase": 0.0,
    "drop_path": 0.0,
    "share": 0.01,
}
PUBLISHED = {
    "droppos-b": DROPPOS,
    "droppos-l": DROPPOS | {"epochs": 50},
    "beyond": DROPPOS | {"color_jitter": 0.4, "schedule": "beit"},
    "ijepa-1-percent": ONE_PERCENT,
    "ijepa-1-percent-h": ONE_PERCENT | {"weight_decay": 0.4},
    "ijepa-100-percent": {
        "epochs": 50,
        "batch_size": 528,
        "top_lr": 1e-4 * 528 / 256,
        "layer_decay": 0.75,
        "weight_decay": 0.04,
        "drop_path": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name):
    recipe = RECIPES[name]
    assert {key: getattr(recipe, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_flags_begin_from_the_recipe():
    asked = finetune_settings(
        ["run", "--data", "d", "--recipe=beyond", "--mixup", "0", "--lr", "1"]
    )
    assert asked.recipe == replace(RECIPES["beyond"], mixup=0.0, lr=1.0)
    assert (asked.checkpoint, asked.data, asked.name) == (Path("run"), Path("d"), "beyond")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 0}, "epochs > 0"),
        ({"batch_size": 9, "accumulate": 2}, "accumulate=2 divides"),
        ({"batch_size": 3, "cutmix": 1.0}, "even micro-batch"),
        ({"warmup": 2.0}, "warmup in 0..epochs"),
        ({"lr": 1e-7}, "min_lr=1e-06"),
        ({"layer_decay": 0.0}, "layer_decay in"),
        ({"label_smoothing": 1.0}, "label_smoothing in"),
        ({"erase": 1.5}, "erase in"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"crop_scale": (0.5, 0.4)}, "crop_scale"),
        ({"rand_augment": "m9"}, "rand_augment"),
    ],
)
def test_recipes_that_cannot_work_are_refused(change, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        replace(PLAIN, **change)


@pytest.mark.parametrize("arguments", [[], ["--recipe"], ["--recipe", "smal"]])
def test_a_recipe_must_be_named(arguments):
    with pytest.raises(ValueError, match="expected --recipe with one of droppos-b"):
        finetune_settings(["run", "--data", "d", *arguments])


def scale_by_hand(name):
    """Of stem, three blocks (the last with the norm before the average), head, each half of the next."""
    part, _, rest = name.partition(".")
    layer = (
        int(rest[0]) + 1 if part == "blocks" else {"norm": 3, "head": 4, "fc_norm": 4}.get(part, 0)
    )
    return 0.5 ** (4 - layer)


@pytest.mark.parametrize("fc_norm", [True, False])
def test_layer_decay_by_hand(encoder, fc_norm):
    recipe = replace(PLAIN, layer_decay=0.5, fc_norm=fc_norm, positions="learned")
    model = classifier(encoder, recipe)
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in decayed_groups(model, recipe)
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        decay = 0.05 if parameter.ndim > 1 and name != "pos_embed" else 0.0
        assert found.pop(id(parameter)) == (scale_by_hand(name), decay), name
    assert not found


@pytest.mark.parametrize("schedule", ["mae", "beit"])
def test_rates_of_a_run(schedule):
    recipe = replace(PLAIN, epochs=10, warmup=2.0, lr=0.3, min_lr=0.1, schedule=schedule)
    rate = rate_schedule(recipe, 5)

    def published(done):
        epoch = done / 5
        if epoch < 2:
            return 0.3 * (epoch / 2 if schedule == "mae" else done / 9)
        return 0.1 + 0.2 * 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))

    assert [rate(1 + done) for done in range(50)] == pytest.approx(
        [published(done) for done in range(50)]
    )


def pooled(model, images):
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("fc_norm", [True, False])
@pytest.mark.parametrize("kind", ["published", "class token", "gray", "gray, for photographs"])
def test_classifier_computes_what_the_encoder_computes(encoder, kind, fc_norm):
    """A class token is no part of the average; of one channel means of the mean of three."""
    if kind != "published":
        other = {"class_token": True}
        if kind != "class token":
            other = {"in_chans": 1, "positions": "1d", "qkv_bias": "qv"}
        encoder = randomised(VisionTransformer([16], 4, **SIZES, **other))
    recipe = replace(PLAIN, fc_norm=fc_norm)
    model = classifier(encoder, recipe).eval()
    images, copy = torch.randn(4, 3, 16, 16), deepcopy(encoder)
    if fc_norm:
        copy.norm = torch.nn.Identity()
    with torch.no_grad():
        got = model.forward_head(model.forward_features(images), pre_logits=True)
        expected = copy(images.mean(1, keepdim=True) if kind == "gray" else images).mean(1)
    if fc_norm:
        expected = F.layer_norm(expected, (32,), eps=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert 0 < model.head.weight.std() < 3e-5 and not model.head.bias.any()


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="encoder of 1 or 3 channels, got 4"):
        classifier(VisionTransformer([16], 4, in_chans=4, **SIZES), PLAIN)


def test_parts_that_are_asked_for(encoder):
    model = classifier(encoder, replace(PLAIN, drop_path=0.3, init_values=0.1))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    assert all((block.ls1.gamma == 0.1).all() for block in model.blocks)
    assert not hasattr(classifier(encoder, PLAIN).blocks[0].ls1, "gamma")


def stepper(encoder, recipe):
    """A step whose head's weights are large enough for gradients to reach the rest."""
    model = classifier(encoder, replace(recipe, head_std=0.1))
    return FinetuneStep(model, recipe, steps_per_epoch=4, classes=CLASSES, device=CPU)


def batch(count=8):
    return torch.randn(count, 3, 16, 16), torch.arange(count) % CLASSES


@pytest.mark.parametrize("positions", ["frozen", "learned"])
def test_first_update_by_hand(encoder, positions):
    """AdamW's first update, without decay, moves every weight by its rate, whatever the gradient's size."""
    recipe = replace(
        PLAIN, lr=1e-3, warmup=0.0, layer_decay=0.5, weight_decay=0.0, positions=positions
    )
    step, (images, labels) = stepper(encoder, recipe), batch()
    before = {name: weights.clone() for name, weights in step.model.state_dict().items()}
    expected = LabelSmoothingCrossEntropy(0.1)(step.model(images), labels).item()
    step.model.eval()
    loss, rate = step([(images, labels)], 1)
    assert step.model.training
    assert (loss.item(), rate) == (pytest.approx(expected, rel=1e-5), 1e-3)
    for name, weights in step.model.state_dict().items():
        moved = (weights - before[name]).abs().max().item()
        frozen = name == "pos_embed" and positions == "frozen"
        by_hand = 0 if frozen else 1e-3 * scale_by_hand(name)
        assert moved == pytest.approx(by_hand, rel=1e-2), name


def test_mixed_images_and_labels(encoder):
    recipe = replace(PLAIN, mixup=0.8, cutmix=1.0)
    step, (images, labels) = stepper(encoder, recipe), batch()
    seed_device(CPU, recipe.seed, Stream.STEP, 3, 0)
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    mixed, soft = mix(images.clone(), labels)
    assert not torch.equal(mixed, images)
    expected = SoftTargetCrossEntropy()(step.model(mixed), soft).item()
    assert step([(images, labels)], 3)[0].item() == pytest.approx(expected, rel=1e-5)


def test_micro_batches_make_the_whole_batch(encoder):
    """Without what is drawn for each; SGD-like gradients are compared, before AdamW's division."""
    (images, labels), gradients = batch(), []
    for parts in ([(images, labels)], list(zip(images.split(2), labels.split(2), strict=True))):
        step = stepper(encoder, PLAIN)
        step(parts, 1)
        gradients.append([p.grad for p in step.model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def labelled(photographs, split, recipe, training=True):
    transform = train_transform if training else eval_transform
    images = open_images(photographs / split)
    return LabelledImages(images, transform(small_config().data.transforms, recipe), recipe.seed)


def test_an_image_is_a_function_of_its_epoch_and_number(photographs):
    images = labelled(photographs, "train", RANDOM)
    first, label = images[2, 7]
    random.random(), np.random.rand(), torch.rand(1)
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
