"""The operations that a step is said to need are those that torch counts while it takes one; its floor."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.results import Results
from benchmarks.roof.ceilings import Roof, newest_roof
from benchmarks.roof.roofline import (
    Part,
    RooflineOptions,
    StepCost,
    ceilings_for,
    projected,
    run,
    step_cost,
)
from benchmarks.roof.step_work import Shape, drawn_shapes, step_bytes, step_work
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
        objective=replace(config.jepa, mask=replace(config.jepa.mask, **changes.get("mask", {}))),
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
    update = step_bytes(config, drawn_shapes(config, 4, steps=1)[0])["update"]
    encoder, predictor = 85_646_592, 11_238_912
    assert update == pytest.approx(30 * (encoder + predictor) + 10 * encoder, rel=0.01)


def test_cost_is_the_mean_over_steps():
    """Of work, which is not linear in lengths, and so not that of a mean length."""
    config = small()
    shapes = [Shape(4, context, 6, 1, 4, 64) for context in (10, 30)]
    cost = step_cost(config, shapes)
    totals = [sum(part.total for part in step_work(config, shape).values()) for shape in shapes]
    assert cost.flops == sum(totals) / 2
    middle = step_work(config, shapes[0]._replace(context=20)).values()
    assert cost.flops > sum(part.total for part in middle)
    assert step_cost(config, shapes, "fp32").bytes > cost.bytes
    with pytest.raises(ValueError, match="at least one step"):
        step_cost(config, [])


COST = StepCost(8, {"a": Part(6e9, 1e9), "b": Part(1e9, 4e9), "update": Part(0, 2e9)})


def test_floor():
    """Of each part the longer of products and traffic; the whole step cannot take less than either."""
    floor = COST.floor(Roof(bytes=1e12, flops=1e12))
    assert floor.parts == pytest.approx({"a": 6, "b": 4, "update": 2})
    assert (floor.products, floor.traffic) == pytest.approx((7, 7))
    assert (floor.summed, floor.overall) == pytest.approx((12, 7))
    found = COST.figures(Roof(bytes=1e12, flops=1e12), 24.0)
    assert (found["roof_share"], found["matrix_share"]) == pytest.approx((0.5, 7 / 24))
    assert (found["floor_ms"], found["floor_overall_ms"]) == pytest.approx((12, 7))


def test_projection():
    """The other device's floor over the share of the roof that was reached."""
    here = Roof(bytes=2e12, flops=3e12)
    assert projected(COST, 11.0, here, here) == pytest.approx(11.0)
    half = Roof(bytes=1e12, flops=1.5e12)
    assert projected(COST, 11.0, here, half) == pytest.approx(22.0)
    # Fewer products a second: only the part that products bound takes longer.
    slow = Roof(bytes=2e12, flops=1e12)
    share = COST.floor(here).summed / 11.0
    assert projected(COST, 11.0, here, slow) == pytest.approx((6 + 2 + 1) / share)


def test_ceilings_and_steps_come_from_results(tmp_path, capsys):
    file = Results.open(tmp_path / "cpu" / "a.json")
    file.begin({})
    options = RooflineOptions(
        device="cpu", model=("toy",), images=(2,), steps=2, results=tmp_path, precision="fp32"
    )
    assert run(options) == 0 and "No ceilings are known" in capsys.readouterr().out
    for name, ceiling, rate in (("x", "matrix", 2e10), ("y", "matrix", 4e10), ("z", "memory", 8e9)):
        info = {"key": name, "kind": "ceilings", "ceiling": ceiling, "precision": "fp32"}
        file.add({"extra_info": {**info, "per_second": rate}})
    assert newest_roof("cpu", "fp32", tmp_path) == Roof(bytes=8e9, flops=4e10)
    assert newest_roof("cpu", "bf16", tmp_path) is None
    step = {"key": "s", "kind": "step", "arm": "an arm", "model": "toy", "images": 2}
    file.add({"extra_info": {**step, "precision": "fp32", "ms_p50": 50.0}})
    assert run(options) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "A100" in line]
    assert len(told) == 2 and all("projected" in line for line in told)
    with pytest.raises(ValueError, match="both"):
        ceilings_for(RooflineOptions(device="cpu", gigabytes=3.0))
