"""An encoder from another library's model, weights or file."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stopfast.checkpoint import CheckpointError
from stopfast.encoder import VisionTransformer
from stopfast.export import timm, transformers
from stopfast.export.safetensors import read_tensors, told
from stopfast.export.weights import Imported, Untold, encoder_of
from stopfast.kernels.ops import Ops
from stopfast.pos_embed import Grid
from stopfast.published import read_pickled, strip_prefixes
from stopfast.published_layouts import encoder_from_published, told_layout
from stopfast.trained import Which

_TOLERANCE = 3e-5
"""Relative difference of features in fp32 above which a model computes something else."""


def import_encoder(
    source: str | Path | nn.Module | Mapping[str, Tensor],
    *,
    which: Which = "target_encoder",
    num_heads: int | None = None,
    grid_size: Grid | None = None,
    norm_eps: float | None = None,
    ops: Ops | str = "auto",
) -> VisionTransformer:
    """Make our encoder of weights from elsewhere, all of them or none.

    Sizes are read off the weights, and the position table is kept as it is (it stays fixed in training).
    A copy of a model is also run, and refused if its features are not the encoder's.

    Args:
        source: a vision transformer of timm, Hugging Face (``IJepaModel``, ``ViTModel``) or the published
            programs; a state dictionary of one; a folder of timm's or Hugging Face's layout; a
            safetensors file; a file of ``torch.save``, the published ``.pth`` and ``.pth.tar`` among
            them, with decoders or without.
        which: the encoder of a file that holds both.
        num_heads: heads, where the source does not tell; default those of the published size.
        grid_size: (rows, columns) of patches, where the source does not tell; default a square, of 224
            pixels a side for files of Beyond Masking, which do not hold positions.
        norm_eps: eps of the norms, where the source does not tell; default 1e-6.
        ops: implementation of the operations.

    Returns:
        The encoder, fp32, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: weights that are missing, unknown (layer scale, query-key norms, registers,
            a head, a pooler, ...) or of another shape; a model that computes something else; a damaged
            file or one without weights.
        ValueError: heads or a grid that have to be said, or that the source contradicts.
    """
    given = Untold(num_heads, grid_size, norm_eps)
    if isinstance(source, nn.Module):
        what = type(source).__name__
        imported = _from_module(source, what)
    elif isinstance(source, Mapping):
        what = "the state dictionary"
        imported = _from_state(source, what, grid_size)
    else:
        what = str(source)
        imported = _from_path(Path(source), which, grid_size)
    encoder = encoder_of(Imported(imported.state, imported.untold.completed(given)), what, ops)
    if isinstance(source, nn.Module):
        _compare(source, given, what)
    return encoder


def _from_state(state: Mapping[str, Any], what: str, grid: Grid | None = None) -> Imported:
    others = sorted(str(k) for k, v in state.items() if not isinstance(v, Tensor))
    if others or not state:
        raise CheckpointError(
            f"{what}: expected a state dictionary of tensors, got other entries {others[:8]}; "
            "pass the one that holds the weights"
        )
    tensors = strip_prefixes(state)
    if transformers.is_hub_named(tensors):
        tensors = transformers.from_hub_names(tensors, what)
    layout = told_layout(tensors)
    if layout is not None:
        tensors = encoder_from_published(layout, tensors, grid)
    return Imported({key: value.detach().cpu() for key, value in tensors.items()}, Untold())


def _from_module(module: nn.Module, what: str) -> Imported:
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) in transformers.MODEL_TYPES:
        untold = transformers.told_by_hub_config(what, cast(Any, config).to_dict())
    else:
        untold = timm.told_by_module(module)
    return Imported(_from_state(module.state_dict(), what).state, untold)


def _from_path(path: Path, which: Which, grid: Grid | None) -> Imported:
    if path.is_dir():
        return _from_folder(path)
    with path.open("rb") as file:
        pickled = file.read(2) in (b"PK", b"\x80\x02")  # the archives of torch.save, and older ones
    if not pickled:
        tensors, metadata = read_tensors(path)
        imported = _from_state(tensors, str(path))
        return Imported(imported.state, told(path, metadata) or imported.untold)
    content = read_pickled(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dictionary, got {type(content).__name__}")
    entries = (content.get(name) for name in (which, "model"))
    state = next((entry for entry in entries if isinstance(entry, Mapping)), content)
    return _from_state(state, str(path), grid)


def _from_folder(folder: Path) -> Imported:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"expected a folder with {path.name}, got {folder}")
    config = json.loads(path.read_text())
    if config.get("model_type") in transformers.MODEL_TYPES:
        untold = transformers.told_by_hub_config(str(folder), config)
    elif "architecture" in config:
        untold = timm.told_by_config(folder, config)
    else:
        raise CheckpointError(
            f"{path}: expected a model_type in {transformers.MODEL_TYPES} or an architecture of timm, got "
            f"{config.get('model_type') or sorted(config)[:8]}"
        )
    tensors: dict[str, Tensor] = {}
    for file in transformers.read_folder_tensors(folder):
        tensors |= read_tensors(file)[0]
    return Imported(_from_state(tensors, str(folder)).state, untold)


@torch.no_grad()
def _compare(source: nn.Module, given: Untold, what: str) -> None:
    """Compare features: activations, scales and orders of operations leave no trace in the weights.

    A copy with random weights is compared: as models are initialised, branches are a small addition to
    what they are added to, so that one activation would pass for another.
    """
    model = copy.deepcopy(source).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        inputs = parameter.shape[1:].numel() if parameter.ndim > 1 else 4
        parameter += torch.randn(parameter.shape, generator=generator) * inputs**-0.5
    imported = _from_module(model, what)
    encoder = encoder_of(Imported(imported.state, imported.untold.completed(given)), what, "eager")
    rows, columns = encoder.patch_embed.grid
    patch, channels = encoder.patch_embed.patch_size, encoder.patch_embed.in_chans
    image = torch.randn(1, channels, rows * patch, columns * patch, generator=generator)
    got = getattr(model, "forward_features", model)(image)
    got = getattr(got, "last_hidden_state", got)
    expected = encoder.tokens(image)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise CheckpointError(f"{what}: expected features {tuple(expected.shape)}, got {shape}")
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < _TOLERANCE:
        raise CheckpointError(
            f"{what}: its weights fit, but it computes something else: with random weights and a random "
            f"image its features differ by {error:.1e} (relative); expected at most {_TOLERANCE:.0e}"
        )
