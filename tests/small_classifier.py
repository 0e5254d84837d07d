"""A small classifier for 16-pixel images, recipes for it, and photographs to train it on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stopfast.config import ModelConfig, Transforms
from stopfast.data.images import open_images
from stopfast.finetuning import Recipe
from stopfast.finetuning.data import (
    LabelledImages,
    eval_transform,
    train_transform,
)
from stopfast.finetuning.model import build_classifier
from stopfast.networks import seeded
from stopfast.presets import demo

CPU = torch.device("cpu")
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


def classifier(encoder, recipe, classes=CLASSES):
    with seeded(4):
        return build_classifier(encoder, small_config().data.transforms, classes, recipe)


def write_stripes(root: Path) -> Path:
    """24 JPEGs to train on and 12 to test: stripes, each class of a colour and a direction of its own."""
    draws = np.random.default_rng(0)
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


def labelled(photographs, split, recipe, training=True):
    transform = train_transform if training else eval_transform
    images = open_images(photographs / split)
    return LabelledImages(images, transform(small_config().data.transforms, recipe), recipe.seed)
