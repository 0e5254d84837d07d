"""Running one operation of a case: copies of its arguments, its results and all its gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stopfast.kernels.cases import Case
from stopfast.kernels.ops import Ops


class Run(NamedTuple):
    """What an operation left: its results, then its gradients by the place of their argument."""

    results: list[Tensor]
    gradients: list[Tensor | None]


def tensors(tree: object) -> list[Tensor]:
    """Every tensor in nested arguments or results."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def copied(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same arguments in memory of their own, floating ones in ``dtype``; strides stay as they are.

    A tensor that stands in two places stays one tensor.
    """
    made: dict[int, Tensor] = {}

    def copy(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            wanted = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
            fresh = torch.empty_strided(leaf.shape, leaf.stride(), dtype=wanted, device=leaf.device)
            if 0 in leaf.stride():
                fresh = leaf.detach().to(wanted)
            else:
                fresh.copy_(leaf.detach())
            made[id(leaf)] = fresh.requires_grad_(leaf.requires_grad)
        return made[id(leaf)]

    return pytree.tree_map(copy, arguments)


def run(
    ops: Ops, case: Case, arguments: dict[str, Any], gradients: list[Tensor] | None = None
) -> Run:
    """Call the operation and go back through it; the incoming gradients are drawn if not given."""
    returned = getattr(ops, case.name)(**arguments)
    results = tensors(arguments) if case.in_place else tensors(returned)
    wanted = [t for t in unique(tensors(arguments)) if t.requires_grad]
    outputs = [r for r in results if r.requires_grad and r.grad_fn is not None]
    if not outputs:
        return Run([r.detach() for r in results], [])
    if gradients is None:
        gradients = incoming(outputs)
    gradients = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    return Run([r.detach() for r in results], list(found))


def incoming(outputs: list[Tensor]) -> list[Tensor]:
    """The same random gradients for results of the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]


def unique(found: list[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(t): t for t in found}.values())
