"""The optimiser's bf16 copies in the place of the weights that autocast would cast in every step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stopfast.flat_adamw import FlatAdamW


class _Place(NamedTuple):
    module: nn.Module
    name: str
    own: nn.Parameter
    copy: nn.Parameter


class ComputeCopies:
    """Lets the linear and convolution layers of modules compute with copies of their weights.

    These are the weights that autocast casts, so the numbers are those of autocast. Where a weight is read
    twice other than as it is, such as in two slices that overlap, two gradients are summed in the copies'
    dtype that autocast would sum in fp32. Everything else of the modules, such as norms and positions,
    stays. So does what a module lists in ``read_in_fp32``: the names, counted from it, of parameters that
    it also reads by another way than their layer. Outside :meth:`stand_in` the modules are as they were.

    Args:
        modules: of which the layers are taken, at any depth.
        optimizer: what keeps the copies. A weight of which it keeps none stays.

    Raises:
        ValueError: an optimiser that keeps no copies.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizer: FlatAdamW) -> None:
        kept = optimizer.copies()
        if not kept:
            raise ValueError("expected an optimiser that keeps copies, got one without")
        parts = list(dict.fromkeys(part for root in modules for part in root.modules()))
        wide: set[Tensor] = set()
        for part in parts:
            names = getattr(part, "read_in_fp32", ())
            wide |= {own for name, own in part.named_parameters() if name in names}
        # One for each weight, however many layers it is tied to.
        self._copies: dict[Tensor, nn.Parameter] = {}
        self._places: list[_Place] = []
        for layer in parts:
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            for name, own in layer._parameters.items():
                if own is None or own in wide or own not in kept:
                    continue
                if own not in self._copies:
                    self._copies[own] = nn.Parameter(kept[own], own.requires_grad)
                self._places.append(_Place(layer, name, own, self._copies[own]))

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Compute with the copies inside: forward, backward, and what backward computes again."""
        for module, name, _, copy in self._places:
            module._parameters[name] = copy
        try:
            yield
        finally:
            for module, name, own, _ in self._places:
                module._parameters[name] = own

    def gradients(self) -> dict[Tensor, Tensor]:
        """Hand over the copies' gradients, by the parameters they belong to.

        A parameter that has one of its own besides, as one that is also read in fp32, gets the sum of both.
        """
        found = {own: copy.grad for own, copy in self._copies.items() if copy.grad is not None}
        both = {own: gradient for own, gradient in found.items() if own.grad is not None}
        _add(both)
        self._forget()
        return {own: gradient for own, gradient in found.items() if own not in both}

    def settle(self) -> None:
        """Add the copies' gradients to the ``grad`` of their parameters, in fp32."""
        _add({own: copy.grad for own, copy in self._copies.items() if copy.grad is not None})
        self._forget()

    def _forget(self) -> None:
        for copy in self._copies.values():
            copy.grad = None


@torch.no_grad()
def _add(gradients: dict[Tensor, Tensor]) -> None:
    """Add to the parameters' own gradients."""
    wide = [torch.empty_like(parameter) for parameter in gradients]
    if not wide:
        return
    torch._foreach_copy_(wide, list(gradients.values()))  # type: ignore[attr-defined]
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter, gradient in zip(gradients, wide, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            sums[0].append(parameter.grad)
            sums[1].append(gradient)
    if sums[0]:
        torch._foreach_add_(*sums)  # type: ignore[attr-defined]
