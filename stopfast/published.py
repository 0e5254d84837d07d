"""Files of the published I-JEPA and StoP programs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stopfast.checkpoint import CheckpointError, load_weights
from stopfast.encoder import VisionTransformer
from stopfast.models import SHAPES, published_norm
from stopfast.pos_embed import Grid, square_grid
from stopfast.predictor import Predictor, Variant

_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class PublishedModel:
    """The three networks of a published checkpoint."""

    encoder: VisionTransformer
    predictor: Predictor
    target_encoder: VisionTransformer
    epoch: int | None


def load_published(
    path: str | Path,
    *,
    variant: Variant,
    num_heads: int | None = None,
    grid_size: Grid | None = None,
    **predictor_settings: Any,  # noqa: ANN401
) -> PublishedModel:
    """Load a ``.pth.tar`` checkpoint of the published I-JEPA or StoP program.

    Sizes are read off the weights. I-JEPA and StoP files have the same keys and compute different
    things, so the variant has to be said. Only tensors and plain containers are unpickled.

    Args:
        path: file with the entries ``encoder``, ``predictor`` and ``target_encoder``; a ``module.`` or
            ``_orig_mod.`` prefix of their keys is stripped.
        variant: ``"ijepa"``, ``"stop"``, ``"stop_off"``.
        num_heads: heads, which weights do not tell; default those of the published size.
        grid_size: (rows, columns) of patches, for images that are not square.
        predictor_settings: further arguments of :class:`Predictor`, such as ``noise_var``.

    Raises:
        CheckpointError: an entry or a weight that is missing, unknown or of another shape.
        ValueError: a width that is no published size, without ``num_heads``.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    absent = {"encoder", "predictor", "target_encoder"} - content.keys()
    if absent:
        raise CheckpointError(
            f"{path}: expected entries encoder, predictor and target_encoder, without {sorted(absent)}"
        )
    encoder, predictor, target = (
        {_strip(k): v for k, v in content[name].items()}
        for name in ("encoder", "predictor", "target_encoder")
    )
    try:
        settings = _encoder_settings(encoder, num_heads, grid_size)
        networks = VisionTransformer(**settings), VisionTransformer(**settings)
        guess = Predictor(
            num_patches=predictor["predictor_pos_embed"].shape[1],
            embed_dim=settings["embed_dim"],
            predictor_embed_dim=predictor["predictor_embed.weight"].shape[0],
            depth=_depth(predictor, "predictor_blocks"),
            num_heads=settings["num_heads"],
            mlp_ratio=predictor["predictor_blocks.0.mlp.fc1.weight"].shape[0]
            / predictor["predictor_embed.weight"].shape[0],
            norm_layer=published_norm,
            variant=variant,
            grid_size=grid_size,
            **predictor_settings,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{path}: its weights do not fit the model; missing: {error.args[0]}"
        ) from None
    for module, state, name in (
        (networks[0], encoder, "encoder"),
        (guess, predictor, "predictor"),
        (networks[1], target, "target_encoder"),
    ):
        load_weights(module, state, f"{path}, {name}")
    networks[1].requires_grad_(False)
    return PublishedModel(networks[0], guess, networks[1], content.get("epoch"))


def _encoder_settings(
    state: Mapping[str, Tensor], num_heads: int | None, grid_size: Grid | None
) -> dict[str, Any]:
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    heads = num_heads or next((s.num_heads for s in SHAPES.values() if s.embed_dim == width), None)
    if heads is None:
        raise ValueError(f"expected num_heads for a width of {width}, which is no published size")
    grid = grid_size or square_grid(state["pos_embed"].shape[1])
    return {
        "img_size": [side * patch_size for side in grid],
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": _depth(state, "blocks"),
        "num_heads": heads,
        # The hidden width is an exact integer; half a unit keeps the float ratio from losing it.
        "mlp_ratio": (state["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / width,
        "norm_layer": published_norm,
    }


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    numbers = {int(m[1]) for k in state if (m := re.match(rf"{blocks}\.(\d+)\.", k))}
    return max(numbers, default=-1) + 1


def _strip(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.removeprefix(_PREFIXES[0]).removeprefix(_PREFIXES[1])
    return key
