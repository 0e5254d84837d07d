"""Fine-tuning recipes by the names of the command line, and the flags that begin from one."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import tyro

from stopfast.finetuning.settings import FinetuneSettings, Recipe, RecipeName

# Micro-batches are ours: what one GPU of 80 GB should hold. The published runs had 32 images a GPU.

# DropPos, ViT-B/16: 100 epochs, mixed precision, positions kept as they are.
_DROPPOS = Recipe(accumulate=8, precision="fp16")
# I-JEPA, 1 % of the labels, ViT-L/16: RandAugment and smoothing, nothing that mixes, erases or drops. The
# learning rate is stated without a batch that it belongs to, so it is not scaled. Not stated: warm-up, last
# learning rate, and what comes after the average over patches.
_ONE_PERCENT = Recipe(
    epochs=50,
    batch_size=512,
    accumulate=4,
    lr=3e-5,
    mixup=0.0,
    cutmix=0.0,
    erase=0.0,
    drop_path=0.0,
    fc_norm=False,
    share=0.01,
)

RECIPES: dict[RecipeName, Recipe] = {
    "droppos-b": _DROPPOS,
    "droppos-l": replace(_DROPPOS, epochs=50),
    # Beyond Masking, by BEiT's program: a head of deviation 0.02 times 0.001; colour jitter is given, and
    # unused beside RandAugment. Epochs and batch of the reported figures are not published: DropPos's
    # stand in for them.
    "beyond": replace(_DROPPOS, color_jitter=0.4, schedule="beit"),
    "ijepa-1-percent": _ONE_PERCENT,
    "ijepa-1-percent-h": replace(_ONE_PERCENT, accumulate=8, weight_decay=0.4),
    # I-JEPA, all labels, ViT-H/16 at 448 pixels; images so large are evaluated uncropped.
    "ijepa-100-percent": Recipe(
        epochs=50,
        batch_size=528,
        accumulate=33,
        blr=1e-4,
        weight_decay=0.04,
        drop_path=0.25,
        fc_norm=False,
        center=1.0,
    ),
    # Ours, for images of some 32 pixels and encoders that a CPU can train.
    "small": Recipe(
        epochs=5,
        batch_size=128,
        blr=2e-3,
        min_lr=1e-5,
        warmup=0.5,
        positions="learned",
        drop_path=0.0,
        fc_norm=False,
        mixup=0.0,
        cutmix=0.0,
        rand_augment="",
        erase=0.0,
        crop_scale=(0.6, 1.0),
        center=1.0,
        precision="fp32",
    ),
}


def finetune_settings(arguments: Sequence[str]) -> FinetuneSettings:
    """Parse the flags of ``stopfast finetune``: ``--recipe`` is what all others begin from.

    Raises:
        ValueError: no recipe of that name, or values that a recipe refuses.
        SystemExit: help was asked for, or flags that are none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", nargs="?")
    name = parser.parse_known_args(arguments)[0].recipe
    names = get_args(RecipeName)
    if name is None and {"-h", "--help"} & set(arguments):
        name = names[0]
    if name not in names:
        raise ValueError(f"expected --recipe with one of {', '.join(names)}, got {name!r}")
    missing, known = cast(Any, tyro.MISSING), cast(RecipeName, name)
    begin = FinetuneSettings(checkpoint=missing, data=missing, name=known, recipe=RECIPES[known])
    return tyro.cli(
        FinetuneSettings, default=begin, prog=f"stopfast finetune --recipe {name}", args=arguments
    )
