"""Arguments that do not fit each other are refused by every fused operation before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stopfast.kernels.arguments import PatchTarget, Smoothing
from stopfast.kernels.cases import CASES
from stopfast.kernels.ops import FUSED

BY_NAME = {case.name: case for case in CASES}
Change = Callable[[dict[str, Any]], dict[str, Any]]


def noise(**changed: Any) -> Change:
    return lambda given: {"noise": given["noise"]._replace(**changed)}


MISMATCHES: list[tuple[str, str, Change]] = [
    ("predictor_tokens", "weight", lambda g: {"weight": g["weight"][:, 1:], "noise": None}),
    ("predictor_tokens", "bias", lambda g: {"bias": g["bias"][1:]}),
    ("predictor_tokens", "offset", lambda g: {"offset": g["offset"][1:]}),
    ("predictor_tokens", "images", lambda g: {"x": g["x"][1:]}),
    ("predictor_tokens", "context", lambda g: {"x": g["x"][:, 1:]}),
    ("predictor_tokens", "lengths", lambda g: {"places": g["places"]._replace(lengths=torch.ones(1))}),
    ("predictor_tokens", "sample_ids", noise(sample_ids=torch.arange(1))),
    ("predictor_tokens", "queries", noise(queries=torch.zeros(1, 1, 1, 1))),
    ("predictor_tokens", "seed and sample_ids", noise(seed=None)),
    ("attention", r"\[B, N", lambda g: {"packed": g["packed"][..., 1:]}),
    ("attention", "queries", lambda g: {"packed": torch.zeros(2, 5, 128), "queries": torch.zeros(1, 1, 9)}),
    ("layer_norm", "weight", lambda g: {"weight": g["weight"][1:]}),
    ("layer_norm", "residual", lambda g: {"residual": g["residual"][1:]}),
    ("linear_gelu", "bias", lambda g: {"bias": g["bias"][1:]}),
    ("linear_gelu", "weight", lambda g: {"weight": g["weight"][:, 1:]}),
    ("target_smooth_l1", "sequences", lambda g: {"prediction": g["prediction"][1:]}),
    ("target_smooth_l1", "prediction", lambda g: {"prediction": g["prediction"][:, 1:]}),
    ("target_smooth_l1", "features", lambda g: {"features": g["features"][..., 1:]}),
    ("multiblock_masks", "seed", lambda g: {"seed": g["seed"].int()}),
    ("multiblock_masks", "grid", lambda g: {"target_size": (20, 2)}),
    ("position_cross_entropy", "logits", lambda g: {"logits": g["logits"][0]}),
    ("position_cross_entropy", "index", lambda g: {"index": g["index"][:, 1:]}),
    ("position_cross_entropy", "weight", lambda g: {"weight": g["weight"][1:]}),
    ("position_cross_entropy", "sigma", lambda g: {"sigma": g["sigma"][None]}),
    ("position_cross_entropy", "4 x 3 positions", lambda g: {"smoothing": Smoothing((4, 3))}),
    ("position_cross_entropy", "norm", lambda g: {"smoothing": Smoothing((4, 4), "both")}),
    ("patch_mse", "whole patches", lambda g: {"images": g["images"][..., 1:]}),
    ("patch_mse", "index", lambda g: {"index": g["index"][1:]}),
    ("patch_mse", "prediction", lambda g: {"index": None}),
    ("patch_mse", "prediction", lambda g: {"prediction": g["prediction"][..., 1:]}),
    ("patch_mse", "norm", lambda g: {"target": PatchTarget(4, "image")}),
    ("patch_mse", "3 eps", lambda g: {"target": PatchTarget(4, "channel", (1e-6,))}),
    ("patch_mse", "2 values", lambda g: {"images": g["images"][:, :1], "prediction": torch.zeros(3, 384, 1),
                                         "index": None, "target": PatchTarget(1, "patch", (1e-6,))}),
    ("patch_mse", "4 channels", lambda g: {"images": torch.zeros(3, 5, 4, 4), "index": None,
                                           "prediction": torch.zeros(3, 1, 80),
                                           "target": PatchTarget(4, "none")}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "change"), MISMATCHES)
def test_refused(name: str, message: str, change: Change, device: torch.device):
    case = BY_NAME[name]
    shape = next((s for s in case.tested if s.get("noise")), case.tested[0])
    arguments = case.make(shape, torch.float32, device)
    with pytest.raises(ValueError, match=message):
        getattr(FUSED, name)(**{**arguments, **change(arguments)})
