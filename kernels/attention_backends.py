"""Attention by other libraries, with the arguments of :func:`stopfast.kernels.reference.attention`."""

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from stopfast.kernels import reference
from stopfast.kernels._measured import attention_entries, measured
from stopfast.kernels.attention import attention as triton_attention
from stopfast.kernels.attention import supports

Attention = Callable[..., Tensor]


def sdpa(packed: Tensor, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401
    """PyTorch's scaled_dot_product_attention, by the best of its backends but cuDNN's.

    That one plans anew, for 0.1 to 1 s, at each new shape, and here lengths change from step to step.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return reference.attention(packed, *arguments, **named)


def _preferring(first: SDPBackend) -> Attention:
    """SDPA by one of its backends, or where that cannot, as flash with padding, by the next."""
    order = [first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def attention(packed: Tensor, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401
        with sdpa_kernel(order, set_priority=True):
            return reference.attention(packed, *arguments, **named)

    return attention


def triton(
    packed: Tensor,
    num_heads: int,
    scale: float,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    context_slots: int = 0,
) -> Tensor:
    """Our kernel, or SDPA for rows longer and heads wider than it takes, with one warning."""
    head_dim = packed.shape[2] // ((3 if queries is None else 2) * num_heads)
    arguments = (packed, num_heads, scale, queries, lengths, context_slots)
    if supports(head_dim, packed.shape[1], torch.float32):
        return triton_attention(*arguments)
    # The same text for every shape, since lengths change from step to step.
    _warn_once("attention of more tokens or wider heads than our kernel takes is computed by SDPA")
    return sdpa(*arguments)


def flex(
    packed: Tensor,
    num_heads: int,
    scale: float,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    context_slots: int = 0,
) -> Tensor:
    """PyTorch's flex_attention, compiled where that is faster than not: on a GPU."""
    q, k, v, valid = _operands(packed, num_heads, queries, lengths, context_slots)

    def masked(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        assert valid is not None
        return torch.where(valid[0][key], score, -torch.inf)

    function = (
        _compiled_flex() if packed.is_cuda and not torch.compiler.is_compiling() else flex_attention
    )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: Any = function(q, k, v, score_mod=None if valid is None else masked, scale=scale)
    out = out.transpose(1, 2)
    return (out if valid is None else torch.where(valid[1][:, None, None], out, 0)).flatten(2)


def xformers(
    packed: Tensor,
    num_heads: int,
    scale: float,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    context_slots: int = 0,
) -> Tensor:
    """The memory_efficient_attention of xformers; it takes no half-empty rows, so padding is a bias."""
    function = import_module("xformers.ops").memory_efficient_attention
    q, k, v, valid = _operands(packed, num_heads, queries, lengths, context_slots)
    bias = None
    if valid is not None:
        tokens = k.shape[1]
        row = q.new_zeros(-(-tokens // 8) * 8)[:tokens]  # it wants rows of memory in eights
        row = row.masked_fill_(~valid[0], -torch.inf)
        bias = row.expand(q.shape[0], num_heads, q.shape[1], tokens)
    out = function(q, k, v, attn_bias=bias, scale=scale)
    return (out if valid is None else torch.where(valid[1][:, None, None], out, 0)).flatten(2)


def auto(packed: Tensor, num_heads: int, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401
    """What the shipped table says for this GPU, head dim and length; SDPA where it says nothing."""
    if not packed.is_cuda:
        return reference.attention(packed, num_heads, *arguments, **named)
    queries = arguments[1] if len(arguments) > 1 else named.get("queries")
    head_dim = packed.shape[2] // ((3 if queries is None else 2) * num_heads)
    lengths = arguments[2] if len(arguments) > 2 else named.get("lengths")
    chosen = _choose(packed.device.index, head_dim, packed.shape[1], lengths is not None)
    return chosen(packed, num_heads, *arguments, **named)


_NAMED: dict[str, Attention] = {
    "auto": auto,
    "triton": triton,
    "sdpa": sdpa,
    "flex": flex,
    "xformers": xformers,
    "flash": _preferring(SDPBackend.FLASH_ATTENTION),
    "efficient": _preferring(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _preferring(SDPBackend.CUDNN_ATTENTION),
}


def attention_backend(name: str) -> Attention:
    """Return the attention of a name.

    Raises:
        ValueError: an unknown name, or a library that is not there.
    """
    if name not in _NAMED:
        raise ValueError(f"attention: expected one of {list(_NAMED)}, got {name!r}")
    if name == "xformers" and (problem := _xformers_problem()):
        raise ValueError(
            f"attention: expected xformers to be installed for 'xformers', got {problem}; "
            "pip install 'stopfast[xformers]', whose build must be for torch's CUDA"
        )
    return _NAMED[name]


def _xformers_problem() -> str | None:
    try:
        import_module("xformers.ops").memory_efficient_attention  # noqa: B018
    except Exception as error:  # a binary for another CUDA raises whatever its loader does
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _choose(device: int | None, head_dim: int, tokens: int, padded: bool = False) -> Attention:
    for most, name in _entries(device, head_dim, padded):
        if tokens <= most:
            return _NAMED[name]
    return sdpa


@torch.compiler.assume_constant_result
def _entries(device: int | None, head_dim: int, padded: bool) -> tuple[tuple[int, str], ...]:
    """The table's, without the tokens: as part of the constant they would compile anew at each length."""
    entries = attention_entries(measured(torch.cuda.get_device_name(device)), head_dim, padded)
    if any(name == "xformers" for _, name in entries) and (problem := _xformers_problem()):
        _warn_once(f"attention is computed by SDPA, since xformers is not there ({problem})")
        return tuple((most, "sdpa" if name == "xformers" else name) for most, name in entries)
    return entries


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    """Under torch.compile, while it traces."""
    _warn_now(message)


@functools.cache
def _warn_now(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@functools.cache
def _compiled_flex() -> Any:  # noqa: ANN401
    return torch.compile(flex_attention, dynamic=True)


def _operands(
    packed: Tensor,
    num_heads: int,
    queries: Tensor | None,
    lengths: Tensor | None,
    context_slots: int,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries, keys and values [B, N, H, d], and which keys and which rows are real."""
    q, k, v = packed.chunk(3, dim=-1) if queries is None else (queries, *packed.chunk(2, dim=-1))
    device = packed.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))
    if lengths is None:
        return q, k, v, None
    target = reference.real_slots(k.shape[1] - context_slots, lengths[1])
    keys = torch.cat([reference.real_slots(context_slots, lengths[0]), target])
    rows = keys if queries is None else target
    # Padding may hold anything, NaN too, which a weight of zero would let through.
    q = torch.where(rows[:, None, None], q, 0)
    k, v = (torch.where(keys[:, None, None], t, 0) for t in (k, v))
    return q, k, v, (keys, rows)
