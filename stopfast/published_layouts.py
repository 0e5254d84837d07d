"""Names of weights in the files of the published DropPos, MAE and Beyond Masking programs.

Each has one state dictionary of everything, where I-JEPA and StoP have one of each network.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stopfast.pos_embed import Grid, sinusoid_pos_embed

Layout = Literal["droppos", "mae", "beyond"]
States = Mapping[str, Mapping[str, Tensor]]
"""State dictionaries of an objective's modules, by the modules' names."""
_SIDE = 224
"""Of the images of Beyond Masking, whose files do not tell the number of positions."""


class Names(NamedTuple):
    """What a layout calls our weights."""

    theirs: Mapping[str, Mapping[str, str | None]]
    """By module and beginning of our key, the beginning of theirs; None for tables of positions that the
    program computes and no file holds."""
    mark: str
    """A weight of theirs that only this layout has."""
    unread: frozenset[str] = frozenset()
    """Weights that some files hold and the program reads nowhere."""


def _same(*names: str) -> dict[str, str | None]:
    return {name: name for name in names}


def _pixel_decoder(prefix: str) -> dict[str, str | None]:
    parts = ("embed.", "pos_embed", "blocks.", "norm.")
    named = {f"predictor_{part}": f"{prefix}_{part}" for part in parts}
    return {"mask_token": "mask_token", **named, "predictor_proj.": f"{prefix}_pred."}


_ENCODER = _same("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
LAYOUTS: Mapping[Layout, Names] = {
    "droppos": Names(
        {
            "encoder": _ENCODER,
            "decoder": _same(
                "mask_pos_token",
                "decoder_embed.",
                "decoder_blocks.",
                "decoder_norm.",
                "decoder_pred.",
            ),
            "pixel_decoder": _pixel_decoder("aux_decoder"),
        },
        mark="mask_pos_token",
    ),
    "mae": Names(
        {"encoder": _ENCODER, "decoder": _pixel_decoder("decoder")}, mark="decoder_pos_embed"
    ),
    "beyond": Names(
        {
            "encoder": {
                "pos_embed": None,
                "patch_embed.": "encoder.patch_embed.",
                "blocks.": "encoder.blocks.",
                "norm.": "encoder.norm.",
            },
            "decoder": {
                "mask_token": "mask_token",
                "predictor_embed.": "encoder_to_decoder.",
                "predictor_pos_embed": None,
                "predictor_blocks.": "decoder.blocks.",
                "predictor_norm.": "decoder.norm.",
                "predictor_proj.": "decoder.head.",
            },
        },
        mark="encoder.blocks.0.attn.q_bias",
        unread=frozenset({"encoder.cls_token"}),  # of zoomed-in alone
    ),
}


def told_layout(state: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a state dictionary; None for other models.

    An encoder alone has a layout of its own in Beyond Masking only, whose names differ from others'.
    """
    return next((layout for layout, names in LAYOUTS.items() if names.mark in state), None)


def published_name(layout: Layout, module: str, key: str) -> str | None:
    """Return what a layout calls a weight of ours, None for a table that it computes.

    Raises:
        ValueError: it has no name for it.
    """
    for ours, theirs in LAYOUTS[layout].theirs.get(module, {}).items():
        if key.startswith(ours):
            return None if theirs is None else theirs + key.removeprefix(ours)
    raise ValueError(f"expected weights that the layout {layout!r} has, got {module}.{key}")


def to_published(layout: Layout, states: States) -> dict[str, Tensor]:
    """Rename the weights of an objective's modules.

    Raises:
        ValueError: a weight without a name in this layout, or a table of positions that no file holds and
            that is not the one which the program computes.
    """
    renamed: dict[str, Tensor] = {}
    for module, state in states.items():
        for key, value in state.items():
            name = published_name(layout, module, key)
            if name is not None:
                renamed[name] = value
            elif not torch.equal(value, computed_positions(value).to(value)):
                raise ValueError(
                    f"expected positions by number as {module}.{key}, which the program of the layout "
                    f"{layout!r} computes, got another table"
                )
    return renamed


def from_published(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo :func:`to_published`, without the tables that are computed; unknown weights are left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        own = _own_name(layout, name)
        if own is not None:
            found.setdefault(own[0], {})[own[1]] = value
    return found


def encoder_from_published(
    layout: Layout, state: Mapping[str, Tensor], grid: Grid | None
) -> dict[str, Tensor]:
    """Return the encoder's weights by our names, its table of positions included.

    Weights that the layout does not have keep their names, for who builds the encoder to refuse.

    Args:
        layout: of the state.
        state: weights of all modules.
        grid: (rows, columns) of patches; see :func:`default_grid`.
    """
    encoder = from_published(layout, state).get("encoder", {})
    encoder |= {
        name: value
        for name, value in state.items()
        if _own_name(layout, name) is None and name not in LAYOUTS[layout].unread
    }
    kernel = encoder.get("patch_embed.proj.weight")
    if LAYOUTS[layout].theirs["encoder"]["pos_embed"] is None and kernel is not None:
        rows, columns = grid or default_grid(kernel.shape[-1])
        encoder["pos_embed"] = computed_positions(kernel.new_empty(1, rows * columns, len(kernel)))
    return encoder


def _own_name(layout: Layout, name: str) -> tuple[str, str] | None:
    """Module and key that a name of theirs stands for, None for one that the layout does not have."""
    for module, names in LAYOUTS[layout].theirs.items():
        for ours, theirs in names.items():
            if theirs is not None and name.startswith(theirs):
                return module, ours + name.removeprefix(theirs)
    return None


def default_grid(patch_size: int) -> Grid:
    """Return the grid of patches where a file does not tell it: that of 224 pixels a side."""
    return _SIDE // patch_size, _SIDE // patch_size


def computed_positions(table: Tensor) -> Tensor:
    """Return the table [1, N, D] that Beyond Masking computes where a model has ``table``."""
    return sinusoid_pos_embed(table.shape[2], table.shape[1])[None]
