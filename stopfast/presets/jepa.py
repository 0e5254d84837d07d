"""I-JEPA and StoP as published, quirks included.

A step is 2,048 images in micro-batches of what one GPU of the published runs had, since contexts are cut
to the shortest of such a part. I-JEPA's ViT-B/16 and ViT-L/16 were published without their
configurations, so only epochs, warm-up and predictor are the paper's. The published StoP recomputes every
block's activations: that saves memory and changes no number, so it is left to ``step.checkpointing``.
"""

from collections.abc import Callable
from typing import Literal

from stopfast.config import (
    Config,
    DataConfig,
    JepaConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    StepConfig,
    Transforms,
)
from stopfast.models import SHAPES, Size

BATCH = 2048
"""Images of one optimiser step in every published run."""


def sized(size: Size, patch_size: int, predictor_depth: int) -> ModelConfig:
    """Return an encoder of a published size and a predictor of width 384."""
    return ModelConfig(
        patch_size=patch_size,
        **SHAPES[size]._asdict(),
        predictor_embed_dim=384,
        predictor_depth=predictor_depth,
    )


def _optim(
    epochs: int,
    warmup: int,
    *,
    lr: float = 1e-3,
    final_lr: float = 1e-6,
    fixed_from: float = -1.0,
) -> OptimConfig:
    """The published optimisation; ``fixed_from`` is the epoch from which its schedules stand still."""
    return OptimConfig(
        epochs=epochs,
        warmup=warmup,
        start_lr=2e-4,
        lr=lr,
        final_lr=final_lr,
        weight_decay=0.04,
        final_weight_decay=0.4,
        ema=(0.996, 1.0),
        fix_lr_thres=fixed_from,
        fix_wd_thres=fixed_from,
    )


def _recipe(
    name: str,
    transforms: Transforms,
    model: ModelConfig,
    noise: NoiseConfig,
    optim: OptimConfig,
    *,
    precision: Literal["fp32", "bf16"],
    micro_batch: int,
) -> Config:
    """What the two families share."""
    return Config(
        preset=name,
        data=DataConfig(batch_size=BATCH, threads=8, transforms=transforms),
        model=model,
        noise=noise,
        objective=JepaConfig(
            mask=MaskConfig(
                enc_mask_scale=(0.85, 1.0),
                pred_mask_scale=(0.15, 0.2),
                aspect_ratio=(0.75, 1.5),
                nenc=1,
                npred=4,
                min_keep=10,
            )
        ),
        optim=optim,
        step=StepConfig(precision=precision, accumulate=BATCH // micro_batch),
    )


def _ijepa(
    name: str, model: ModelConfig, optim: OptimConfig, *, side: int = 224, micro_batch: int = 128
) -> Config:
    return _recipe(
        name,
        Transforms(size=(side, side), crop_scale=(0.3, 1.0)),
        model,
        NoiseConfig(variant="ijepa"),
        optim,
        precision="bf16",
        micro_batch=micro_batch,
    )


def _stop(
    name: str,
    model: ModelConfig,
    optim: OptimConfig,
    *,
    precision: Literal["fp32", "bf16"] = "bf16",
    noise_var: float = 0.25,
) -> Config:
    return _recipe(
        name,
        Transforms(
            size=(224, 224),
            crop_scale=(0.3, 1.0),
            flip=0.5,
            gray=0.2,
            blur=0.5,
            blur_radius=(0.1, 2.0),
        ),
        model,
        NoiseConfig(variant="stop", noise_var=noise_var),
        optim,
        precision=precision,
        micro_batch=64,
    )


def ijepa_vit_b16() -> Config:
    """I-JEPA, ViT-B/16, 600 epochs, warm-up and predictor of the paper, else as ijepa-vit-h14."""
    return _ijepa("ijepa-vit-b16", sized("base", 16, 6), _optim(600, 15))


def ijepa_vit_l16() -> Config:
    """I-JEPA, ViT-L/16, 600 epochs, warm-up and predictor of the paper, else as ijepa-vit-h14."""
    return _ijepa("ijepa-vit-l16", sized("large", 16, 12), _optim(600, 15))


def ijepa_vit_h14() -> Config:
    """I-JEPA, ViT-H/14, 300 epochs, as released for ImageNet-1k."""
    return _ijepa("ijepa-vit-h14", sized("huge", 14, 12), _optim(300, 40))


def ijepa_vit_h16_448() -> Config:
    """I-JEPA, ViT-H/16 at 448 pixels, 300 epochs, as released for ImageNet-1k."""
    return _ijepa(
        "ijepa-vit-h16-448", sized("huge", 16, 12), _optim(300, 40), side=448, micro_batch=16
    )


def ijepa_vit_g16() -> Config:
    """I-JEPA, ViT-g/16, 44 epochs, as released for ImageNet-22k."""
    return _ijepa("ijepa-vit-g16", sized("giant", 16, 16), _optim(44, 3), micro_batch=16)


def stop_vit_b16() -> Config:
    """StoP, ViT-B/16, 600 epochs, as released for ImageNet-1k."""
    return _stop("stop-vit-b16", sized("base", 16, 6), _optim(600, 15, lr=8e-4, final_lr=1e-4))


def stop_vit_l16() -> Config:
    """StoP, ViT-L/16, 600 epochs, in fp32, as released for ImageNet-1k."""
    optim = _optim(600, 15, lr=8e-4, final_lr=1e-4)
    return _stop("stop-vit-l16", sized("large", 16, 12), optim, precision="fp32")


def stop_vit_h16() -> Config:
    """StoP, ViT-H/16, 300 epochs, rates fixed from epoch 250, as released for ImageNet-1k."""
    optim = _optim(300, 40, fixed_from=250)
    return _stop("stop-vit-h16", sized("huge", 16, 12), optim, noise_var=0.2)


PUBLISHED: tuple[Callable[[], Config], ...] = (
    ijepa_vit_b16,
    ijepa_vit_l16,
    ijepa_vit_h14,
    ijepa_vit_h16_448,
    ijepa_vit_g16,
    stop_vit_b16,
    stop_vit_l16,
    stop_vit_h16,
)
