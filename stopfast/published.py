"""Files of the published I-JEPA and StoP programs."""

import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stopfast.checkpoint import CheckpointError, load_weights
from stopfast.encoder import VisionTransformer
from stopfast.models import heads_of_width, published_norm
from stopfast.pos_embed import Grid, square_grid
from stopfast.predictor import Predictor, Variant

_PREFIXES = ("module.", "_orig_mod.")
_ENTRIES = ("encoder", "predictor", "target_encoder")


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
        CheckpointError: a damaged file, an entry or a weight that is missing, unknown or of another shape,
            or learned positions without ``learned_pos_emb=True``.
        ValueError: a width that is no published size, without ``num_heads``.
    """
    content = _read(path)
    encoder, predictor, target = (strip_prefixes(content[name]) for name in _ENTRIES)
    try:
        common = encoder_settings(encoder, num_heads, grid_size)
        common["class_token"] = False
        settings = {
            **_block_settings(predictor, "predictor_blocks"),
            "num_patches": predictor["predictor_pos_embed"].shape[1],
            "embed_dim": common["embed_dim"],
            "predictor_embed_dim": predictor["predictor_embed.weight"].shape[0],
            "num_heads": common["num_heads"],
            "variant": variant,
            "grid_size": grid_size,
            **predictor_settings,
        }
    except KeyError as error:
        raise CheckpointError(
            f"{path}: its weights do not fit the model; missing: {error.args[0]}"
        ) from None
    model = PublishedModel(
        VisionTransformer(**common),
        Predictor(**settings),
        VisionTransformer(**common).requires_grad_(False),
        content.get("epoch"),
    )
    _check_positions(path, model.predictor, predictor.get("predictor_pos_embed"))
    for module, state, name in zip(
        (model.encoder, model.predictor, model.target_encoder),
        (encoder, predictor, target),
        _ENTRIES,
        strict=True,
    ):
        load_weights(module, state, f"{path}, {name}")
    return model


def read_pickled(path: str | Path) -> Any:  # noqa: ANN401
    """Return what ``torch.save`` wrote, on the CPU; only tensors and plain containers are unpickled.

    The arguments of a command line, which many programs save beside the weights, count as such a container.

    Raises:
        CheckpointError: a damaged file, or one with other objects in it.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: expected a file of tensors and plain containers, got one that is damaged or "
            f"holds other objects: {reason}"
        ) from None


def _read(path: str | Path) -> Mapping[str, Any]:
    content = read_pickled(path)
    entries = content if isinstance(content, Mapping) else {}
    absent = [name for name in _ENTRIES if not isinstance(entries.get(name), Mapping)]
    if absent:
        raise CheckpointError(
            f"{path}: expected state dictionaries {_ENTRIES}, without {absent}; "
            "load_published_objective reads DropPos, MAE and Beyond Masking"
        )
    return entries


def _check_positions(path: str | Path, predictor: Predictor, saved: Tensor | None) -> None:
    """Learned positions that nobody announced would be frozen without a word."""
    fixed = predictor.predictor_pos_embed
    if fixed.requires_grad or saved is None or saved.shape != fixed.shape:
        return
    if not torch.allclose(saved.float(), fixed, atol=1e-4):
        raise CheckpointError(
            f"{path}: its predictor_pos_embed is not the fixed table; say learned_pos_emb=True"
        )


def encoder_settings(
    state: Mapping[str, Tensor], num_heads: int | None, grid_size: Grid | None
) -> dict[str, Any]:
    """Arguments of :class:`VisionTransformer` that an encoder's weights show, with published defaults.

    Args:
        state: weights by the published names, without a prefix.
        num_heads: heads, which weights do not tell; default those of the published size.
        grid_size: (rows, columns) of patches; default a square.

    Raises:
        KeyError: a weight is missing.
        ValueError: a width that is no published size, without ``num_heads``; a number of positions that is
            no square, without ``grid_size``.
    """
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    class_token = "cls_token" in state
    grid = grid_size or square_grid(state["pos_embed"].shape[1] - class_token)
    return {
        **_block_settings(state, "blocks"),
        "img_size": [side * patch_size for side in grid],
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": width,
        "num_heads": heads_of_width(width, num_heads),
        "class_token": class_token,
    }


def hidden_ratio(hidden: int, width: int) -> float:
    """Return a ratio of which ``int(width * ratio)`` is the hidden width, exactly."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _block_settings(state: Mapping[str, Tensor], blocks: str) -> dict[str, Any]:
    """Depth, hidden width and bias, as the blocks' weights show them."""
    attention = f"{blocks}.0.attn"
    return {
        "depth": count_blocks(state, f"{blocks}."),
        "mlp_ratio": hidden_ratio(*state[f"{blocks}.0.mlp.fc1.weight"].shape),
        "qkv_bias": "qv" if f"{attention}.q_bias" in state else f"{attention}.qkv.bias" in state,
        "norm_layer": published_norm,
    }


def count_blocks(state: Mapping[str, Tensor], blocks: str) -> int:
    """Return the depth: one more than the highest number after ``blocks``, as keys begin."""
    numbers = {int(m[1]) for k in state if (m := re.match(rf"{re.escape(blocks)}(\d+)\.", k))}
    return max(numbers, default=-1) + 1


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dictionary without what data parallelism and compilation put before its keys."""

    def strip(key: str) -> str:
        while key.startswith(_PREFIXES):
            key = key.removeprefix(_PREFIXES[0]).removeprefix(_PREFIXES[1])
        return key

    return {strip(key): value for key, value in state.items()}
