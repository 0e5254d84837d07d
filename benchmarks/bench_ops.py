"""Each operation against its alternatives: eager, `torch.compile`, libraries that compute the same.

Results of an arm are compared with the eager arm's before it is timed. Bytes are the least traffic and
operations the least arithmetic, so that the tables can say how near the roof an arm comes. Without a GPU
the interpreter (`TRITON_INTERPRET=1`) runs the kernels at the tests' shapes: a rehearsal, whose times
mean nothing.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from benchmarks.engine.agreement import peak_bytes
from benchmarks.engine.options import Cell, Options
from benchmarks.engine.refusals import Disagreement, NotHere
from benchmarks.engine.runner import Bench
from benchmarks.libraries import library_arms
from stopfast.kernels.cases import CASES, Case, Shape, moved_bytes
from stopfast.kernels.ops import EAGER, FUSED

Arm = Callable[[], object]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BY_NAME = {case.name: case for case in CASES}
_BACKENDS = {
    f"sdpa {backend.name.lower()}": backend
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    )
}


@dataclass(frozen=True, kw_only=True)
class OpOptions(Options):
    """Operations at the published models' shapes; ``--model`` names operations."""

    compiled: bool = True
    """Time `torch.compile` of the eager definition too."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if set(self.model) - set(BY_NAME):
            raise ValueError(f"expected operations of {list(BY_NAME)}, got {self.model}")


OPTIONS = OpOptions


class Given(NamedTuple):
    """An operation's arguments, and what the eager definition makes of them."""

    arguments: dict[str, Any]
    returned: object
    results: object
    """What an arm is compared with; of an operation in place its arguments, changed."""
    factor: int
    """How many times a forward pass's work there is."""


def shapes(case: Case, options: Options) -> dict[str, Shape]:
    """Return the shapes to time a case at, by name."""
    on_gpu = options.place.type == "cuda"
    return case.timed if on_gpu else {"rehearsal": case.tested[0]}


def plan(options: OpOptions) -> Iterator[Cell]:
    """Every arm of every operation at every shape."""
    for name in options.model or BY_NAME:
        case = BY_NAME[name]
        arms = ["eager", *(["torch.compile"] if options.compiled else [])]
        arms += [*(_BACKENDS if name == "attention" else ()), *(n for n, _ in library_arms(name))]
        for shape in shapes(case, options):
            problem: dict[str, str | int] = {"op": name, "shape": shape, "precision": options.dtype}
            yield from (Cell("ops", arm, problem) for arm in (*arms, "fused"))


def function_of(arm: str, case: Case) -> Callable[..., object]:
    """Return what an arm calls in the operation's place."""
    eager = getattr(EAGER, case.name)
    if arm in _BACKENDS:

        def within(**named: object) -> object:
            with sdpa_kernel(_BACKENDS[arm]):
                return eager(**named)

        return within
    named = {"eager": eager, "fused": getattr(FUSED, case.name), **dict(library_arms(case.name))}
    return torch.compile(eager) if arm == "torch.compile" else named[arm]


def step_of(function: Callable[..., object], arguments: dict[str, Any]) -> Arm:
    """Forward, and where there is something to differentiate backward, as one call."""
    inputs = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    inputs = list({id(t): t for t in inputs}.values())
    upstream: list[Tensor] = []

    def step() -> object:
        returned = function(**arguments)
        outputs = [
            t
            for t in pytree.tree_leaves(returned)
            if isinstance(t, Tensor) and t.grad_fn is not None
        ]
        if not outputs or not inputs:
            return returned
        if not upstream:
            upstream.extend(torch.ones_like(o) for o in outputs)
        return returned, torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)

    return step


def largest_error(first: object, second: object) -> float:
    """Largest relative distance (norms) of two results' tensors, NaN counted as infinite."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            a, b = a.detach().double(), b.detach().double()
            error = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
            worst = max(worst, error if error == error else float("inf"))
    return worst


def arguments_of(case: Case, shape: Shape, precision: str, device: torch.device) -> dict[str, Any]:
    """Make the operation's arguments, the same every time."""
    torch.manual_seed(0)
    return case.make(shape, DTYPES[precision], device)


def given(case: Case, arguments: dict[str, Any]) -> Given:
    """Run the eager definition.

    Backward reads and writes about what forward does, twice over, and has twice its products.
    """
    eager = getattr(EAGER, case.name)
    results = step_of(eager, arguments)()
    with torch.no_grad():
        returned = eager(**arguments)
    leaves = pytree.tree_leaves(arguments)
    differentiable = any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
    factor = 3 if differentiable and not case.in_place else 1
    return Given(arguments, returned, arguments if case.in_place else results, factor)


def test_ops(cell: Cell, bench: Bench) -> None:
    """Milliseconds of forward and backward; least traffic and arithmetic; peak memory."""
    case = BY_NAME[str(cell.problem["op"])]
    shape = shapes(case, bench.options)[str(cell.problem["shape"])]
    precision = str(cell.problem["precision"])

    def make() -> dict[str, Any]:
        return arguments_of(case, shape, precision, bench.device)

    shared = bench.shared(lambda: given(case, make()))
    theirs = cell.arm in dict(library_arms(case.name))
    arguments = make() if case.in_place else shared.arguments
    arm = step_of(function_of(cell.arm, case), arguments)
    try:
        got = arm()
        if case.in_place:
            arm()  # as often as the definition ran
    except (ImportError, AttributeError) as error:
        if theirs:
            raise NotHere(str(error)) from None
        raise
    except RuntimeError as error:
        if cell.arm in _BACKENDS and re.search("No (viable|available)", str(error)):
            raise NotHere(str(error).partition(".")[0]) from None
        raise
    # A library's optimiser counts its steps from 1, whatever the scalars say: another update.
    if not (case.in_place and theirs):
        error = largest_error(arguments if case.in_place else got, shared.results)
        if not error <= (1e-4 if precision == "fp32" else 3e-2):
            raise Disagreement(f"relative error {error:.1e} of the eager definition")
        bench.info["relative_error"] = error
    bench.info["bytes"] = shared.factor * moved_bytes(shared.arguments, shared.returned)
    bench.info["flops"] = shared.factor * case.flops(shape)
    bench.time(arm, rounds=30, warmup=5)
    bench.info["peak_bytes"] = peak_bytes(arm, bench.device)
