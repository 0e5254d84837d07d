"""The presets of DropPos, MAE and Beyond Masking: published numbers, corrected twins, small forms."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

from stopfast.build import build_objective, build_step
from stopfast.config import (
    Config,
    DropPosConfig,
    JepaConfig,
    ReconstructionConfig,
    from_document,
    to_document,
)
from stopfast.objectives.reconstruction import Reconstruction
from stopfast.presets import PRESETS

STEPS_PER_EPOCH = 625
"""2,048 of 1,281,167 images."""

BEYOND = "2048 128 300 20 1.2e-3 1e-5 | no 384 4 6"
ROWS = f"""
droppos-vit-b16        2048  64 800 10 1.2e-3 0 | yes 512 2 16 | 0.75
droppos-vit-l16        2048 128 800 40 1.2e-3 0 | yes 512 2 16 | 0.75
mae-vit-b16            4096  64 800 40 2.4e-3 0 | yes 512 8 16 | 0.75
beyond-zoomed-in       {BEYOND} | 0
beyond-zoomed-in-mask  {BEYOND} | 0.75
beyond-zoomed-out      {BEYOND} | 0
beyond-distorted       {BEYOND} | 0
beyond-blurred         {BEYOND} | 0
beyond-decolorized     {BEYOND} | 0
"""
COLUMNS = "batch gpu_batch epochs warmup lr final_lr class_token width depth heads mask_ratio"
FACTS: dict[str, dict[str, Any]] = {
    name: dict(zip(COLUMNS.split(), values, strict=True))
    for name, *values in (row.replace("|", "").split() for row in ROWS.strip().splitlines())
}
published = pytest.mark.parametrize("name", FACTS)
OURS = [
    name for name, build in PRESETS.items()
    if not isinstance(build().objective, JepaConfig) or build().jepa.degrade.kind != "none"
]  # fmt: skip
SMALL = [name for name in PRESETS if name.endswith(("cifar10", "demo"))]


def smaller(config: Config, **sizes: Any) -> Config:
    """The settings with a network that is small; its schedules are the whole one's."""
    model = replace(
        config.model,
        **{"embed_dim": 16, "depth": 1, "num_heads": 1, "predictor_num_heads": 1}
        | {"predictor_embed_dim": 16, "predictor_depth": 1}
        | sizes,
    )
    return replace(config, model=model)


@published
def test_published_values(name: str):
    config, facts = PRESETS[name](), FACTS[name]
    optim, model, images = config.optim, config.model, config.data.transforms
    got = (config.data.batch_size, config.data.batch_size / config.step.accumulate)
    got += (optim.epochs, optim.warmup, optim.lr, optim.final_lr)
    got += (model.predictor_embed_dim, model.predictor_depth, model.predictor_num_heads)
    got += (config.objective.mask_ratio,)  # type: ignore[union-attr]
    expected = [float(value) for key, value in facts.items() if key != "class_token"]
    assert got == pytest.approx(expected, rel=1e-12)
    assert model.class_token == (facts["class_token"] == "yes")
    large = name.endswith("l16")
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (
        (1024, 24, 16, 16) if large else (768, 12, 12, 16)
    )
    assert (optim.betas, optim.start_lr) == ((0.9, 0.95), 0)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.05, 0.05)
    assert (images.size, images.crop_scale, images.flip) == ((224, 224), (0.2, 1.0), 0.5)
    assert (images.gray, images.blur, images.interpolation) == (0, 0, "bicubic")
    assert not model.init_rescale and not config.step.checkpointing
    assert config.noise.variant == "ijepa"


def test_published_switches():
    """What one family has and another has not."""
    droppos, mae = PRESETS["droppos-vit-b16"](), PRESETS["mae-vit-b16"]()
    assert (droppos.optim.clip, droppos.optim.clip_norm) == ("per_tensor", 5)
    assert (mae.optim.clip, mae.step.precision, droppos.step.precision) == ("none", "bf16", "fp32")
    for config in (droppos, mae):
        assert (config.optim.schedule, config.optim.decay_tokens) == ("mae", True)
        assert (config.model.positions, config.model.qkv_bias, config.model.init) == (
            "2d",
            "qkv",
            "xavier",
        )
    assert isinstance(droppos.objective, DropPosConfig)
    assert asdict(droppos.objective) == {
        "name": "droppos",
        "mask_ratio": 0.75,
        "position_mask_ratio": 0.75,
        "position_token": "param",
        "shuffle": False,
        "sigma": 1.0,
        "sigma_decay": True,
        "smoothing_grid": "released",
        "smoothing_norm": "released",
        "attentive": True,
        "temperature": 0.1,
        "ignore_confident": False,
        "multi_task": False,
        "position_weight": 0.05,
    }
    for name in FACTS:
        if not name.startswith("beyond"):
            continue
        config = PRESETS[name]()
        assert isinstance(config.objective, ReconstructionConfig)
        assert (config.optim.schedule, config.optim.decay_tokens) == ("beit", False)
        assert (config.optim.clip, config.step.precision) == ("none", "fp16")
        model = config.model
        assert (model.positions, model.qkv_bias, model.init) == ("1d", "qv", "truncated")
        assert not model.predictor_embed_bias and config.objective.target_norm == "channel"
        degrade = asdict(config.objective.degrade)
        assert degrade == {
            "kind": name.removeprefix("beyond-").removesuffix("-mask"),
            "margin": 32,
            "edge_weight": 0.2,
            "strength": (0.15, 0.25),
            "blur_std": 0.02,
            "mix_channels": True,
            "gray_channels": 1,
        }


def meta_objective(config: Config) -> Any:
    with torch.device("meta"):
        return build_objective(config, STEPS_PER_EPOCH)


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def transformer(width: int, depth: int, biases: int = 3) -> int:
    """Numbers in blocks of a width and in the norm after them."""
    attention = 4 * width**2 + (biases + 1) * width
    return depth * (attention + 8 * width**2 + 5 * width + 4 * width) + 2 * width


@pytest.mark.spec(15)
@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "rounded"),
    [
        # Patches, blocks, class token; projection, mask token, blocks, head.
        (
            "mae-vit-b16",
            769 * 768 + transformer(768, 12) + 768,
            769 * 512 + 512 + transformer(512, 8) + 513 * 768,
            None,
        ),
        (
            "beyond-zoomed-in-mask",
            769 * 768 + transformer(768, 12, 2),
            768 * 384 + 384 + transformer(384, 4, 2) + 385 * 768,
            (85.64, 93.33),
        ),
        ("droppos-vit-b16", 769 * 768 + transformer(768, 12) + 768, None, (None, 92.448196)),
    ],
)
def test_parameter_counts(name: str, encoder: int, decoder: int | None, rounded: Any):
    """By formulas, and in millions as the specification has them."""
    modules = meta_objective(PRESETS[name]()).modules()
    counts = [trained(module) for module in modules.values()]
    assert counts[0] == encoder
    assert decoder is None or counts[1] == decoder
    for value, got in zip(rounded or (), (counts[0], sum(counts)), strict=False):
        assert value is None or got / 1e6 == pytest.approx(value, abs=5e-3)


@pytest.mark.spec(13)
@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("beyond-distorted", {1: 0.0, 2: 1.2e-3 / 12499, 12500: 1.2e-3, 12501: 1.2e-3,
                              187500: 1e-5}),
        ("droppos-vit-b16", {1: 0.0, 3126: 6e-4, 6251: 1.2e-3, 253126: 6e-4, 500000: 0.0}),
        # A step is 4,096 images: half as many.
        ("mae-vit-b16", {1: 0.0, 12501: 1.2e-3, 25001: 2.4e-3, 262501: 1.2e-3, 500000: 0.0}),
    ],
)  # fmt: skip
def test_schedules(name: str, points: dict[int, float]):
    """Golden points: the first step has passed none of the warm-up; the decay never changes."""
    objective = build_objective(smaller(PRESETS[name]()), STEPS_PER_EPOCH)
    for step, lr in points.items():
        scalars = objective.scalars(step)
        assert scalars["lr"] == pytest.approx(lr, rel=1e-6, abs=1e-12), step
        assert scalars.keys() == {"lr", "weight_decay"} and scalars["weight_decay"] == 0.05


@pytest.mark.spec(13)
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("mae-vit-b16", {"cls_token": True, "mask_token": True}),
        ("droppos-vit-b16", {"cls_token": True, "mask_pos_token": True}),
        ("beyond-zoomed-in-mask", {"mask_token": False}),
    ],
)
def test_decayed(name: str, tokens: dict[str, bool]):
    """Weights are, vectors are not, and tokens in MAE and DropPos but not in Beyond Masking."""
    objective = meta_objective(PRESETS[name]())
    recipe = objective.optimizer_recipe()
    named = {p: n for m in objective.modules().values() for n, p in m.named_parameters()}
    placed = {named[p]: group["decayed"] for group in recipe.groups for p in group["params"]}
    assert len(placed) == sum(p.requires_grad for p in named)
    assert {n: placed.pop(n) for n in tokens} == tokens
    for key, decayed in placed.items():
        assert decayed == (key.endswith("weight") and "norm" not in key), key
    assert recipe.betas == (0.9, 0.95)


@pytest.mark.parametrize("name", [n for n in FACTS if n != "mae-vit-b16"])
def test_corrected_twin_differs_in_the_named_switches_alone(name: str):
    base, twin = PRESETS[name](), PRESETS[f"{name}-corrected"]()
    objective, model = base.objective, base.model
    if isinstance(objective, DropPosConfig):
        objective = replace(objective, smoothing_grid="corrected", smoothing_norm="corrected")
    else:
        assert isinstance(objective, ReconstructionConfig)
        degrade = replace(objective.degrade, mix_channels=False, gray_channels=3)
        objective = replace(objective, degrade=degrade)
        model = replace(
            model, positions="2d", init="xavier", qkv_bias="qkv", predictor_embed_bias=True
        )
    assert twin == replace(base, preset=f"{name}-corrected", objective=objective, model=model)


def test_mae_has_no_quirks():
    assert "mae-vit-b16-corrected" not in PRESETS


@pytest.mark.parametrize("name", OURS)
def test_builds_at_full_size_and_survives_json(name: str):
    """With nothing allocated; what the loader makes is what the objective takes."""
    config = PRESETS[name]()
    assert from_document(Config, json.loads(json.dumps(to_document(config)))) == config
    objective = meta_objective(config)
    degrade = getattr(config.objective, "degrade", None)
    by = {"zoomed-in": 2, "zoomed-out": -2}.get(degrade.kind, 0) if degrade else 0
    side = config.data.transforms.size[0] + by * (degrade.margin if degrade else 0)
    assert objective.transforms.size == (side, side)
    assert objective.transforms == replace(config.data.transforms, size=(side, side))


@pytest.mark.parametrize("name", SMALL)
def test_small_forms_train(name: str):
    """Two steps, by what the command line builds; the loss is a number and every weight moves."""
    config = smaller(PRESETS[name](), num_heads=2, depth=2, predictor_num_heads=2)
    objective = build_objective(config, STEPS_PER_EPOCH)
    step = build_step(config, objective, torch.device("cpu"))
    before = {id(p): p.detach().clone() for p in _parameters(objective)}
    images = torch.randn(4, 3, *objective.transforms.size)
    losses = [step(images, number).loss.item() for number in (1, 2)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    still = [p.shape for p in _parameters(objective) if torch.equal(before[id(p)], p)]
    assert still == []
    features = objective.features(torch.randn(2, 3, *config.data.transforms.size))
    assert features.shape == (2, 64, 16)


def _parameters(objective: Any) -> Iterator[nn.Parameter]:
    for name, module in objective.modules().items():
        yield from (p for p in module.parameters() if p.requires_grad and name != "target_encoder")


@pytest.mark.parametrize("name", [name for name in FACTS if "l16" not in name])
def test_small_forms_learn_what_the_published_do(name: str):
    """Quirks aside, and but for a margin in fewer pixels."""
    twin = PRESETS.get(f"{name}-corrected", PRESETS[name])().objective
    small = PRESETS[f"{name.removesuffix('-vit-b16')}-cifar10"]().objective
    if isinstance(small, ReconstructionConfig) and isinstance(twin, ReconstructionConfig):
        assert "zoomed" not in name or small.degrade.margin == 4
        mended = {"margin": 4, "mix_channels": False, "gray_channels": 3}
        small, twin = (
            replace(each, degrade=replace(each.degrade, **mended)) for each in (small, twin)
        )
    assert small == twin


def test_noise_leaves_the_mask_token_alone():
    """StoP's noise takes its place, in the presets too."""
    for name in ("stop-mae-vit-b16", "stop-mae-cifar10"):
        objective = meta_objective(PRESETS[name]())
        assert isinstance(objective, Reconstruction)
        assert objective.decoder.variant == "stop" and objective.decoder.class_token
        assert not objective.decoder.mask_token.requires_grad
