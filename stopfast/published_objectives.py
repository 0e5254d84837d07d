"""Whole checkpoints of the published DropPos, MAE and Beyond Masking programs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stopfast.build import build_objective
from stopfast.checkpoint import CheckpointError, require_fit
from stopfast.config import (
    Config,
    DropPosConfig,
    JepaConfig,
    ModelConfig,
    NoiseConfig,
)
from stopfast.models import heads_of_width
from stopfast.objectives import Objective
from stopfast.pos_embed import Grid, square_grid
from stopfast.presets import PRESETS
from stopfast.published import count_blocks, hidden_ratio, read_pickled, strip_prefixes
from stopfast.published_layouts import (
    LAYOUTS,
    Layout,
    States,
    default_grid,
    from_published,
    published_name,
    to_published,
    told_layout,
)

_WITH_TOKEN = {"class_token": True, "qkv_bias": "qkv", "predictor_embed_bias": True}
_FORM: Mapping[Layout, Mapping[str, Any]] = {
    "droppos": _WITH_TOKEN,
    "mae": _WITH_TOKEN,
    "beyond": {
        "class_token": False,
        "positions": "1d",
        "qkv_bias": "qv",
        "predictor_embed_bias": False,
    },
}
"""Settings of the model that all files of a layout have in common."""
_DECODER_HEADS: Mapping[Layout, Mapping[int, int]] = {
    "droppos": {512: 16},
    "mae": {512: 16},
    "beyond": {384: 6, 512: 8},
}
"""By the width of the decoder, which does not tell them."""


@dataclass(frozen=True, kw_only=True)
class PublishedObjective:
    """A published checkpoint, on the CPU."""

    layout: Layout
    config: Config
    """Settings of an objective of these networks, whose sizes are the file's."""
    objective: Objective[Any]
    """What these settings say, with the file's weights."""
    unread: Mapping[str, Tensor]
    """Weights that the file holds and the published program reads nowhere, by its names."""
    epoch: int | None


def load_published_objective(
    path: str | Path,
    *,
    config: Config | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    grid_size: Grid | None = None,
    steps_per_epoch: int = 1,
) -> PublishedObjective:
    """Load a ``.pth`` checkpoint of the published DropPos, MAE or Beyond Masking program, all of it.

    The weights tell which program it is of, and the sizes. Only tensors and plain containers are
    unpickled. Files of an encoder alone are for :func:`stopfast.import_encoder`.

    Args:
        path: file of a state dictionary, or of one as its entry ``model``; a ``module.`` or ``_orig_mod.``
            prefix of the keys is stripped.
        config: settings that weights do not tell; default those of the published preset. The task of a
            Beyond Masking file has to be said so, unless it is zoomed-in or de-colorized.
        num_heads: heads of the encoder; default those of the published size.
        decoder_num_heads: heads of the decoder; default those of the published width.
        grid_size: (rows, columns) of patches; default a square, for Beyond Masking of 224 pixels a side.
        steps_per_epoch: of the objective's schedules.

    Raises:
        CheckpointError: a damaged file, one of another layout, or a weight that is missing, unknown or of
            another shape.
        ValueError: heads, positions or a task that have to be said, or settings of another objective.
    """
    content = read_pickled(path)
    content = content if isinstance(content, Mapping) else {}
    model = content.get("model", content)
    named = isinstance(model, Mapping) and all(isinstance(key, str) for key in model)
    state = strip_prefixes(model) if named else {}
    layout = told_layout(state)
    if layout is None:
        raise CheckpointError(
            f"{path}: expected weights of DropPos, MAE or Beyond Masking with their decoder, got "
            f"{sorted(state)[:8]}; import_encoder reads encoders, load_published reads I-JEPA and StoP"
        )
    others = sorted(key for key, value in state.items() if not isinstance(value, Tensor))
    if others:
        raise CheckpointError(f"{path}: expected weights, got other entries {others[:8]}")
    unread = {key: state.pop(key) for key in LAYOUTS[layout].unread & state.keys()}
    try:
        config = config or _preset(layout, state, zoomed=bool(unread))
        config = _sized(config, layout, state, grid_size)
        model = _model(config.model, layout, state, num_heads, decoder_num_heads)
    except KeyError as error:
        raise CheckpointError(f"{path}: missing: {error.args[0]}") from None
    config = replace(config, model=model)
    objective = build_objective(config, steps_per_epoch)
    modules = objective.modules()
    own = {name: module.state_dict() for name, module in modules.items()}
    require_fit(to_published(layout, own), state, str(path))
    for name, weights in from_published(layout, state).items():
        modules[name].load_state_dict({**own[name], **weights})
    return PublishedObjective(
        layout=layout, config=config, objective=objective, unread=unread, epoch=content.get("epoch")
    )


def layout_of(config: Config) -> Layout:
    """Return the layout that weights of these settings are published in.

    Raises:
        ValueError: of I-JEPA or StoP, which have one of their own.
    """
    if isinstance(config.objective, JepaConfig):
        raise ValueError("expected DropPos, MAE or Beyond Masking, got I-JEPA or StoP")
    if isinstance(config.objective, DropPosConfig):
        return "droppos"
    return "mae" if config.model.class_token else "beyond"


def require_published_form(states: States, config: Config) -> None:
    """Refuse weights that the published program would not load.

    Args:
        states: of the modules of an objective.
        config: its settings.

    Raises:
        ValueError: names the weights that are missing, or that it does not know.
    """
    layout = layout_of(config)
    model = replace(config.model, **_FORM[layout])
    with torch.device("meta"):
        published = build_objective(replace(config, model=model, noise=NoiseConfig()), 1).modules()
    form = ", ".join(f"{name} {value!r}" for name, value in _FORM[layout].items())
    for name, module in published.items():
        what = f"the published layout {layout!r}, whose models have {form}; {name}"
        require_fit(module.state_dict(), states[name], what)


def _preset(layout: Layout, state: Mapping[str, Tensor], *, zoomed: bool) -> Config:
    """The published settings that these weights belong to."""
    if layout != "beyond":
        return PRESETS[f"{layout}-vit-b16"]()
    if zoomed:
        return PRESETS["beyond-zoomed-in"]()
    if state["encoder.patch_embed.proj.weight"].shape[1] == 1:
        return PRESETS["beyond-decolorized"]()
    raise ValueError(
        "expected config=, the settings of a task of Beyond Masking: its weights do not tell which"
    )


def _sized(
    config: Config, layout: Layout, state: Mapping[str, Tensor], grid: Grid | None
) -> Config:
    """Settings of the images' size, and of the tasks that the weights tell."""
    objective = config.objective
    if isinstance(objective, DropPosConfig) != (layout == "droppos") or isinstance(
        objective, JepaConfig
    ):
        raise ValueError(
            f"expected settings of an objective of the layout {layout!r}, got {objective.name!r}"
        )
    if isinstance(objective, DropPosConfig):
        objective = replace(objective, multi_task="aux_decoder_pos_embed" in state)
    patch = state[_name(layout, "encoder", "patch_embed.proj.weight")].shape[-1]
    if grid is None and layout == "beyond":
        grid = default_grid(patch)
    rows, columns = grid or square_grid(state["pos_embed"].shape[1] - 1)
    transforms = replace(config.data.transforms, size=(rows * patch, columns * patch))
    return replace(config, data=replace(config.data, transforms=transforms), objective=objective)


def _model(
    model: ModelConfig,
    layout: Layout,
    state: Mapping[str, Tensor],
    heads: int | None,
    decoder_heads: int | None,
) -> ModelConfig:
    """Settings of the model as the weights show them."""
    decoder = "decoder" if layout == "droppos" else "predictor"
    width, _, patch, _ = state[_name(layout, "encoder", "patch_embed.proj.weight")].shape
    narrow = len(state[_name(layout, "decoder", f"{decoder}_embed.weight")])
    decoder_heads = decoder_heads or _DECODER_HEADS[layout].get(narrow)
    if decoder_heads is None:
        raise ValueError(
            f"expected decoder_num_heads for a decoder of width {narrow}, which is not published"
        )
    blocks = _name(layout, "encoder", "blocks.")
    decoder_blocks = _name(layout, "decoder", f"{decoder}_blocks.")
    return replace(
        model,
        **_FORM[layout],
        patch_size=patch,
        embed_dim=width,
        depth=count_blocks(state, blocks),
        num_heads=heads_of_width(width, heads),
        mlp_ratio=hidden_ratio(*state[f"{blocks}0.mlp.fc1.weight"].shape),
        predictor_embed_dim=narrow,
        predictor_depth=count_blocks(state, decoder_blocks),
        predictor_num_heads=decoder_heads,
        predictor_mlp_ratio=hidden_ratio(*state[f"{decoder_blocks}0.mlp.fc1.weight"].shape),
    )


def _name(layout: Layout, module: str, key: str) -> str:
    name = published_name(layout, module, key)
    assert name is not None
    return name
