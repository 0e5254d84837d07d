"""How a kernel is launched: on a GPU, by the interpreter, or not at all but recorded."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

_MAX_GRID = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """One launch of a kernel: what an ahead-of-time compiler needs, and what a test counts."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    """In the order of the kernel's parameters, constants excluded."""
    constants: dict[str, Any]
    options: dict[str, int]


class _Watch(NamedTuple):
    launches: list[Launch]
    run: bool
    compiled: list[Any]


# Backward runs in a thread of its own on a GPU, so what watches launches cannot be local to a thread.
_watches: list[_Watch] = []


@contextmanager
def watch_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches made inside; with ``run=False`` they are collected instead of made."""
    with _watching(run) as watch:
        yield watch.launches


@contextmanager
def watch_compiled() -> Iterator[list[Any]]:
    """Collect what Triton made of each kernel that is launched inside; the interpreter makes nothing."""
    with _watching(True) as watch:
        yield watch.compiled


@contextmanager
def _watching(run: bool) -> Iterator[_Watch]:
    watch = _Watch([], run, [])
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches[:] = [each for each in _watches if each is not watch]  # two may be equal


def interpreted(kernel: object) -> bool:
    """Whether TRITON_INTERPRET=1 was set when this kernel's module was imported."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def launch(
    kernel: Any,  # noqa: ANN401
    grid: Sequence[int],
    *arguments: Tensor | int | float | None,
    writes: Sequence[Tensor] = (),
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,  # noqa: ANN401
) -> None:
    """Run ``kernel`` on ``grid`` programs with arguments and compile-time constants; on none, do nothing.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along each of up to three axes.
        arguments: in the order of the kernel's parameters; all tensors on one device.
        writes: which of the tensors the kernel writes.
        num_warps, num_stages: as Triton defines them.
        constants: the kernel's ``tl.constexpr`` parameters.

    Raises:
        ValueError: tensors on several devices, or on no GPU without the interpreter, or a grid beyond
            CUDA's limits.
    """
    name = getattr(kernel, "__name__", None) or kernel.fn.__name__
    over = any(size > limit for size, limit in zip(grid, _MAX_GRID, strict=False))
    if over or math.prod(grid) >= 2**31:
        raise ValueError(f"{name}: expected a grid of less than 2**31 programs, got {tuple(grid)}")
    if 0 in grid:
        return
    # Multiply-adds are one instruction on every version of Triton: its default is about to change.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    for watch in _watches:
        watch.launches.append(Launch(name, kernel, arguments, constants, options))
    if not all(watch.run for watch in _watches):
        return
    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    if len(devices) != 1:
        raise ValueError(f"{name}: expected tensors on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    if interpreted(kernel):
        _interpret(
            functools.partial(kernel[tuple(grid)], **constants, **options), arguments, writes
        )
    elif device.type == "cuda":
        with torch.cuda.device(device):
            compiled = kernel[tuple(grid)](*arguments, **constants, **options)
        for watch in _watches:
            watch.compiled.append(compiled)
    else:
        raise ValueError(
            f"{name}: expected tensors on a GPU, got {device.type}; on the CPU use ops=EAGER, or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )


def _interpret(
    run: Callable[..., None], arguments: Sequence[Any], writes: Sequence[Tensor]
) -> None:
    """Run with every bf16 tensor as fp32: the interpreter computes wrongly in bf16 and rounds it down."""
    whole: dict[int, Tensor] = {}
    passed = []
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype == torch.bfloat16:
            storage = argument.untyped_storage()
            if storage.data_ptr() not in whole:
                flat = torch.empty(0, dtype=torch.bfloat16, device=argument.device).set_(storage)
                whole[storage.data_ptr()] = flat.float()
            wide = whole[storage.data_ptr()]
            argument = wide.as_strided(
                argument.size(), argument.stride(), argument.storage_offset()
            )
        passed.append(argument)
    run(*passed)
    for argument, used in zip(arguments, passed, strict=True):
        if argument is not used and any(argument is written for written in writes):
            argument.copy_(used)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that an operation on ``tensor`` computes in: autocast's inside autocast, else its own.

    Raises:
        ValueError: a dtype that no kernel takes.
    """
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"expected fp32, bf16 or fp16 for ops=FUSED, got {tensor.dtype}")
    return tensor.dtype


def power_of_two(size: int, at_least: int = 16) -> int:
    """The smallest power of two that is not less than either number."""
    return max(at_least, 1 << max(0, size - 1).bit_length())


def check_shapes(name: str, **shapes: tuple[Tensor | None, Sequence[int]]) -> None:
    """Refuse arguments of other shapes than those expected of them; an absent one has any.

    Raises:
        ValueError: one that differs. A kernel would read what lies beside it.
    """
    for argument, (tensor, expected) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise ValueError(
                f"{name}: expected {argument} {tuple(expected)}, got {tuple(tensor.shape)}"
            )


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` without gaps, for what a kernel reads as one line of numbers."""
    return None if tensor is None else tensor.contiguous()


def rows_contiguous(tensor: Tensor) -> Tensor:
    """``tensor`` with neighbouring elements in its last axis; copied only where they are not.

    A gradient that is one number expanded arrives with strides of zero.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()
