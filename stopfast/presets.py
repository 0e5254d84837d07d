"""Presets: functions that return settings, by the names of the command line."""

from collections.abc import Callable
from dataclasses import replace

from stopfast.config import (
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    Transforms,
)


def cifar10() -> Config:
    """StoP with corrected masks on 32-pixel photographs, small enough for a CPU."""
    return Config(
        preset="cifar10",
        data=DataConfig(transforms=Transforms(size=(32, 32), flip=0.5)),
        model=ModelConfig(
            patch_size=4,
            embed_dim=96,
            depth=4,
            num_heads=4,
            predictor_embed_dim=96,
            predictor_depth=2,
        ),
        noise=NoiseConfig(variant="stop"),
        # On an 8x8 grid a target has 9 to 12 patches, so the published floor of 10 is too high.
        mask=MaskConfig(min_keep=4, edge_inclusive=True, truncate="random", truncate_over="global"),
        optim=OptimConfig(
            epochs=3, warmup=0.3, start_lr=2e-4, lr=1e-3, final_lr=1e-5, final_weight_decay=0.04
        ),
    )


def demo() -> Config:
    """The ``cifar10`` recipe on the handwritten digits that come with scikit-learn."""
    base = cifar10()
    return replace(
        base,
        preset="demo",
        # A mirrored digit is another digit, or none; and a small crop may show none of its strokes.
        data=replace(base.data, transforms=Transforms(size=(32, 32), crop_scale=(0.6, 1.0))),
        optim=replace(base.optim, epochs=10, warmup=1.0),
    )


PRESETS: dict[str, Callable[[], Config]] = {"demo": demo, "cifar10": cifar10}
