"""timm's layout: a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

The weights need no new names. ``config.json`` states every argument, since timm's own defaults for a name
are those of another model (``vit_base_patch16_gap_224`` has 16 heads).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stopfast.checkpoint import CheckpointError, save_tensors
from stopfast.config import Transforms
from stopfast.encoder import VisionTransformer
from stopfast.export.safetensors import run_metadata
from stopfast.export.weights import (
    PUBLISHED_EPS,
    Untold,
    channels_of,
    common_weights,
    has_bias,
    mlp_ratio,
    untold_of,
)
from stopfast.trained import TrainedRun, Which

# By width, patch and the height of the image: the names under which timm has these models.
_NAMES = {
    (192, 16, 224): "vit_tiny_patch16_224",
    (384, 16, 224): "vit_small_patch16_224",
    (768, 16, 224): "vit_base_patch16_224",
    (1024, 16, 224): "vit_large_patch16_224",
    (1280, 14, 224): "vit_huge_patch14_gap_224",
    (1280, 16, 448): "vit_huge_patch16_gap_448",
    (1408, 16, 224): "vit_giant_patch16_gap_224",
}
_GENERIC = "vit_base_patch16_224"
_OTHER_MODULES = ("act_layer", "norm_layer", "attn_layer", "mlp_layer", "block_fn", "embed_layer")


def write_timm(run: TrainedRun, which: Which, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Raises:
        ValueError: norms of an eps that timm's vision transformers do not have.
    """
    encoder = run.chosen(which)
    config = timm_config(encoder, run.config.data.transforms)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tensors(common_weights(encoder), folder / "model.safetensors", run_metadata(run, which))


def timm_config(encoder: VisionTransformer, transforms: Transforms) -> dict[str, Any]:
    """Return the ``config.json`` of timm's layout on the hub, for :func:`common_weights`.

    Raises:
        ValueError: norms of an eps that timm's vision transformers do not have.
    """
    heads, grid, eps = untold_of(encoder)
    if eps != PUBLISHED_EPS:
        raise ValueError(f"expected norms of eps {PUBLISHED_EPS}, which timm has, got {eps}")
    assert grid is not None
    patch = encoder.patch_embed.patch_size
    height, width = (side * patch for side in grid)
    class_token = encoder.cls_token is not None
    channels = channels_of(encoder)
    name = _NAMES.get((encoder.embed_dim, patch, height), _GENERIC)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": transforms.center,
            "crop_mode": "center",
            "mean": list(transforms.mean),
            "std": list(transforms.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "model_args": {
            "img_size": [height, width],
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": encoder.embed_dim,
            "depth": len(encoder.blocks),
            "num_heads": heads,
            "mlp_ratio": mlp_ratio(encoder),
            "qkv_bias": has_bias(encoder),
            "class_token": class_token,
            "no_embed_class": not class_token,  # its position is the table's first row
            "global_pool": "avg",
            # The norm comes before the average, as in the published evaluation.
            "fc_norm": False,
        },
    }


def told_by_config(path: Path, config: Mapping[str, Any]) -> Untold:
    """Return what a folder of timm's layout says beyond its weights.

    Raises:
        CheckpointError: modules of other kinds, which the weights would not show.
    """
    arguments = config.get("model_args", {})
    others = sorted(set(_OTHER_MODULES) & arguments.keys())
    if others:
        raise CheckpointError(
            f"{path}: expected timm's default modules, got other {', '.join(others)}; "
            "pass the model itself, which can be compared"
        )
    patch, size = arguments.get("patch_size"), arguments.get("img_size")
    grid = None
    if isinstance(patch, int) and size is not None:
        height, width = [size, size] if isinstance(size, int) else size
        grid = (height // patch, width // patch)
    return Untold(arguments.get("num_heads"), grid, PUBLISHED_EPS)


def told_by_module(module: nn.Module) -> Untold:
    """Return what a model says beyond its weights, if its parts go by timm's or the published names."""
    block = next(iter(getattr(module, "blocks", [])), None)
    embed = getattr(module, "patch_embed", None)
    grid = getattr(embed, "grid_size", None) or getattr(embed, "grid", None)
    return Untold(
        getattr(getattr(block, "attn", None), "num_heads", None),
        None if grid is None else (int(grid[0]), int(grid[1])),
        getattr(getattr(module, "norm", None), "eps", None),
    )
