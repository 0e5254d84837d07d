"""The operations that a step is said to need are those that torch counts while it takes one."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import Shape, mean_shape, step_bytes, step_work
from stopfast.build import build_objective
from stopfast.presets import PRESETS, demo


def small(**changes):
    config = demo()
    model = replace(
        config.model, embed_dim=24, depth=3, num_heads=2, predictor_embed_dim=16, predictor_depth=2
    )
    return replace(
        config,
        model=replace(model, **changes.get("model", {})),
        noise=replace(config.noise, **changes.get("noise", {})),
        mask=replace(config.mask, **changes.get("mask", {})),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": {"variant": "ijepa"}},
        {"noise": {"apply_to": "both"}},
        {"noise": {"cov": "fixed"}},
        {"noise": {"tie": False, "noise_dim": "predictor"}},
        {"mask": {"npred": 2}, "model": {"predictor_depth": 1}},
        {"mask": {"nenc": 2}, "model": {"predictor_depth": 3, "predictor_mlp_ratio": 2.0}},
    ],
    ids=str,
)
def test_operations(changes):
    config = small(**changes)
    objective = build_objective(config, 10)
    draws = objective.draws(1, 4, slice(0, 4))
    context, target, _ = draws.masks
    patches = objective.encoder.patch_embed.num_patches
    lengths = (context[0].shape[1], target[0].shape[1])
    shape = Shape(4, *lengths, len(context), len(target), patches)
    images = torch.randn(4, 3, 32, 32)
    work = step_work(config, shape)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = objective.loss(images, draws)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        with FlopCounterMode(display=False) as teacher:
            objective.target_features(images, target)
    assert sum(part.forward for part in work.values()) == forward.get_total_flops()
    assert sum(part.backward for part in work.values()) == backward.get_total_flops()
    assert work["target encoder"].total == teacher.get_total_flops()


def test_traffic_is_of_every_weight():
    """The matrices are all weights but biases, norms, tokens and tables, a hundredth of a ViT-B's."""
    config = PRESETS["stop-vit-b16"]()
    shape = mean_shape(config, 4, batches=2)
    update = step_bytes(config, shape)["update"]
    encoder, predictor = 85_646_592, 11_238_912
    assert update == pytest.approx(30 * (encoder + predictor) + 10 * encoder, rel=0.01)
