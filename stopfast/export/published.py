"""Checkpoints in the layouts of the published programs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stopfast import __version__
from stopfast.config import JepaConfig, ReconstructionConfig
from stopfast.export.safetensors import told_settings
from stopfast.export.weights import cpu_weights, pack_biases
from stopfast.published_layouts import LAYOUTS, to_published
from stopfast.published_objectives import layout_of, require_published_form
from stopfast.trained import TrainedRun


def write_published(run: TrainedRun, path: Path) -> None:
    """Write all networks of a run as the published program of its objective does.

    ``load_published`` reads the file of I-JEPA and StoP, ``load_published_objective`` the others;
    ``import_encoder`` takes the encoder out of each. The published programs can load the weights and not
    go on with the run. A further entry ``stopfast`` holds version, step and settings.

    Raises:
        ValueError: weights that the published programs have no names for.
    """
    jepa = isinstance(run.config.objective, JepaConfig)
    content = _networks(run) if jepa else {"model": _state(run)}
    about = {"version": __version__, "step": run.step, "config": told_settings(run.config)}
    torch.save({**content, "stopfast": about}, path)


def _networks(run: TrainedRun) -> dict[str, Any]:
    """The ``.pth.tar`` of I-JEPA and StoP; optimiser, epoch, loss and learning rate are None."""
    noise, predictor = run.config.noise, run.predictor
    if predictor.predictor_embed.bias is None or predictor.noise_embed is not None:
        raise ValueError(
            "expected a predictor with the published weights for the format 'pth', got "
            f"variant {noise.variant!r} with tie={noise.tie}, and predictor_embed_bias="
            f"{run.config.model.predictor_embed_bias}"
        )
    networks = {
        name: {f"module.{key}": value for key, value in pack_biases(cpu_weights(module)).items()}
        for name, module in run.modules.items()
    }
    return {
        **networks,
        "opt": None,
        "scaler": None,
        "epoch": None,
        "loss": None,
        "batch_size": run.config.data.batch_size,
        "world_size": 1,
        "lr": None,
    }


def _state(run: TrainedRun) -> dict[str, Tensor]:
    """The one state dictionary of DropPos, MAE and Beyond Masking."""
    layout = layout_of(run.config)
    states = {name: cpu_weights(module) for name, module in run.modules.items()}
    if layout != "beyond":  # which has biases of queries and values
        states = {name: pack_biases(state) for name, state in states.items()}
    require_published_form(states, run.config)
    state = to_published(layout, states)
    objective = run.config.objective
    if isinstance(objective, ReconstructionConfig) and objective.degrade.kind == "zoomed-in":
        # Zoomed-in declares a class token and does not read it; without its key nothing loads.
        state |= {key: torch.zeros(1, 1, run.encoder.embed_dim) for key in LAYOUTS[layout].unread}
    return state
