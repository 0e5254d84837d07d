"""DropPos, MAE and Beyond Masking as published, quirks included.

A step is 2,048 images, 4,096 for MAE; rates are those of that many.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from stopfast.config import (
    Config,
    DataConfig,
    Degradation,
    DegradeConfig,
    DropPosConfig,
    ModelConfig,
    OptimConfig,
    ReconstructionConfig,
    StepConfig,
    Transforms,
)
from stopfast.models import SHAPES, Size

BATCH = 2048
DEGRADATIONS: tuple[Degradation, ...] = (
    "zoomed-in",
    "zoomed-out",
    "distorted",
    "blurred",
    "decolorized",
)
_CROPS = Transforms(size=(224, 224), crop_scale=(0.2, 1.0), interpolation="bicubic", flip=0.5)
_LR = 1.5e-4
"""Learning rate of 256 images in all three programs."""


def _optim(epochs: int, warmup: int, batch: int) -> OptimConfig:
    """What the three have in common."""
    return OptimConfig(
        epochs=epochs,
        warmup=warmup,
        start_lr=0.0,
        lr=_LR * batch / 256,
        final_lr=0.0,
        weight_decay=0.05,
        final_weight_decay=0.05,
        betas=(0.9, 0.95),
        schedule="mae",
    )


def _droppos(
    name: str, size: Size, *, warmup: int, micro_batch: int, position_weight: float
) -> Config:
    return Config(
        preset=name,
        data=DataConfig(batch_size=BATCH, threads=8, transforms=_CROPS),
        model=ModelConfig(
            **SHAPES[size]._asdict(),
            class_token=True,
            init="xavier",
            predictor_embed_dim=512,
            predictor_depth=2,
            predictor_num_heads=16,
        ),
        objective=DropPosConfig(
            smoothing_grid="released",
            smoothing_norm="released",
            position_weight=position_weight,
        ),
        optim=replace(_optim(800, warmup, BATCH), clip="per_tensor", clip_norm=5.0),
        step=StepConfig(precision="fp32", accumulate=BATCH // micro_batch),
    )


def droppos_vit_b16() -> Config:
    """DropPos, ViT-B/16, 800 epochs, as released for ImageNet-1k."""
    return _droppos("droppos-vit-b16", "base", warmup=10, micro_batch=64, position_weight=0.05)


def droppos_vit_l16() -> Config:
    """DropPos, ViT-L/16, 800 epochs, as released for ImageNet-1k."""
    return _droppos("droppos-vit-l16", "large", warmup=40, micro_batch=128, position_weight=0.1)


def mae_vit_b16() -> Config:
    """MAE, ViT-B/16, 800 epochs, by the settings in its paper."""
    batch = 4096
    return Config(
        preset="mae-vit-b16",
        data=DataConfig(batch_size=batch, threads=8, transforms=_CROPS),
        model=ModelConfig(
            **SHAPES["base"]._asdict(),
            class_token=True,
            init="xavier",
            predictor_embed_dim=512,
            predictor_depth=8,
            predictor_num_heads=16,
        ),
        objective=ReconstructionConfig(mask_ratio=0.75, target_norm="patch"),
        optim=_optim(800, 40, batch),
        step=StepConfig(precision="bf16", accumulate=batch // 64),
    )


def _beyond(kind: Degradation, mask_ratio: float = 0.0) -> Config:
    return Config(
        preset=f"beyond-{kind}{'-mask' if mask_ratio else ''}",
        data=DataConfig(batch_size=BATCH, threads=8, transforms=_CROPS),
        model=ModelConfig(
            **SHAPES["base"]._asdict(),
            positions="1d",
            qkv_bias="qv",
            init="truncated",
            predictor_embed_dim=384,
            predictor_depth=4,
            predictor_num_heads=6,
            predictor_embed_bias=False,
        ),
        objective=ReconstructionConfig(
            mask_ratio=mask_ratio,
            target_norm="channel",
            degrade=DegradeConfig(kind=kind),
        ),
        optim=replace(_optim(300, 20, BATCH), final_lr=1e-5, decay_tokens=False, schedule="beit"),
        step=StepConfig(precision="fp16", accumulate=BATCH // 128),
    )


def _described(build: Callable[[], Config], text: str) -> Callable[[], Config]:
    build.__doc__ = text
    return build


_NAMED = {"blurred": "blurred (our reconstruction of it)"}
PUBLISHED: tuple[Callable[[], Config], ...] = (
    droppos_vit_b16,
    droppos_vit_l16,
    mae_vit_b16,
    *(
        _described(
            partial(_beyond, kind),
            f"Beyond Masking, {_NAMED.get(kind, kind)}, unmasked as its authors say, ViT-B/16, 300 epochs.",
        )
        for kind in DEGRADATIONS
    ),
    _described(
        partial(_beyond, "zoomed-in", 0.75),
        "Beyond Masking's integrated task: zoomed-in with masks, ViT-B/16, 300 epochs.",
    ),
)
