"""DropPos as published: the presets' values, schedules, parameter counts, groups and initial weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stopfast.build import build_objective
from stopfast.config import DropPosConfig, ModelConfig
from stopfast.objectives.droppos import DropPos
from stopfast.presets import PRESETS
from tests.small_droppos import build, parameters

# The specification's table: width, depth, heads, warm-up, images on a device, what is trained.
FACTS = {
    "droppos-vit-b16": (768, 12, 12, 10, 64, 92448196),
    "droppos-vit-l16": (1024, 24, 16, 40, 128, None),
}
presets = pytest.mark.parametrize("name", FACTS)
STEPS_PER_EPOCH = 625  # 2,048 of 1,281,167 images


@presets
def test_published_values(name: str):
    config, facts = PRESETS[name](), FACTS[name]
    model, optim, images = config.model, config.optim, config.data.transforms
    assert (model.embed_dim, model.depth, model.num_heads, optim.warmup) == facts[:4]
    assert config.data.batch_size / config.step.accumulate == facts[4]
    assert (model.patch_size, images.size, model.mlp_ratio) == (16, (224, 224), 4.0)
    decoder = model.predictor_embed_dim, model.predictor_depth, model.predictor_num_heads
    assert decoder == (512, 2, 16) and model.predictor_mlp_ratio == 4.0
    assert (model.class_token, model.positions, model.qkv_bias) == (True, "2d", "qkv")
    assert (images.crop_scale, images.flip, images.gray, images.blur) == ((0.2, 1.0), 0.5, 0, 0)
    assert (optim.epochs, optim.betas, optim.clip, optim.clip_norm) == (
        800, (0.9, 0.95), "per_tensor", 5.0,
    )  # fmt: skip
    assert not optim.clip_encoder_only and optim.decay_tokens and optim.ipe_scale == 1
    assert config.step.precision == "fp32" and config.noise.variant == "ijepa"
    released = {"smoothing_grid": "released", "smoothing_norm": "released"}
    published = DropPosConfig(
        mask_ratio=0.75, position_mask_ratio=0.75, position_token="param", shuffle=False,
        sigma=1.0, sigma_decay=True, attentive=True, temperature=0.1, ignore_confident=False,
        multi_task=False, position_weight=0.05 if model.depth == 12 else 0.1, **released,  # type: ignore[arg-type]
    )  # fmt: skip
    assert config.objective == published
    corrected = replace(published, smoothing_grid="corrected", smoothing_norm="corrected")
    twin = PRESETS[f"{name}-corrected"]()
    assert twin == replace(config, preset=f"{name}-corrected", objective=corrected)


@presets
def test_parameters_and_groups(name: str):
    """With nothing allocated; vectors and biases alone are not decayed, tokens of three dimensions are."""
    with torch.device("meta"):
        objective = build_objective(PRESETS[name](), STEPS_PER_EPOCH)
    assert isinstance(objective, DropPos)
    named = parameters(objective)
    if FACTS[name][5] is not None:
        assert sum(parameter.numel() for parameter in named.values()) == FACTS[name][5]
    recipe = objective.optimizer_recipe()
    decayed = {id(p): group["decayed"] for group in recipe.groups for p in group["params"]}
    assert decayed.keys() == {id(p) for p in named.values()} == {id(p) for p in recipe.clipped}
    assert {n for n, p in named.items() if not decayed[id(p)]} == {
        n for n, p in named.items() if p.ndim == 1
    }
    assert {"encoder.cls_token", "decoder.mask_pos_token"} < {
        n for n, p in named.items() if decayed[id(p)]
    }
    assert (recipe.betas, recipe.eps, recipe.clip, recipe.clip_norm) == (
        (0.9, 0.95), 1e-8, "per_tensor", 5.0,
    )  # fmt: skip


def test_schedule():
    """The specification's points, of the first step of an epoch; and the last step of all."""
    small = ModelConfig(
        embed_dim=16, depth=1, num_heads=1, predictor_embed_dim=16, predictor_depth=0,
        predictor_num_heads=1, class_token=True,
    )  # fmt: skip
    config = replace(PRESETS["droppos-vit-b16"](), model=small)
    objective = build_objective(config, STEPS_PER_EPOCH)
    assert isinstance(objective, DropPos)
    for epoch, lr in ((0, 0.0), (5, 6e-4), (10, 1.2e-3), (405, 6e-4)):
        scalars = objective.scalars(epoch * STEPS_PER_EPOCH + 1)
        assert scalars == {"lr": pytest.approx(lr, abs=1e-18), "weight_decay": 0.05}
    assert 0 < objective.scalars(800 * STEPS_PER_EPOCH)["lr"] < 1e-13
    sigmas = [objective.sigma(epoch * STEPS_PER_EPOCH + 1) for epoch in (0, 400, 799)]
    assert sigmas == pytest.approx([1.0, 0.5, 1 / 800])


def test_initial_weights():
    """Uniform by Xavier, the packed projection and the patches as one matrix each; tokens normal."""
    objective = build(side=112)
    layers = {n: m for root in objective.modules().values() for n, m in root.named_modules()}
    for name, layer in layers.items():
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all(), name
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            rows = layer.weight.detach().flatten(1)
            bound = math.sqrt(6 / sum(rows.shape))
            assert 0.98 * bound < rows.abs().max() <= bound, name
            assert rows.std() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert bool(layer.bias.any()) == isinstance(layer, nn.Conv2d), name
    class_token = objective.encoder.get_parameter("cls_token")
    tokens = torch.cat([class_token, objective.decoder.mask_pos_token])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert not objective.encoder.pos_embed[:, 0].any()
    assert not objective.encoder.pos_embed.requires_grad
