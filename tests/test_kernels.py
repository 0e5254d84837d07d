"""Every fused operation against its eager definition, at awkward shapes, strides and dtypes."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from stopfast.kernels._launch import watch_launches
from stopfast.kernels.cases import CASES, Case, Shape
from stopfast.kernels.ops import EAGER, FUSED
from tests.kernel_runs import Run, copied, incoming, run, tensors, unique

SHAPES = [
    pytest.param(case, shape, id=f"{case.name}-{number}")
    for case in CASES
    for number, shape in enumerate(case.tested)
]
FIRST = [pytest.param(case, case.tested[0], id=case.name) for case in CASES]
EACH = pytest.mark.parametrize(("case", "shape"), SHAPES)
EACH_ONCE = pytest.mark.parametrize(("case", "shape"), FIRST)
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned():
    """New memory holds NaN, so that whatever an operation leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def fused(case: Case, arguments: dict[str, Any], gradients: list[Tensor] | None = None) -> Run:
    """Run the fused operation, which must launch kernels wherever there is something to compute."""
    with watch_launches() as launches:
        result = run(FUSED, case, arguments, gradients)
    assert launches or not result.results[0].numel()
    return result


def errors(got: Run, exact: Run) -> list[float]:
    """Relative error (norm of the difference over the norm) of each result and gradient."""
    found = []
    for value, expected in zip(
        got.results + got.gradients, exact.results + exact.gradients, strict=True
    ):
        assert (value is None) == (expected is None)
        if value is None or expected is None:
            continue
        assert value.shape == expected.shape
        if not expected.is_floating_point():
            assert torch.equal(value, expected)
            continue
        difference = (value.double() - expected.double()).norm().item()
        found.append(
            difference / max(expected.double().norm().item(), 1e-30) if difference else 0.0
        )
    return found


@EACH
def test_fp32(case: Case, shape: Shape, device: torch.device, poisoned: None):
    """Results and gradients within 1e-5 of the fp64 definition; arguments are left as they were."""
    arguments = case.make(shape, torch.float32, device)
    before = [t.detach().clone() for t in tensors(arguments)]
    exact = run(EAGER, case, copied(arguments, torch.float64))
    got = fused(case, copied(arguments) if case.in_place else arguments)
    # The copies of the weights are bf16; test_adamw_ema holds them to the last bit.
    kept = [r for r in got.results + got.gradients if r is not None and r.is_floating_point()]
    for value, error in zip(kept, errors(got, exact), strict=True):
        assert error <= (1e-5 if value.dtype == torch.float32 else 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(arguments), strict=True))


@EACH
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_half_precision(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device):
    """At most twice (gradients three times) the error of the eager definition in the same dtype."""
    arguments = case.make(shape, dtype, device)
    exact = run(EAGER, case, copied(arguments, torch.float64))
    eager = run(EAGER, case, copied(arguments))
    got = fused(case, copied(arguments))
    for value, plain in zip(
        got.results + got.gradients, eager.results + eager.gradients, strict=True
    ):
        assert value is None or value.dtype == plain.dtype
    floor = torch.finfo(dtype).eps / 16  # where eager happens to be exact
    split = sum(r.is_floating_point() for r in exact.results)
    pairs = list(zip(errors(got, exact), errors(eager, exact), strict=True))
    assert all(mine <= 2 * its + floor for mine, its in pairs[:split]), pairs[:split]
    assert all(mine <= 3 * its + floor for mine, its in pairs[split:]), pairs[split:]


def strided(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors with NaN (or -1) between their rows or numbers and, of three axes, two swapped in memory."""
    made: dict[int, Tensor] = {}

    def spread(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        if id(leaf) not in made:
            gap = torch.nan if leaf.is_floating_point() else -1
            if leaf.ndim == 1:
                wide = leaf.new_full((2 * len(leaf),), gap)[::2]
            else:
                wide = leaf.new_full((*leaf.shape[:-1], leaf.shape[-1] + 3), gap)
                if leaf.ndim > 2:
                    wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
                wide = wide[..., : leaf.shape[-1]]
            wide.copy_(leaf.detach())
            made[id(leaf)] = wide.requires_grad_(leaf.requires_grad)
        return made[id(leaf)]

    return torch.utils._pytree.tree_map(spread, arguments)


@EACH
def test_strides(case: Case, shape: Shape, device: torch.device):
    """Gaps, transposed axes and expanded gradients change nothing."""
    if case.in_place:
        pytest.skip("its buffers are flat and contiguous by contract")
    arguments = case.make(shape, torch.float32, device)
    outputs = [r for r in tensors(getattr(EAGER, case.name)(**arguments)) if r.grad_fn is not None]
    gradients = [torch.tensor(0.5, device=device).expand(o.shape) for o in outputs]
    expected = run(EAGER, case, copied(arguments, torch.float64), gradients)
    assert all(e <= 1e-5 for e in errors(fused(case, strided(arguments), gradients), expected))
    assert all(e <= 1e-5 for e in errors(fused(case, arguments, gradients), expected))


PADDED = {"predictor_tokens": "x", "attention": "packed", "target_smooth_l1": "prediction"}


@pytest.mark.parametrize(
    ("case", "shape"), [p for p in SHAPES if "lengths" in cast(dict, p.values[1])]
)
def test_padding(case: Case, shape: Shape, device: torch.device):
    """Padding that holds NaN, in arguments and in incoming gradients, reaches nothing."""
    arguments = case.make(shape, torch.float32, device)
    slots = arguments[PADDED[case.name]].shape[1]
    context = {"predictor_tokens": slots, "attention": shape.get("slots"), "target_smooth_l1": 0}
    split, (first, second) = context[case.name], shape["lengths"]
    place = torch.arange(slots, device=device)
    padding = torch.where(place < split, place >= first, place - split >= second)
    with torch.no_grad():
        arguments[PADDED[case.name]][:, padding] = 0.0
    expected = run(EAGER, case, copied(arguments, torch.float64))
    with torch.no_grad():
        arguments[PADDED[case.name]][:, padding] = torch.nan
    outputs = tensors(getattr(EAGER, case.name)(**arguments))
    upstream = incoming(outputs)
    for gradient in upstream:
        if (
            gradient.ndim == 3
        ):  # the padded rows of a result are those that are zero in every sequence
            gradient[:, (outputs[0] == 0).all(2).all(0)] = torch.nan
    got = fused(case, arguments, upstream)
    assert all(error <= 1e-5 for error in errors(got, expected))


class Called(TorchDispatchMode):
    """Collect the calls of stopfast's registered operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stopfast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@EACH_ONCE
def test_registration(case: Case, shape: Shape, device: torch.device):
    """opcheck's four utilities on every registered operation that runs, backward ones included."""
    arguments = case.make(shape, torch.float32, device)
    with Called() as called:
        run(FUSED, case, copied(arguments))
    assert called.calls
    for func, args, kwargs in called.calls:
        # Seen below autograd, so what required a gradient has to be told again.
        backward = "backward" in func.name()
        plain = [
            a.detach().clone().requires_grad_(a.is_floating_point() and not backward and not case.in_place)
            if isinstance(a, Tensor) else a
            for a in args
        ]  # fmt: skip
        torch.library.opcheck(func, tuple(plain), kwargs)


@EACH
def test_derivatives_of_the_definition(case: Case, shape: Shape, device: torch.device):
    arguments = case.make(shape, torch.float64, device)
    wanted = [t for t in unique(tensors(arguments)) if t.requires_grad and t.numel()]
    if not wanted or sum(t.numel() for t in wanted) > 2000:
        pytest.skip("nothing to differentiate, or too much for finite differences")
    leaves, structure = torch.utils._pytree.tree_flatten(arguments)
    names = [id(t) for t in wanted]

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        put = [inputs[names.index(id(leaf))] if id(leaf) in names else leaf for leaf in leaves]
        returned = getattr(EAGER, case.name)(**torch.utils._pytree.tree_unflatten(put, structure))
        return tuple(t for t in tensors(returned) if t.requires_grad)

    assert gradcheck(call, wanted)


@EACH_ONCE
def test_compiles_whole(case: Case, shape: Shape, device: torch.device):
    """One graph, whose results and gradients are those of the operation called directly."""
    arguments = case.make(shape, torch.float32, device)
    compiled = torch.compile(getattr(FUSED, case.name), fullgraph=True, backend="aot_eager")
    expected = run(FUSED, case, copied(arguments))
    with watch_launches() as launches:
        got = run(FUSED._replace(**{case.name: compiled}), case, copied(arguments))
    assert launches
    assert all(error == 0 for error in errors(got, expected))
