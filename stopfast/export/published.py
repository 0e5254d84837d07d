"""The ``.pth.tar`` layout of the published I-JEPA and StoP programs."""

from pathlib import Path

import torch

from stopfast import __version__
from stopfast.export.safetensors import told_settings
from stopfast.export.weights import cpu_weights
from stopfast.trained import TrainedRun


def write_published(run: TrainedRun, path: Path) -> None:
    """Write encoder, predictor and target encoder; ``load_published`` and timm read the file.

    Optimiser, epoch, loss and learning rate are None: the published programs can load the weights and
    not go on with the run. A further entry ``stopfast`` holds version, step and settings.

    Raises:
        ValueError: a predictor whose weights the published programs have no names for.
    """
    noise = run.config.noise
    if noise.variant == "stop_paper" or run.predictor.noise_embed is not None:
        raise ValueError(
            "expected a predictor with the published weights for the format 'pth', got "
            f"variant {noise.variant!r} with tie={noise.tie}"
        )
    modules = {
        "encoder": run.encoder,
        "predictor": run.predictor,
        "target_encoder": run.target_encoder,
    }
    content = {
        name: {f"module.{key}": value for key, value in cpu_weights(module).items()}
        for name, module in modules.items()
    }
    torch.save(
        {
            **content,
            "opt": None,
            "scaler": None,
            "epoch": None,
            "loss": None,
            "batch_size": run.config.data.batch_size,
            "world_size": 1,
            "lr": None,
            "stopfast": {
                "version": __version__,
                "step": run.step,
                "config": told_settings(run.config),
            },
        },
        path,
    )
