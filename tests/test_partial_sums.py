"""Programs that each sum many rows, which takes thousands of rows unless there may be few programs."""

import pytest
import torch

from stopfast.kernels.cases import CASES
from stopfast.kernels.ops import EAGER
from tests.kernel_runs import copied, run
from tests.test_kernels import errors, fused

LIMITS = {"linear_gelu": "_PROGRAMS", "layer_norm": "_PARTIALS"}


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in LIMITS], ids=lambda c: c.name)
def test_few_programs(case, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Results and gradients are those of the definition however many rows a program takes."""
    monkeypatch.setattr(f"stopfast.kernels.{case.name}.{LIMITS[case.name]}", most)
    shape = {**case.tested[0], "rows": (3, 201)}
    arguments = case.make(shape, torch.float32, device)
    exact = run(EAGER, case, copied(arguments, torch.float64))
    assert all(error <= 1e-5 for error in errors(fused(case, arguments), exact))


def test_several_ranges_of_rows(device: torch.device):
    """Weight and position gradients of the predictor's tokens, summed over more than one range of rows."""
    case = next(c for c in CASES if c.name == "predictor_tokens")
    shape = {**case.tested[3], "B": 3, "Ky": 33, "N": 64}
    arguments = case.make(shape, torch.float32, device)
    exact = run(EAGER, case, copied(arguments, torch.float64))
    assert all(error <= 1e-5 for error in errors(fused(case, arguments), exact))


@pytest.mark.parametrize("name", ["position_cross_entropy", "patch_mse"])
def test_means_of_many_programs(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """A row a program, and fewer at a time than there are programs where their sums are added up."""
    monkeypatch.setattr(f"stopfast.kernels.{name}._ELEMENTS", 1)
    monkeypatch.setattr("stopfast.kernels._means._BLOCK", 4)
    case = next(c for c in CASES if c.name == name)
    arguments = case.make(case.tested[0], torch.float32, device)
    exact = run(EAGER, case, copied(arguments, torch.float64))
    assert all(error <= 1e-5 for error in errors(fused(case, arguments), exact))
