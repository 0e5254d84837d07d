"""The fused GELU over all of its argument's range: the tails too, which a norm of errors does not see."""

import math

import pytest
import torch
from torch import Tensor

from stopfast.kernels.ops import FUSED


def fused_gelu(x: Tensor) -> Tensor:
    """Elementwise, by a product with 1."""
    one = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    return FUSED.linear_gelu(x[:, None], one, None)[:, 0]


def test_accuracy(device: torch.device):
    """To the rounding of fp32, and the lower tail, where 1 + erf has no digit left, to 1e-4 of itself."""
    x = torch.cat([torch.linspace(-14, 14, 9001), torch.randn(9000)]).to(device).requires_grad_()
    wide = x.detach().double()
    below = 0.5 * torch.erfc(-wide / math.sqrt(2))
    slope = below + wide * torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    y = fused_gelu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    error = (y.detach() - wide * below).abs()
    # PyTorch's on the CPU are off by 1.2e-6 and 2.8e-7.
    assert error.max() < 5e-7 and (gradient - slope).abs().max() < 3e-7
    tail = (wide > -5.5) & (wide < -0.01)
    assert (error / (wide * below).abs())[tail].max() < 1e-4


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter, whose power reaches -inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_far_out(dtype: torch.dtype, device: torch.device):
    """Large arguments give themselves or 0, with slopes of 1 and 0; NaN stays."""
    x = torch.tensor([-1e30, -1e4, -40.0, 40.0, 1e4, 1e30], dtype=dtype, device=device)
    x.requires_grad_()
    y = fused_gelu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.detach(), x.detach().clamp(min=0))
    assert gradient.tolist() == [0, 0, 0, 1, 1, 1]
    assert fused_gelu(torch.full((1,), math.nan, dtype=dtype, device=device)).isnan().all()
