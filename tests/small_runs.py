"""Checkpoints of small runs, and what exports and imports of their encoders are compared with."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stopfast.build import build_objective
from stopfast.checkpoint import save_checkpoint
from stopfast.config import (
    Config,
    DataConfig,
    DegradeConfig,
    DropPosConfig,
    ModelConfig,
    MonitorConfig,
    NoiseConfig,
    ReconstructionConfig,
    RunConfig,
    Transforms,
    to_document,
)
from stopfast.networks import seeded
from stopfast.presets import demo

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
HEADS = {"square": 4, "wide": 2, "token": 4, "gray": 4}
GRIDS = {"wide": (4, 6), "gray": (8, 8)}
TEACHERS = ("square", "wide")


def settings(name: str) -> Config:
    """A run of the demo's size, and others with what exports could get wrong.

    ``wide``: an image that is not square, a head of 24 channels, an odd hidden width. ``token``: a class
    token. ``gray``: no biases of keys, one channel, patches numbered in raster order.
    """
    model = ModelConfig(
        patch_size=4,
        embed_dim=96,
        depth=2,
        num_heads=4,
        predictor_embed_dim=48,
        predictor_depth=1,
    )
    size = (32, 32)
    if name == "wide":
        model = replace(model, patch_size=8, embed_dim=48, num_heads=2, mlp_ratio=48 / 11)
        size = (32, 48)
    objective, noise = demo().objective, NoiseConfig(variant="stop")
    if name == "token":
        model, noise = replace(model, class_token=True), NoiseConfig()
        objective = DropPosConfig(multi_task=True)
    elif name == "gray":
        model = replace(model, positions="1d", qkv_bias="qv", predictor_embed_bias=False)
        degrade = DegradeConfig(kind="decolorized", gray_channels=1)
        objective, noise = ReconstructionConfig(mask_ratio=0.0, degrade=degrade), NoiseConfig()
    transforms = Transforms(size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), center=0.8)
    here = Path.home() / "mine"
    return replace(
        demo(),
        model=model,
        data=DataConfig(transforms=transforms, root=here),
        noise=noise,
        objective=objective,
        monitor=MonitorConfig(labelled=here),
        run=RunConfig(output=here, seed=5),
    )


def write_checkpoint(folder: Path, config: Config, seed: int = 1) -> Path:
    """A checkpoint whose networks have random weights in every place, all different."""
    weights = {}
    numbered = config.model.positions == "1d"
    with seeded(seed):
        for name, network in build_objective(config, steps_per_epoch=1).modules().items():
            for key, value in network.state_dict().items():
                fixed = key == "predictor_pos_embed" or (numbered and key == "pos_embed")
                noise = 0 if fixed else 0.05 * torch.randn_like(value)
                weights[f"{name}.{key}"] = value + noise
    state = {"step": 7, "optimizer": {}}
    save_checkpoint(folder, {"model": weights}, {"config": to_document(config), "state": state})
    return folder


def images(name: str) -> torch.Tensor:
    """Two photographs of noise, of the size that a run sees."""
    return torch.randn(2, 3, *settings(name).data.transforms.size)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of another order of operations."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()


def hugging_face():
    """transformers, imported where this repository's folder ``kernels`` does not pass for theirs."""
    elsewhere = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", elsewhere)
        transformers = pytest.importorskip("transformers")
        assert transformers.IJepaModel and transformers.AutoImageProcessor  # loaded on first use
    return transformers
