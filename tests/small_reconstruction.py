"""Small objectives of MAE and Beyond Masking, and the published names of their weights."""

from typing import Any

import torch
from torch import Tensor, nn

from stopfast import Predictor, VisionTransformer
from stopfast.build import patch_target
from stopfast.config import DegradeConfig, Transforms
from stopfast.degradations import degradation
from stopfast.kernels.ops import EAGER, Ops
from stopfast.objectives.reconstruction import Reconstruction
from stopfast.optim import UpdateRule
from tests.golden_files import norm_1e6

SIDE, PATCH, PATCHES, MARGIN = 32, 8, 16, 4
TASKS: dict[str, dict[str, Any]] = {
    "mae": {"mask_ratio": 0.75},
    "zoomed-in": {"kind": "zoomed-in"},
    "zoomed-in masked": {"kind": "zoomed-in", "mask_ratio": 0.75},
    "zoomed-out": {"kind": "zoomed-out"},
    "zoomed-out masked": {"kind": "zoomed-out", "mask_ratio": 0.75},
    "distorted": {"kind": "distorted"},
    "distorted masked": {"kind": "distorted", "mask_ratio": 0.5},
    "blurred": {"kind": "blurred"},
    "blurred masked": {"kind": "blurred", "mask_ratio": 0.5},
    "decolorized": {"kind": "decolorized"},
    "decolorized masked": {"kind": "decolorized", "mask_ratio": 0.5},
}
"""Settings of :func:`build` for every task."""


def build(
    kind: str = "none",
    *,
    mask_ratio: float = 0.0,
    side: int = SIDE,
    patch: int = PATCH,
    margin: int = MARGIN,
    widths: tuple[int, int] = (32, 16),
    depths: tuple[int, int] = (2, 2),
    ops: Ops = EAGER,
    skip_unused: bool = True,
    checkpointing: bool = False,
    noise: dict[str, Any] | None = None,
    update: dict[str, Any] | None = None,
) -> Reconstruction:
    """MAE as it is for kind "none"; the network of Beyond Masking for the others."""
    torch.manual_seed(0)
    mae = kind == "none"
    settings = DegradeConfig(kind=kind, margin=margin)  # type: ignore[arg-type]
    target = patch_target(patch, "patch" if mae else "channel", Transforms().std)
    degraded = degradation(settings, (side, side), target)
    common: dict[str, Any] = {
        "num_heads": 2,
        "norm_layer": norm_1e6,
        "class_token": mae,
        "positions": "2d" if mae else "1d",
        "qkv_bias": True if mae else "qv",
        "init": "xavier" if mae else "truncated",
        "skip_unused": skip_unused,
        "checkpointing": checkpointing,
        "ops": ops,
    }
    encoder = VisionTransformer(
        img_size=[side],
        patch_size=patch,
        in_chans=degraded.channels,
        embed_dim=widths[0],
        depth=depths[0],
        **common,
    )
    decoder = Predictor(
        (side // patch) ** 2,
        widths[0],
        widths[1],
        depth=depths[1],
        out_dim=3 * patch**2,
        embed_bias=mae,
        **common,
        **(noise or {}),
    )
    return Reconstruction(
        encoder,
        decoder,
        degraded,
        mask_ratio=mask_ratio,
        transforms=Transforms(size=degraded.source),
        update=UpdateRule(
            **{"lr": lambda step: 1e-3, "weight_decay": lambda step: 0.05, **(update or {})}
        ),
        seed=3,
        ops=ops,
    )


def stirred(objective: Reconstruction) -> Reconstruction:
    """Every trained weight moved: a bias of zero would hide a lost one."""
    generator = torch.Generator().manual_seed(2)
    for module in objective.modules().values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                ).to(parameter)
    return objective


def batch_of(objective: Reconstruction, count: int = 4) -> Tensor:
    """Images as the objective takes them."""
    size = objective.degradation.source
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


def ours(published: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the published names of Beyond Masking, as those of encoder and decoder."""
    renamed = {
        "encoder_to_decoder.": "decoder.predictor_embed.",
        "mask_token": "decoder.mask_token",
        "decoder.blocks.": "decoder.predictor_blocks.",
        "decoder.norm.": "decoder.predictor_norm.",
        "decoder.head.": "decoder.predictor_proj.",
    }
    found: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, value in published.items():
        if name == "encoder.cls_token":
            continue  # which its network never reads
        for old, new in renamed.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
                break
        module, _, key = name.partition(".")
        found[module][key] = value
    return found


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every trained parameter, by name; each has one."""
    found = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values()), found
    return found  # type: ignore[return-value]
