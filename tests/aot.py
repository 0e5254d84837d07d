"""Every kernel at the published models' shapes, compiled ahead of time and held to what it may cost.

Compiling needs no GPU. ``python -m tests.aot`` compiles every launch of every fused operation for sm_80,
sm_90 and sm_100 and prints what moved against ``aot_budgets.json``; ``--write`` commits the new figures.

For every configuration: no stack, no spills, no TF32, row offsets in 64 bits, tensor-core instructions
where half-precision matrices are multiplied, registers and shared memory within the architecture's limits.
Under the Triton that the budgets were written with, no figure may pass its budget either; under another
one the budgets only say what moved.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from stopfast.kernels._launch import Launch, watch_launches
from stopfast.kernels.cases import CASES, Case, Shape
from stopfast.kernels.ops import EAGER, FUSED
from tests.budgets import (
    ARCHITECTURES,
    Measured,
    commit,
    committed_budgets,
    compare,
    idle_tensor_cores,
    report,
)
from tests.kernel_runs import tensors, unique
from tests.row_offsets import row_offset_faults

WORKERS = 2

_TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
_TF32 = re.compile(r"\btf32\b", re.IGNORECASE)
_CHOICES = (str, bool, type(None))  # of a shape's entries, those that are options and not sizes
_DOT = re.compile(r"tt\.dot\w*\b.*?: tensor<[\dx]+x(\w+)>")


class Configuration(NamedTuple):
    """One specialisation of one kernel, as the JIT would compile it."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]


class _Bodies(TorchDispatchMode):
    """Calls of stopfast's registered operations run their bodies, though the tensors are fake.

    What is registered for fake tensors says only what shape a result has, and launches nothing.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "stopfast":
            return func(*args, **(kwargs or {}))
        with self:
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))


class _Pointer:
    """What the JIT looks at of a tensor; every storage is aligned, as CUDA's allocator has it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def configuration(launch: Launch) -> Configuration:
    """A recorded launch, specialised by the JIT's own code."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("kernels were imported under TRITON_INTERPRET, and cannot be compiled")
    backend = make_backend(GPUTarget("cuda", 90, 32))  # what it looks at is the same for every one
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    passed = [_Pointer(a) if isinstance(a, Tensor) else a for a in launch.arguments]
    given = {**launch.constants, **launch.options}
    bound, specialisation, options = bind(*passed, **given)
    _, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialisation, options
    )
    attributes = {place: found for place, found in attributes.items() if found}
    name = kernel.fn.__qualname__
    return Configuration(kernel.module, name, signature, constants, attributes, launch.options)


def launches(case: Case, shape: Shape, dtype: torch.dtype, autocast: bool) -> list[Launch]:
    """What one call launches, forwards and backwards and without gradients; takes no memory."""
    device = torch.device("cpu")
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with FakeTensorMode(), _Bodies(), watch_launches(run=False) as made:
        arguments = case.make(shape, dtype, device)
        with torch.no_grad(), cast:
            getattr(FUSED, case.name)(**arguments)
        with cast:
            results = tensors(getattr(FUSED, case.name)(**arguments))
        wanted = [t for t in unique(tensors(arguments)) if t.requires_grad]
        outputs = [r for r in results if r.grad_fn is not None]
        if outputs:
            gradients = [torch.empty_like(r) for r in outputs]
            torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    return made


def _shapes(case: Case) -> Iterator[tuple[str, Shape, list[tuple[str, torch.dtype, bool]]]]:
    """Each published shape, and the first one with every option that the tested shapes have."""
    half = [("bf16", torch.bfloat16, False), ("autocast", torch.float32, True)]
    others = [("fp16", torch.float16, False), ("fp32", torch.float32, False)]
    (first, published), *_ = case.timed.items()
    for name, shape in case.timed.items():
        yield name, shape, half + (others if name == first else [])
    for tested in case.tested:
        own = {k: v for k, v in tested.items() if k not in published or isinstance(v, _CHOICES)}
        if any(published.get(k, own) != v for k, v in own.items()):
            text = " ".join(f"{k}={v}".replace(" ", "") for k, v in own.items())
            yield f"{first} {text}", {**published, **own}, half[:1]


def configurations(cases: tuple[Case, ...]) -> tuple[dict[str, Configuration], list[str]]:
    """Every different specialisation by a readable name, and the operations that are not fused."""
    found: dict[str, Configuration] = {}
    known: set[str] = set()
    plain = []
    for case in cases:
        if getattr(FUSED, case.name) is getattr(EAGER, case.name):
            plain.append(case.name)
            continue
        for label, shape, kinds in _shapes(case):
            for kind, dtype, autocast in kinds:
                made = launches(case, shape, dtype, autocast)
                if not made:
                    raise RuntimeError(f"{case.name} at {label} in {kind} launched nothing")
                for launch in made:
                    each = configuration(launch)
                    if repr(each) in known:
                        continue
                    values = ", ".join(_settings(each, launch))
                    options = f"{launch.options['num_warps']} warps, {launch.options['num_stages']} stages"
                    name = f"{case.name}, {label}, {kind}: {each.kernel}({values}) {options}"
                    same = sum(one.split(" #")[0] == name for one in found)
                    name += f" #{same + 1}" if same else ""
                    known.add(repr(each))
                    found[name] = each
    return found, plain


def _settings(each: Configuration, launch: Launch) -> list[str]:
    """A launch's constants, and which arguments it does without."""
    names = list(each.signature)
    given = [f"{key}={value}" for key, value in launch.constants.items()]
    return given + [
        f"no {names[place]}"
        for (place,), value in each.constants.items()
        if value is None and names[place] not in launch.constants
    ]


def tools() -> dict[str, str]:
    """The programs that compile and read kernels, by name; they come with Triton.

    Raises:
        FileNotFoundError: one is missing.
    """
    found = {}
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm"):
        try:
            found[name] = getattr(triton.knobs.nvidia, name).path
        except RuntimeError as error:
            raise FileNotFoundError(f"{name} is missing from Triton's installation") from error
    return found


def measure(name: str, each: Configuration, architecture: int) -> Measured:
    """Compile one configuration, and read its figures and what no budget can allow."""
    kernel = getattr(importlib.import_module(each.module), each.kernel)
    source = ASTSource(kernel, each.signature, each.constants, each.attributes)
    try:
        compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), each.options)
    except Exception as error:
        return Measured(name, architecture, {}, [], [], f"{type(error).__name__}: {error}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools()["cuobjdump"], "-res-usage", file.name)
        machine_code = _output(tools()["nvdisasm"], "-c", file.name)
    ttir = compiled.asm["ttir"]
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    figures = {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "spills": len(_LOCAL_MEMORY.findall(machine_code)),
        "shared": compiled.metadata.shared,
        "tensor_core": len(_TENSOR_CORE.findall(machine_code)),
    }
    breaches = [f"row offset: {fault}" for fault in row_offset_faults(ttir)]
    if _TF32.search(compiled.asm["ptx"]) or _TF32.search(machine_code):
        breaches.append("TF32 in the machine code")
    multiplied = _DOT.findall(ttir)
    if len(multiplied) != ttir.count("tt.dot"):
        breaches.append("a matrix product whose operands this harness cannot read")
    return Measured(name, architecture, figures, multiplied, breaches)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def examine(found: dict[str, Configuration], architectures: tuple[int, ...]) -> list[Measured]:
    """Measure every configuration on every architecture, in processes with an empty cache of their own."""
    work = [(name, each, one) for name, each in found.items() for one in architectures]
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
                return list(pool.map(measure, *zip(*work, strict=True))) if work else []
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def main() -> int:
    """Compile, compare, report; exit with 1 where anything is breached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="commit the figures to aot_budgets.json"
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=[case.name for case in CASES],
        help="only this operation; may be repeated",
    )
    parser.add_argument("--json", type=Path, help="also write the outcome to this file")
    options = parser.parse_args()
    whole = options.case is None
    cases = tuple(case for case in CASES if whole or case.name in options.case)
    tools()
    found, plain = configurations(cases)
    measured = examine(found, ARCHITECTURES)
    committed = committed_budgets()
    breaches, moved = compare(measured, committed, whole)
    if options.write:
        commit(measured, cases)
        breaches, _ = compare(measured, committed_budgets(), whole)
    breaches += idle_tensor_cores(measured, cases)
    print(f"triton {triton.__version__}, budgets of triton {committed.get('triton')}")
    print(
        f"{len(found)} configurations, {len(measured)} compiled; not fused: {', '.join(plain) or 'none'}"
    )
    print(report(breaches, moved))
    if options.json is not None:
        outcome = {"breaches": breaches, "moved": moved, "plain": plain, "measured": measured}
        options.json.write_text(json.dumps(outcome))
    return min(len(breaches), 1)


if __name__ == "__main__":
    sys.exit(main())
