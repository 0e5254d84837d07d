"""Checkpoints: folders of safetensors and JSON files under a SHA-256 manifest."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"


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
        save_tensors(state, unfinished / f"{name}.safetensors")
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


def save_tensors(
    state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors of any device to a new file, with the permissions of any new file."""
    path.touch()
    mode = path.stat().st_mode
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path, metadata)
    path.chmod(mode)  # safetensors leaves a file that only its owner can read


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


def step_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints ``folder/step-<number>``, oldest first."""
    numbered = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in folder.glob("step-*")]
    whole = [(int(m[1]), p) for m, p in numbered if m and (p / MANIFEST).is_file()]
    return [path for _, path in sorted(whole)]


def newest_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the one of the highest step inside it.

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST).is_file():
        return path
    inside = step_checkpoints(path)
    if not inside:
        raise CheckpointError(f"expected a checkpoint or a folder of them, got {path}")
    return inside[-1]


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
            # Pairs, since JSON would turn the optimiser's int keys to text.
            entries.append([key, rest])
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
    require_fit(module.state_dict(), state, what)
    module.load_state_dict(dict(state))


def load_modules(
    modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor], what: str
) -> None:
    """Load modules strictly from weights whose keys begin with a module's name and a dot.

    Raises:
        CheckpointError: as :func:`load_weights`.
    """
    for name, module in modules.items():
        prefix = f"{name}."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        load_weights(module, state, f"{what}, {name}")


def require_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not those of a model, key by key and shape by shape.

    Raises:
        CheckpointError: keys that are missing or unknown, or shapes that differ; names each of them.
    """
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
