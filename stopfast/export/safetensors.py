"""One safetensors file by the published names, which says what it is in its metadata."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stopfast import __version__
from stopfast.checkpoint import CheckpointError, save_tensors
from stopfast.config import Config, RunConfig, to_document
from stopfast.encoder import VisionTransformer
from stopfast.export.weights import Imported, Untold, cpu_weights, encoder_of, untold_of
from stopfast.kernels.ops import Ops
from stopfast.trained import TrainedRun, Which

_ENCODER = "stopfast.encoder"


def run_metadata(run: TrainedRun, which: Which) -> dict[str, str]:
    """Return what a safetensors header says of an export: which encoder of which run."""
    return {
        "format": "pt",  # transformers refuses a file without
        "stopfast.version": __version__,
        "stopfast.which": which,
        "stopfast.step": str(run.step),
        "stopfast.config": json.dumps(told_settings(run.config), sort_keys=True),
    }


def told_settings(config: Config) -> dict[str, Any]:
    """Return settings as a file for others holds them: without places on the machine of the run."""
    told = replace(
        config,
        data=replace(config.data, root=None),
        monitor=replace(config.monitor, labelled=None),
        run=RunConfig(seed=config.run.seed),
    )
    return to_document(told)


def write_safetensors(run: TrainedRun, which: Which, path: Path) -> None:
    """Write the chosen encoder as one file."""
    encoder = run.chosen(which)
    metadata = {**run_metadata(run, which), _ENCODER: json.dumps(untold_of(encoder)._asdict())}
    save_tensors(cpu_weights(encoder), path, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: a damaged file, or one of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got {error}") from None


def told(path: Path, metadata: Mapping[str, str]) -> Untold | None:
    """Return what the metadata of our files say of the encoder, None for files of others.

    Raises:
        CheckpointError: metadata that cannot be read.
    """
    if _ENCODER not in metadata:
        return None
    try:
        facts = json.loads(metadata[_ENCODER])
        rows, columns = facts["grid"]
        return Untold(int(facts["num_heads"]), (int(rows), int(columns)), float(facts["norm_eps"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its metadata {_ENCODER!r} cannot be read: {error}"
        ) from None


def load_encoder(path: str | Path, *, ops: Ops | str = "auto") -> VisionTransformer:
    """Load an encoder that :func:`export_run` wrote with ``format="safetensors"``; nothing else is needed.

    Args:
        path: the file.
        ops: implementation of the operations.

    Returns:
        The encoder, fp32, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: a damaged file, one of another kind, or weights that do not fit.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    untold = told(path, metadata)
    if untold is None:
        raise CheckpointError(
            f"{path}: expected the metadata {_ENCODER!r} of a file that stopfast exported, got "
            f"{sorted(metadata)}; import_encoder reads other files"
        )
    return encoder_of(Imported(tensors, untold), str(path), ops)
