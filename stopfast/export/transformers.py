"""The layouts of Hugging Face's ``IJepaModel`` and ``ViTModel``: a folder that ``from_pretrained`` loads.

The two differ by the class token, which the second has, and have the same names for the rest. The
weights go by the names of the files on the hub. These are transformers 4's own; transformers 5 renames them
as it loads. Both sets of names are read.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stopfast.checkpoint import CheckpointError, save_tensors
from stopfast.config import Transforms
from stopfast.encoder import VisionTransformer
from stopfast.export.safetensors import run_metadata
from stopfast.export.weights import Untold, channels_of, common_weights, has_bias, untold_of
from stopfast.trained import TrainedRun, Which

MODEL_TYPES = ("ijepa", "vit")
_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_PACKED = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
# What transformers 5 calls them in memory; its files keep the names above.
_RENAMED = {
    "attention.q_proj": _PACKED[0],
    "attention.k_proj": _PACKED[1],
    "attention.v_proj": _PACKED[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BILINEAR = 2  # PIL's number


def write_transformers(run: TrainedRun, which: Which, folder: Path) -> None:
    """Write ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``."""
    encoder = run.chosen(which)
    documents = {
        "config.json": hub_config(encoder),
        "preprocessor_config.json": preprocessor_config(run.config.data.transforms),
    }
    folder.mkdir()
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2))
    state = to_hub_names(common_weights(encoder))
    save_tensors(state, folder / "model.safetensors", run_metadata(run, which))


def hub_config(encoder: VisionTransformer) -> dict[str, Any]:
    """Return the ``IJepaConfig`` of an encoder, or the ``ViTConfig`` of one with a class token."""
    heads, grid, eps = untold_of(encoder)
    assert grid is not None
    patch = encoder.patch_embed.patch_size
    height, width = (side * patch for side in grid)
    first = encoder.blocks[0]
    plain = encoder.cls_token is None
    return {
        "architectures": ["IJepaModel" if plain else "ViTModel"],
        "model_type": "ijepa" if plain else "vit",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": heads,
        "intermediate_size": first.mlp.fc1.out_features,  # type: ignore[union-attr]
        "hidden_act": "gelu",  # the erf one
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": eps,
        "image_size": height if height == width else [height, width],
        "patch_size": patch,
        "num_channels": channels_of(encoder),
        "qkv_bias": has_bias(encoder),
        "dtype": "float32",
    }


def preprocessor_config(transforms: Transforms) -> dict[str, Any]:
    """Return the image processor that cuts, scales and normalises as our evaluation does.

    For images that are not square no processor cuts the centre and changes the ratio of the sides, so
    there the whole photograph is scaled.
    """
    height, width = transforms.size
    size = {"height": height, "width": width}
    common = {
        "do_resize": True,
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transforms.mean),
        "image_std": list(transforms.std),
    }
    if height != width:
        return {"image_processor_type": "ViTImageProcessor", "size": size, **common}
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(height / transforms.center)},
        "do_center_crop": True,
        "crop_size": size,
        "do_convert_rgb": True,
        **common,
    }


def to_hub_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to those of the files on the hub; the packed projection becomes three."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if found is None:
            stem, dot, kind = (key, "", "") if key in _TOP else key.rpartition(".")
            renamed[f"{_TOP[stem]}{dot}{kind}"] = value
            continue
        number, part, kind = found.groups()
        prefix = f"encoder.layer.{number}"
        if part == "attn.qkv":
            # Copies: a file holds no views.
            for name, piece in zip(_PACKED, value.chunk(3), strict=True):
                renamed[f"{prefix}.{name}.{kind}"] = piece.clone()
        else:
            renamed[f"{prefix}.{_IN_BLOCK[part]}.{kind}"] = value
    return renamed


def from_hub_names(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Undo :func:`to_hub_names`, also of the names that transformers 5 has in memory.

    Unknown names stay as they are, for who builds the encoder to refuse.

    Raises:
        CheckpointError: a query, key or value is missing.
    """
    top = {theirs: ours for ours, theirs in _TOP.items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", key)
        if found is None:
            stem, dot, kind = (key, "", "") if key in top else key.rpartition(".")
            renamed[f"{top[stem]}{dot}{kind}" if stem in top else key] = value
            continue
        number, part, kind = found.groups()
        part = _RENAMED.get(part, part)
        if part in _PACKED:
            packed.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[part] = value
        else:
            name = in_block.get(part)
            renamed[f"blocks.{number}.{name}.{kind}" if name else key] = value
    for key, pieces in packed.items():
        absent = [name for name in _PACKED if name not in pieces]
        if absent:
            raise CheckpointError(f"{what}: missing for {key}: {', '.join(absent)}")
        renamed[key] = torch.cat([pieces[name] for name in _PACKED])
    return renamed


def told_by_hub_config(what: str, config: Mapping[str, Any]) -> Untold:
    """Return what an ``IJepaConfig`` or a ``ViTConfig`` says beyond the weights.

    Raises:
        CheckpointError: an activation that our encoder does not have.
    """
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{what}: expected hidden_act 'gelu', got {config['hidden_act']!r}")
    # Files state what differs from transformers' defaults.
    patch, size = config.get("patch_size", 16), config.get("image_size", 224)
    height, width = [size, size] if isinstance(size, int) else size
    rows, columns = [patch, patch] if isinstance(patch, int) else patch
    return Untold(
        config.get("num_attention_heads", 12),
        (height // rows, width // columns),
        config.get("layer_norm_eps", 1e-12),
    )


def is_hub_named(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights go by Hugging Face's names."""
    return any(key.startswith("embeddings.") for key in state)


def read_folder_tensors(folder: Path) -> list[Path]:
    """Return the weight files of a folder: one, or those that its index lists.

    Raises:
        CheckpointError: none there.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise CheckpointError(f"expected {whole.name} or {index.name} in {folder}, found neither")
    names = set(json.loads(index.read_text())["weight_map"].values())
    return [folder / name for name in sorted(names)]
