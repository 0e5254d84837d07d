"""What every test begins with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers in every run and order, so that no test fails by chance."""
    torch.manual_seed(0)
