"""Parameters, their teachers and their AdamW state as views of flat buffers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGN = 32  # elements, 128 bytes: every parameter begins a cache line


class Slot(NamedTuple):
    """Where a parameter, its teacher and their state lie in the buffers of their segment."""

    parameter: Tensor
    teacher: Tensor | None
    index: int
    """In the segment."""
    start: int
    end: int
    stop: int
    """Where the next parameter starts; from ``end`` to there is padding, of zeros."""
    stride: tuple[int, ...]

    def of(self, buffer: Tensor, first: int = 0) -> Tensor:
        """The parameter's part of a buffer that begins at element ``first`` of the segment."""
        return buffer.as_strided(self.parameter.shape, self.stride, self.start - first)


@dataclass(slots=True)
class Segment:
    """Parameters of one group that all have a teacher, or none of which has one."""

    group: int
    slots: list[Slot]
    buffers: dict[str, Tensor]
    """The fields of ``AdamWBuffers`` but the gradient."""
    scalars: Tensor
    """What ``adamw_ema`` takes by that name."""
    steps: Tensor
    """fp32, how often each parameter was updated."""
    together: bool = True
    """Whether all were updated equally often, so that one launch can serve them."""

    def state(self, slot: Slot) -> dict[str, Tensor]:
        """A parameter's state in the layout of ``torch.optim.AdamW``, as views."""
        return {
            "step": self.steps[slot.index],
            "exp_avg": slot.of(self.buffers["exp_avg"]),
            "exp_avg_sq": slot.of(self.buffers["exp_avg_sq"]),
        }

    def teachers(self) -> Iterator[Tensor]:
        """Of the parameters."""
        return (slot.teacher for slot in self.slots if slot.teacher is not None)

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and teachers."""
        return chain((slot.parameter for slot in self.slots), self.teachers())

    def moved(self) -> Iterator[Tensor]:
        """Parameters and teachers whose memory is no longer the buffers'."""
        for slot in self.slots:
            for tensor, name in ((slot.parameter, "param"), (slot.teacher, "average")):
                if tensor is None or not tensor.numel():
                    continue
                buffer = self.buffers[name]
                if tensor.data_ptr() != buffer.data_ptr() + slot.start * buffer.element_size():
                    yield tensor

    def gather(self, slots: Sequence[Slot], gradients: Sequence[Tensor]) -> Tensor:
        """The gradients of neighbours, laid out as their part of the buffers.

        In their dtype if it is the same for all, else in fp32.
        """
        first = slots[0].start
        same = all(gradient.dtype == gradients[0].dtype for gradient in gradients)
        dtype = gradients[0].dtype if same else torch.float32
        flat = torch.empty(slots[-1].stop - first, dtype=dtype, device=self.scalars.device)
        for slot in slots:
            if slot.end < slot.stop:
                flat[slot.end - first : slot.stop - first].zero_()
        places = [slot.of(flat, first) for slot in slots]
        torch._foreach_copy_(places, list(gradients))  # type: ignore[attr-defined]
        return flat


@torch.no_grad()
def flatten(
    groups: Sequence[dict[str, Any]],
    teachers: Mapping[Tensor, Tensor],
    copies: torch.dtype | None,
    scalars: int,
) -> tuple[list[Segment], Tensor]:
    """Move the parameters of groups, and their teachers, into new buffers.

    Args:
        groups: as an optimiser has them; nothing of them is moved if one is refused.
        teachers: the teacher of each parameter that has one.
        copies: dtype of the additional copies, or None.
        scalars: fp64 numbers of each segment.

    Returns:
        The segments, and the tensor whose rows begin with their numbers.

    Raises:
        ValueError: as :class:`stopfast.flat_adamw.FlatAdamW` does.
    """
    device = _check(groups, teachers)
    chosen = []
    for number, group in enumerate(groups):
        parameters = dict.fromkeys(group["params"])  # a repeated one counts once
        for taught in (True, False):
            some = [p for p in parameters if (p in teachers) == taught]
            chosen += [(number, some)] if some else []
    # Every row as aligned as the first: how aligned a pointer is decides which compiled kernel it needs.
    rows = torch.zeros(len(chosen), -(-scalars // 2) * 2, dtype=torch.float64, device=device)
    segments = [
        _segment(number, some, teachers, row[:scalars], copies)
        for (number, some), row in zip(chosen, rows, strict=True)
    ]
    return segments, rows


def _check(groups: Sequence[dict[str, Any]], teachers: Mapping[Tensor, Tensor]) -> torch.device:
    names: dict[Tensor, str] = {}
    for number, group in enumerate(groups):
        given = group.get("param_names") or [
            f"group {number}[{place}]" for place in range(len(group["params"]))
        ]
        names |= dict(zip(group["params"], given, strict=True))
    named = [(name, parameter) for parameter, name in names.items()]
    for parameter, teacher in teachers.items():
        if parameter not in names:
            raise ValueError(f"expected teachers of parameters, got one of {_told(parameter)}")
        named.append((f"teacher of {names[parameter]}", teacher))
        if teacher.shape != parameter.shape:
            raise ValueError(f"{named[-1][0]}: expected {_told(parameter)}, got {_told(teacher)}")
    odd = [
        f"{name} {_told(tensor)}"
        for name, tensor in named
        if tensor.dtype != torch.float32 or type(tensor.data) is not Tensor
    ]
    if odd:
        raise ValueError(f"expected plain tensors in fp32, got {', '.join(odd)}")
    devices = {tensor.device for _, tensor in named}
    if len(devices) != 1:
        raise ValueError(f"expected parameters on one device, got {sorted(map(str, devices))}")
    owners: dict[int, str] = {}
    for name, tensor in named:
        owner = owners.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if owner != name:
            raise ValueError(f"expected tensors with memory of their own, got {owner} and {name}")
    return devices.pop()


def _told(tensor: Tensor) -> str:
    return f"({type(tensor.data).__name__}, {tensor.dtype}, {tuple(tensor.shape)})"


def _segment(
    group: int,
    parameters: Sequence[Tensor],
    teachers: Mapping[Tensor, Tensor],
    scalars: Tensor,
    copies: torch.dtype | None,
) -> Segment:
    slots: list[Slot] = []
    stop = 0
    for index, parameter in enumerate(parameters):
        start, end = stop, stop + parameter.numel()
        stop = -(-end // _ALIGN) * _ALIGN
        stride = torch.empty_like(parameter, device="meta").stride()  # that of a dense layout stays
        slots.append(Slot(parameter, teachers.get(parameter), index, start, end, stop, stride))
    wide = ["param", "exp_avg", "exp_avg_sq"] + ["average"] * (slots[0].teacher is not None)
    dtypes = dict.fromkeys(wide, torch.float32)
    if copies is not None:
        dtypes |= {f"{name}_copy": copies for name in ("param", "average") if name in wide}
    device = scalars.device
    buffers = {
        name: torch.zeros(stop, dtype=dtype, device=device) for name, dtype in dtypes.items()
    }
    for slot in slots:
        for tensor, name in ((slot.parameter, "param"), (slot.teacher, "average")):
            if tensor is not None:
                view = slot.of(buffers[name])
                view.copy_(tensor)
                tensor.data = view
    return Segment(group, slots, buffers, scalars, torch.zeros(len(slots), device=device))
