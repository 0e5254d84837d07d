"""The table of dtypes: what each operation returns, eager and fused, under autocast on, off and nested."""

from contextlib import ExitStack

import pytest
import torch

from stopfast.kernels.cases import CASES
from stopfast.kernels.ops import EAGER, FUSED, Ops
from tests.kernel_runs import tensors, unique

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT = [torch.int64, torch.int64, torch.int32]

# By inputs' dtype and autocast's (None: off), the dtypes of the results.
TABLE: dict[str, dict[tuple[torch.dtype, torch.dtype | None], list[torch.dtype]]] = {
    # Products in autocast's dtype; positions keep theirs, and the sum is in the wider.
    "predictor_tokens": {
        (FP32, None): [FP32], (BF16, None): [BF16], (FP32, BF16): [FP32], (FP32, FP16): [FP32],
    },
    "attention": {
        (FP32, None): [FP32], (BF16, None): [BF16], (FP32, BF16): [BF16], (FP32, FP16): [FP16],
    },
    # The sum, and its norm as the linear layer that follows reads it.
    "layer_norm": {
        (FP32, None): [FP32, FP32], (BF16, None): [BF16, BF16],
        (FP32, BF16): [FP32, BF16], (FP32, FP16): [FP32, FP16],
    },
    "linear_gelu": {
        (FP32, None): [FP32], (BF16, None): [BF16], (FP32, BF16): [BF16], (FP32, FP16): [FP16],
    },
    # Statistics and the mean are fp32 whatever comes in.
    "target_smooth_l1": {
        (FP32, None): [FP32], (BF16, None): [FP32], (FP32, BF16): [FP32], (FP16, FP16): [FP32],
    },
    "position_cross_entropy": {
        (FP32, None): [FP32], (BF16, None): [FP32], (FP32, BF16): [FP32], (FP16, FP16): [FP32],
    },
    "patch_mse": {
        (FP32, None): [FP32], (BF16, None): [FP32], (FP32, BF16): [FP32], (FP16, FP16): [FP32],
    },
    "multiblock_masks": {(FP32, None): INT, (FP32, BF16): INT},
}  # fmt: skip
ROWS = [
    pytest.param(case, made, cast, results, id=f"{case.name}-{str(made)[6:]}-{str(cast)[6:]}")
    for case in CASES
    for (made, cast), results in TABLE.get(case.name, {}).items()
]


def test_every_operation_has_a_row():
    """Save the update, which returns nothing and writes each buffer in its own dtype."""
    assert set(TABLE) == {case.name for case in CASES if not case.in_place}


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
@pytest.mark.parametrize("nested", ["plain", "off inside on", "on inside off"])
@pytest.mark.parametrize(("case", "made", "cast", "results"), ROWS)
def test_dtypes(case, made, cast, results, nested: str, ops: Ops, device: torch.device):
    """Results have the table's dtypes, and every gradient its argument's."""
    arguments = case.make(case.tested[0], made, device)
    with ExitStack() as stack:
        if nested == "off inside on":
            other = FP16 if cast == BF16 else BF16
            stack.enter_context(torch.autocast(device.type, other))
        if nested == "on inside off":
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.autocast(device.type, cast or BF16, enabled=cast is not None))
        returned = tensors(getattr(ops, case.name)(**arguments))
    assert [t.dtype for t in returned] == results
    outputs = [t for t in returned if t.grad_fn is not None]
    wanted = [t for t in unique(tensors(arguments)) if t.requires_grad]
    if outputs:
        found = torch.autograd.grad(
            outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True
        )
        assert all(g is None or g.dtype == t.dtype for g, t in zip(found, wanted, strict=True))
