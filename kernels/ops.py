"""Fused or eager is a value: a set of operations that is handed to the modules."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from stopfast.kernels import reference


class Ops(NamedTuple):
    """One implementation of each operation; :mod:`stopfast.kernels.reference` defines what it computes."""

    name: str
    uniform: Callable[..., Tensor]
    positional_noise: Callable[..., Tensor]
    context_tokens: Callable[..., Tensor]
    query_tokens: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    linear_gelu: Callable[..., Tensor]
    target_smooth_l1: Callable[..., Tensor]


EAGER = Ops(
    name="eager",
    uniform=reference.uniform,
    positional_noise=reference.positional_noise,
    context_tokens=reference.context_tokens,
    query_tokens=reference.query_tokens,
    attention=reference.attention,
    linear_gelu=reference.linear_gelu,
    target_smooth_l1=reference.target_smooth_l1,
)


def resolve_ops(ops: Ops | str) -> Ops:
    """Return the operations that ``ops`` names; ``"auto"`` is EAGER on every device as yet.

    Raises:
        ValueError: a name that is neither ``"auto"`` nor ``"eager"``.
    """
    if isinstance(ops, Ops):
        return ops
    if ops in ("auto", "eager"):
        return EAGER
    raise ValueError(f"ops: expected an Ops, 'auto' or 'eager', got {ops!r}")
