"""DropPos small enough for the interpreter: 16 patches, of which 8 are visible and 6 asked for."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stopfast.config import DropPosConfig, NoiseConfig, Transforms
from stopfast.decoder import PositionDecoder
from stopfast.encoder import VisionTransformer
from stopfast.kernels.ops import EAGER, Ops
from stopfast.objectives.droppos import DropPos
from stopfast.optim import UpdateRule
from stopfast.predictor import Predictor
from tests.golden_files import norm_1e6

WIDTH = 48


def build(
    *,
    side: int = 32,
    ops: Ops = EAGER,
    noise: NoiseConfig = NoiseConfig(),  # noqa: B008
    checkpointing: bool = False,
    skip_unused: bool = True,
    update: dict[str, Any] | None = None,
    seed: int = 0,
    steps_per_epoch: int = 10,
    epochs: int = 800,
    **settings: Any,
) -> DropPos:
    """The objective of these settings, as the golden files have it: half of the patches are visible.

    A side of 112 pixels is the published 14 x 14 patches.
    """
    torch.manual_seed(0)
    config = DropPosConfig(**{"mask_ratio": 0.5, **settings})
    common: dict[str, Any] = {"norm_layer": norm_1e6, "ops": ops, "checkpointing": checkpointing}
    patches = (side // 8) ** 2
    encoder = VisionTransformer(
        img_size=[side], patch_size=8, embed_dim=WIDTH, depth=2, num_heads=4, class_token=True,
        init="xavier", skip_unused=skip_unused, **common,
    )  # fmt: skip
    decoder = PositionDecoder(
        patches, WIDTH, 32, 2, 4, learned_token=config.position_token == "param", **common
    )
    pixel_decoder = None
    if config.multi_task:
        pixel_decoder = Predictor(
            patches, WIDTH, 32, 2, 4, out_dim=192, class_token=True, init="xavier",
            variant=noise.variant, skip_unused=skip_unused, **common,
        )  # fmt: skip
    rates: dict[str, Any] = {"lr": lambda step: 1e-3, "weight_decay": lambda step: 0.05}
    return DropPos(
        encoder,
        decoder,
        pixel_decoder,
        settings=config,
        noise=noise,
        transforms=Transforms(size=(side, side)),
        update=UpdateRule(**{**rates, "betas": (0.9, 0.95), **(update or {})}),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        ops=ops,
    )


def images(batch: int = 4, side: int = 32) -> Tensor:
    """Noise, so that no two patches look alike."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(5))


def parameters(objective: DropPos) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in objective.modules().items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def with_logits(objective: DropPos, logits: Tensor) -> AbstractContextManager[object]:
    """The objective with these logits, whatever its decoder says."""
    return mock.patch.object(objective.decoder, "forward", lambda x, noise: logits)
