"""Every objective on 32-pixel images with one small encoder, for a CPU.

Only the objectives differ, but that DropPos and MAE have a class token, and DropPos is clipped tensor by
tensor, as published.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from stopfast.config import (
    Config,
    DataConfig,
    DegradeConfig,
    DropPosConfig,
    JepaConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    OptimConfig,
    ReconstructionConfig,
    Transforms,
)
from stopfast.presets.decoders import DEGRADATIONS

_MARGIN = 4
"""Pixels that zooming in or out is about, an eighth of the side, as 32 of 224 nearly are."""


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
        # A narrow projection's noise is small beside the position: at width 96 this is 3.8 % of its squared
        # length at the start, as 0.25 is in a ViT-B.
        noise=NoiseConfig(variant="stop", noise_var=0.7),
        # On an 8x8 grid a target has 9 to 12 patches, so the published floor of 10 is too high.
        objective=JepaConfig(
            mask=MaskConfig(
                min_keep=4, edge_inclusive=True, truncate="random", truncate_over="global"
            )
        ),
        optim=OptimConfig(
            epochs=3, warmup=0.3, start_lr=2e-4, lr=1e-3, final_lr=1e-5, final_weight_decay=0.04
        ),
    )


def demo() -> Config:
    """The cifar10 recipe on the handwritten digits that come with scikit-learn."""
    base = cifar10()
    return replace(
        base,
        preset="demo",
        # A mirrored digit is another digit, or none; and a small crop may show none of its strokes.
        data=replace(
            base.data, digits=True, transforms=Transforms(size=(32, 32), crop_scale=(0.6, 1.0))
        ),
        optim=replace(base.optim, epochs=14, warmup=1.0),
    )


class _Learned(NamedTuple):
    """What is learned, and whether StoP's noise is on its queries."""

    about: str
    objective: ObjectiveConfig
    noisy: bool = False


def _objectives() -> dict[str, _Learned]:
    mask = cifar10().jepa.mask
    found = {
        "ijepa": _Learned("I-JEPA", JepaConfig(mask=mask)),
        "droppos": _Learned("DropPos", DropPosConfig()),
        "mae": _Learned("MAE", ReconstructionConfig()),
        "stop-droppos": _Learned("DropPos with StoP's noise", DropPosConfig(), True),
        "stop-mae": _Learned("MAE with StoP's noise", ReconstructionConfig(), True),
    }
    for kind in DEGRADATIONS:
        degrade = DegradeConfig(kind=kind, margin=_MARGIN, mix_channels=False, gray_channels=3)
        found |= {
            f"beyond-{kind}": _Learned(
                f"Beyond Masking, {kind},",
                ReconstructionConfig(mask_ratio=0.0, target_norm="channel", degrade=degrade),
            ),
            f"stop-{kind}": _Learned(
                f"StoP with a {kind} context", JepaConfig(mask=mask, degrade=degrade), True
            ),
        }
    zoomed = DegradeConfig(kind="zoomed-in", margin=_MARGIN)
    found["beyond-zoomed-in-mask"] = _Learned(
        "Beyond Masking, zoomed-in and masked,",
        ReconstructionConfig(target_norm="channel", degrade=zoomed),
    )
    return found


def _small(
    name: str, learned: _Learned, base: Callable[[], Config], images: str
) -> Callable[[], Config]:
    def build() -> Config:
        config = base()
        objective, noisy = learned.objective, learned.noisy
        tokens = isinstance(objective, DropPosConfig) or name.endswith("mae")
        optim = config.optim
        if isinstance(objective, DropPosConfig):
            optim = replace(optim, clip="per_tensor", clip_norm=5.0)
        return replace(
            config,
            preset=f"{name}-{config.preset}",
            model=replace(config.model, class_token=tokens),
            noise=config.noise if noisy else NoiseConfig(),
            objective=objective,
            optim=optim,
        )

    build.__doc__ = f"{learned.about} on {images}, with the same small encoder."
    return build


SMALL: tuple[Callable[[], Config], ...] = (
    demo,
    cifar10,
    *(
        _small(name, learned, base, images)
        for base, images in ((cifar10, "32-pixel photographs"), (demo, "handwritten digits"))
        for name, learned in _objectives().items()
    ),
)
