"""What every test begins with."""

import os

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers in every run and order, so that no test fails by chance."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the fused kernels run: the GPU, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
