"""One operation, forwards and backwards, held to its eager definition."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.engine.refusals import Disagreement
from stopfast.kernels.cases import Arguments, Case
from stopfast.kernels.ops import EAGER

Kind = Literal["fp32", "fp16", "bf16", "autocast"]
"""Precision of the arguments; ``autocast`` has fp32 ones, inside autocast to bf16."""
DTYPES: dict[Kind, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "autocast": torch.float32,
}
_RESULTS, _GRADIENTS, _EXACT = 2.0, 3.0, 1e-5


def tensors(tree: object) -> list[Tensor]:
    """Return each tensor of nested arguments or results once."""
    found = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def copied(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """Return the arguments in memory of their own, floating ones in ``dtype``; one tensor stays one."""
    made: dict[int, Tensor] = {}

    def copy(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            wanted = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
            fresh = leaf.detach().to(wanted, copy=True)
            made[id(leaf)] = fresh.requires_grad_(leaf.requires_grad)
        return made[id(leaf)]

    return pytree.tree_map(copy, arguments)


class Calls:
    """Forward and backward of an operation on fixed arguments, as calls that can be timed apart."""

    def __init__(self, function: Callable[..., object], arguments: Arguments, kind: Kind) -> None:
        self.function, self.arguments, self.kind = function, arguments, kind
        self.inputs = [t for t in tensors(arguments) if t.requires_grad]
        self._outputs: list[Tensor] = []
        self._upstream: list[Tensor] = []

    def _cast(self) -> AbstractContextManager[object]:
        device = tensors(self.arguments)[0].device.type
        on = self.kind == "autocast"
        return torch.autocast(device, torch.bfloat16) if on else nullcontext()

    def forward(self) -> object:
        """The operation, with whatever it keeps for backward."""
        with self._cast():
            return self.function(**self.arguments)

    @torch.no_grad()
    def inference(self) -> object:
        """The operation without gradients."""
        return self.forward()

    def prepare(self) -> bool:
        """Run forward, and keep it for :meth:`backward`; whether there is anything to differentiate."""
        outputs = tensors(self.forward())
        self._outputs = [out for out in outputs if out.grad_fn is not None]
        device = tensors(self.arguments)[0].device
        generator = torch.Generator(device).manual_seed(1)
        self._upstream = [
            torch.randn(out.shape, generator=generator, device=device).to(out)
            for out in self._outputs
        ]
        return bool(self._outputs and self.inputs)

    def backward(self) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs, of the forward pass that was kept."""
        return torch.autograd.grad(
            self._outputs, self.inputs, self._upstream, retain_graph=True, allow_unused=True
        )

    def both(self) -> object:
        """Forward, and the gradients of all inputs."""
        outputs = [out for out in tensors(self.forward()) if out.grad_fn is not None]
        return torch.autograd.grad(outputs, self.inputs, self._upstream, allow_unused=True)


class Reference:
    """The eager definition in fp64, and how far it is from that in the arguments' precision."""

    def __init__(self, case: Case, arguments: Arguments, kind: Kind) -> None:
        self.case, self.arguments = case, arguments
        self.kind: Kind = kind
        eager = getattr(EAGER, case.name)
        self._exact, self._split = self._outcome(eager, copied(arguments, torch.float64), "fp32")
        plain, _ = self._outcome(eager, copied(arguments), kind)
        self._plain = [_error(a, b) for a, b in zip(plain, self._exact, strict=True)]

    def _outcome(
        self, function: Callable[..., object], arguments: Arguments, kind: Kind
    ) -> tuple[list[Tensor | None], int]:
        calls = Calls(function, arguments, kind)
        if self.case.in_place:
            calls.forward()
            results = tensors(arguments)
            return list(results), len(results)
        results = [result.detach() for result in tensors(calls.forward())]
        gradients = calls.backward() if calls.prepare() else ()
        return [*results, *gradients], len(results)

    def check(self, function: Callable[..., object]) -> None:
        """Compare a candidate: twice the eager error for results, three times for gradients.

        fp32 has 1e-5 of fp64 instead; what are no floating-point numbers must be equal.

        Raises:
            Disagreement: it computes something else.
        """
        got, _ = self._outcome(function, copied(self.arguments), self.kind)
        half = torch.bfloat16 if self.kind == "autocast" else DTYPES[self.kind]
        for number, (value, exact, plain) in enumerate(
            zip(got, self._exact, self._plain, strict=True)
        ):
            limit = (_RESULTS if number < self._split else _GRADIENTS) * plain
            limit += torch.finfo(half).eps / 16
            if self.kind == "fp32":
                limit = max(_EXACT, 1.01 * plain)  # copies in half precision are rounded by all
            error = _error(value, exact)
            if not error <= limit:
                what = f"result {number}" if number < self._split else "a gradient"
                raise Disagreement(f"{what}: relative error {error:.1e} of at most {limit:.1e}")


def _error(value: Tensor | None, exact: Tensor | None) -> float:
    """Relative distance (norms), infinite where one is missing or is of another shape."""
    if value is None or exact is None:
        return 0.0 if value is exact else float("inf")
    if value.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return 0.0 if torch.equal(value, exact) else float("inf")
    difference = (value.detach().double() - exact.double()).norm().item()
    return difference / max(exact.double().norm().item(), 1e-30) if difference else 0.0
