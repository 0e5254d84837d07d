"""Checkpoints: folders of safetensors and JSON under a SHA-256 manifest, and the published files."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stopfast.encoder import VisionTransformer
from stopfast.models import SHAPES, published_norm
from stopfast.pos_embed import Grid, square_grid
from stopfast.predictor import Predictor, Variant

MANIFEST = "manifest.json"
_PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, altered, or of another model; says which part."""


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json`` files and a manifest of their SHA-256 sums.

    All is written and flushed under a temporary name and then renamed, so ``folder`` exists only
    whole, whenever the process or the machine stops.

    Raises:
        ValueError: ``folder`` exists.
    """
    if folder.exists():
        raise ValueError(f"expected a new folder for the checkpoint, got {folder}, which exists")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what an earlier, killed save left
    unfinished.mkdir(parents=True)
    for name, state in tensors.items():
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in state.items()},
            unfinished / f"{name}.safetensors",
        )
    for name, document in documents.items():
        (unfinished / f"{name}.json").write_text(json.dumps(document, indent=2, sort_keys=True))
    manifest = {
        p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size}
        for p in sorted(unfinished.iterdir())
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (*unfinished.iterdir(), unfinished):
        _flush(path)
    os.replace(unfinished, folder)
    _flush(folder.parent)


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors and documents of a checkpoint, after checking every file against its sum.

    Raises:
        CheckpointError: no manifest, or a file that is missing, has another sum, or is not listed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint folder with {MANIFEST}, got {folder}")
    try:
        manifest = json.loads(path.read_text())
        listed = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    found = {p.name for p in folder.iterdir()} - {MANIFEST}
    if found != set(listed):
        raise CheckpointError(
            f"{folder}: expected the files {sorted(listed)} that its manifest lists, got {sorted(found)}"
        )
    for name, expected in listed.items():
        if (_sha256(folder / name), (folder / name).stat().st_size) != expected:
            raise CheckpointError(
                f"{folder / name}: its content is not what was saved (SHA-256 differs)"
            )
    tensors, documents = {}, {}
    for name in listed:
        stem, suffix = os.path.splitext(name)
        if suffix == ".safetensors":
            tensors[stem] = load_file(folder / name)
        else:
            documents[stem] = json.loads((folder / name).read_text())
    return tensors, documents


def newest_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the one of the highest step inside it.

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST).is_file():
        return path
    inside = sorted(path.glob("step-*")) if path.is_dir() else []
    complete = [p for p in inside if (p / MANIFEST).is_file()]
    if not complete:
        raise CheckpointError(f"expected a checkpoint or a folder of them, got {path}")
    return max(complete, key=lambda p: int(p.name.removeprefix("step-")))


def flatten_state(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:  # noqa: ANN401
    """Split a nested state into its tensors, by path, and the JSON that is left of it."""
    if isinstance(state, Tensor):
        return {prefix: state}, {"__tensor__": prefix}
    tensors: dict[str, Tensor] = {}
    if isinstance(state, Mapping):
        entries = []
        for key, value in state.items():
            inner, rest = flatten_state(value, f"{prefix}/{key}".lstrip("/"))
            tensors |= inner
            entries.append(
                [key, rest]
            )  # pairs, since JSON would turn the optimiser's int keys to text
        return tensors, {"__dict__": entries}
    if isinstance(state, list | tuple):
        items = []
        for number, value in enumerate(state):
            inner, rest = flatten_state(value, f"{prefix}/{number}".lstrip("/"))
            tensors |= inner
            items.append(rest)
        return tensors, items
    return {}, state


def unflatten_state(tensors: Mapping[str, Tensor], rest: Any) -> Any:  # noqa: ANN401
    """Undo :func:`flatten_state`; tuples come back as lists."""
    if isinstance(rest, dict) and "__tensor__" in rest:
        return tensors[rest["__tensor__"]]
    if isinstance(rest, dict):
        return {key: unflatten_state(tensors, value) for key, value in rest["__dict__"]}
    if isinstance(rest, list):
        return [unflatten_state(tensors, value) for value in rest]
    return rest


def load_weights(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state_dict strictly.

    Raises:
        CheckpointError: keys that are missing or unknown, or shapes that differ; names each of them.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            for k in sorted(own.keys() & state.keys())
            if own[k].shape != state[k].shape
        ],
    }
    told = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if told:
        raise CheckpointError(f"{what}: its weights do not fit the model; " + "; ".join(told))
    module.load_state_dict(dict(state))


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
