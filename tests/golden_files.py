"""The true inputs and outputs of the published programs, and how tensors are compared with them."""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.engine.agreement import relative_error

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # norm of the difference over norm, per tensor, in fp32
norm_1e6 = partial(nn.LayerNorm, eps=1e-6)


def golden(name: str, device: torch.device | str = "cpu") -> tuple[dict, dict[str, Tensor]]:
    """The settings and the tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k).to(device) for k in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["case"]), tensors


def listed(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """The tensors prefix.0, prefix.1, ..."""
    count = sum(key.startswith(f"{prefix}.") for key in tensors)
    return [tensors[f"{prefix}.{i}"] for i in range(count)]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_gradients(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every parameter has the expected gradient, or none where none is expected."""
    got = {name: p.grad for name, p in module.named_parameters()}
    assert {name for name, grad in got.items() if grad is not None} == set(expected)
    for name, gradient in expected.items():
        error = relative_error(got[name], gradient)
        assert error < TOLERANCE, f"gradient of {name}: relative error {error:.1e}"
