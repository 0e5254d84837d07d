"""Fine-tuning: published values, and what model, rates and step compute."""

import math
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from stopfast import VisionTransformer
from stopfast.config import Transforms
from stopfast.finetuning import RECIPES, finetune_settings
from stopfast.finetuning.chance import Stream, seed_device, seed_host
from stopfast.finetuning.data import train_transform
from stopfast.finetuning.step import FinetuneStep, decayed_groups, rate_schedule
from stopfast.networks import build_encoder
from tests.small_classifier import (
    CLASSES,
    CPU,
    PLAIN,
    SIZES,
    classifier,
    randomised,
    small_config,
)

pytest.importorskip("timm", reason="timm is not installed")
from timm.data.auto_augment import RandAugment
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


@pytest.fixture(scope="module")
def encoder():
    return randomised(build_encoder(small_config()))


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


@pytest.fixture
def published_transform():
    """As a spawned worker gets it."""
    made = train_transform(Transforms(size=(8, 8)), RECIPES["droppos-b"])
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize(("level", "bits"), [(10, 0), (9, 1), (5, 2)])
def test_posterized_to_few_bits(published_transform, level, bits):
    (augment,) = [t for t in published_transform.transforms if isinstance(t, RandAugment)]
    (op,) = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    op.prob, op.magnitude, op.magnitude_std = 1.0, level, 0.0
    image = Image.effect_noise((8, 6), 60).convert("RGB")
    black = Image.new("RGB", (8, 6))
    assert op(image) == (ImageOps.posterize(image, bits) if bits else black)


def test_no_draw_of_the_published_augmentation_fails(published_transform):
    """About one in 660 draws posterizes to 0 bits."""
    image = Image.effect_noise((8, 8), 60).convert("RGB")
    for sample in range(3000):
        seed_host(0, Stream.IMAGE, 0, sample)
        assert published_transform(image).shape == (3, 8, 8)


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
