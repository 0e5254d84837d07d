"""Time each operation against its alternatives: `python -m benchmarks.kernels`.

Arms: the eager definition, the same under `torch.compile`, the fused kernel, and the libraries that
compute the same. Results of every arm are compared with the eager arm's before anything is timed. A
row's share is the larger of its bytes over the measured bandwidth and its operations over the measured
matrix rate: how near the roof it comes. Without a GPU the interpreter runs the kernels at the tests'
shapes: a rehearsal of the script, whose times mean nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from benchmarks.harness import Timing, compare, peak_bytes, write_results
from benchmarks.libraries import library_arms
from stopfast.kernels.cases import CASES, Case, moved_bytes
from stopfast.kernels.ops import EAGER, FUSED

Arm = Callable[[], object]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Args:
    """Each operation at the published models' shapes."""

    only: tuple[str, ...] = ()
    """Operations to time; all when left out."""
    rounds: int = 30
    warmup: int = 5
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    compiled: bool = True
    """Time `torch.compile` of the eager definition too."""
    save: bool = False
    """Write the samples and their provenance under benchmarks/results."""


class Roof(NamedTuple):
    """What the device was measured to reach, per second."""

    bytes: float
    flops: float


def measured_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Bandwidth of a large copy and rate of a large matrix product, medians of ten."""
    size = 2**28 if device.type == "cuda" else 2**22
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 512
    matrix = torch.randn(side, side, device=device).to(dtype)
    arms: dict[str, Arm] = {"copy": lambda: target.copy_(source), "matmul": lambda: matrix @ matrix}
    timed = compare(arms, 10, 3, device.type)
    return Roof(
        2 * source.numel() * 4 / (timed["copy"].median * 1e-3),
        2 * side**3 / (timed["matmul"].median * 1e-3),
    )


def step_of(function: Callable[..., object], case: Case, arguments: dict[str, Any]) -> Arm:
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


def arms_of(args: Args, case: Case, arguments: dict[str, Any]) -> Iterator[tuple[str, Arm]]:
    """The arms of one operation, the eager one first; those that cannot run here are left out."""
    eager = getattr(EAGER, case.name)
    yield "eager", step_of(eager, case, arguments)
    if args.compiled:
        yield "torch.compile", step_of(torch.compile(eager), case, arguments)
    if case.name == "attention":
        for backend in (
            SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
        ):  # fmt: skip

            def within(backend: SDPBackend = backend, **named: object) -> object:
                with sdpa_kernel(backend):
                    return eager(**named)

            yield f"sdpa {backend.name.lower()}", step_of(within, case, arguments)
    for name, function in library_arms(case.name):
        yield name, step_of(function, case, arguments)
    yield "fused", step_of(getattr(FUSED, case.name), case, arguments)


def agree(first: object, second: object, tolerance: float) -> bool:
    """Whether all tensors of two results are within a relative distance (norms)."""
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            difference = (a.detach().double() - b.detach().double()).norm()
            if not difference <= tolerance * b.detach().double().norm() + 1e-12:
                return False
    return True


def run_case(
    args: Args, case: Case, shape: dict[str, Any], device: torch.device, roof: Roof
) -> dict[str, Any]:
    """Time every arm that agrees with the eager one; say which did not run, and why."""
    dtype = _DTYPES[args.dtype]
    arguments = case.make(shape, dtype, device)
    left_out: dict[str, str] = {}
    runnable: dict[str, Arm] = {}
    expected = None
    for name, arm in arms_of(args, case, arguments):
        try:
            got = arm()
        except (
            Exception
        ) as error:  # an arm is another's library: whatever it raises, the rest go on
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        expected = got if expected is None else expected
        if case.in_place or agree(got, expected, 3e-2 if args.dtype != "fp32" else 1e-4):
            runnable[name] = arm
        else:
            left_out[name] = "its results are not the eager ones"
    timed = compare(runnable, args.rounds, args.warmup, device.type)
    with torch.no_grad():
        returned = getattr(EAGER, case.name)(**arguments)
    moved = moved_bytes(arguments, returned)
    differentiable = expected is not None and isinstance(expected, tuple) and not case.in_place
    # Backward reads and writes about what forward does, twice over, and has twice its products.
    factor = 3 if differentiable and case.name != "multiblock_masks" else 1
    return {
        "case": case.name,
        "shape": shape,
        "dtype": args.dtype,
        "left_out": left_out,
        "bytes": moved * factor,
        "flops": case.flops(shape) * factor,
        "arms": {
            name: {
                **timing.as_dict(),
                **rates(timing, moved * factor, case.flops(shape) * factor, roof),
            }
            for name, timing in timed.items()
        },
        "peak_bytes": {name: peak_bytes(arm, device) for name, arm in runnable.items()},
    }


def rates(timing: Timing, moved: int, flops: int, roof: Roof) -> dict[str, float]:
    seconds = timing.median * 1e-3
    share = max(moved / seconds / roof.bytes, flops / seconds / roof.flops)
    return {
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12,
        "share_of_roof": share,
    }


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """A line an arm; the ratio is to the fastest other arm, below 1 where fused loses."""
    table = Table(title="forward and backward")
    for heading in ("operation", "arm", "ms", "GB/s", "share of roof", "x fused"):
        table.add_column(heading)
    for row in rows:
        fused = row["arms"].get("fused", {}).get("median")
        for name, arm in row["arms"].items():
            ratio = f"{arm['median'] / fused:.2f}" if fused else ""
            table.add_row(
                f"{row['case']} {row['name']}", name, f"{arm['median']:.3f}", f"{arm['GB/s']:.0f}",
                f"{arm['share_of_roof']:.0%}", ratio,
            )  # fmt: skip
        for name, reason in row["left_out"].items():
            table.add_row(f"{row['case']} {row['name']}", name, "-", "", "", reason[:60])
    console.print(table)


def main() -> None:
    args = tyro.cli(Args)
    known = [case.name for case in CASES]
    if set(args.only) - set(known):
        raise SystemExit(f"expected --only from {known}, got {args.only}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roof = measured_roof(device, _DTYPES[args.dtype])
    rows = []
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        shapes = case.timed if device.type == "cuda" else {"rehearsal": case.tested[0]}
        for name, shape in shapes.items():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                rows.append({"name": name, **run_case(args, case, shape, device, roof)})
            torch.compiler.reset()
    print_rows(rows, Console(width=150))
    if args.save:
        print(write_results("kernels", {"roof": roof._asdict(), "rows": rows}, device.type))


if __name__ == "__main__":
    main()
