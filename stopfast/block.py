"""The pre-norm transformer block that encoder and predictor share, and what both need around it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stopfast.kernels.ops import Ops

NormLayer = Callable[[int], nn.Module]
QkvBias = bool | Literal["qv"]
"""A bias on all of the packed projection, on none of it, or on queries and values (Beyond Masking)."""
Rows = int | Tensor
"""Which tokens of a sequence are wanted: those from a number on, or an int64 index [B, R]."""


class Slots(NamedTuple):
    """Which tokens of a sequence are real, where both of its parts are padded."""

    lengths: Tensor
    """int32 [2] on the tokens' device: real context and target tokens, the same in every sequence."""
    context: int
    """How many of the tokens, the first, are slots of the context; the others are the target's."""

    @classmethod
    def of(cls, lengths: Tensor | None, context: int) -> "Slots | None":
        """Return the slots of padded sequences, None where no lengths say that anything is padding.

        Raises:
            ValueError: lengths that are not int32 [2].
        """
        if lengths is None:
            return None
        if lengths.shape != (2,) or lengths.dtype != torch.int32:
            raise ValueError(
                f"expected lengths as int32 (2,), got {lengths.dtype} {tuple(lengths.shape)}"
            )
        return cls(lengths, context)


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return the wanted tokens of x [B, N, C] as [B, R, C]."""
    if not isinstance(rows, Tensor):
        return x[:, rows:]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def norm_factory(norm_layer: NormLayer | Mapping[str, Any]) -> NormLayer:
    """Accept the keywords of a LayerNorm, as a saved configuration holds them, as well as a factory."""
    return partial(nn.LayerNorm, **norm_layer) if isinstance(norm_layer, Mapping) else norm_layer


def norm_config(norm: nn.Module) -> dict[str, Any] | None:
    """Return the keywords that :func:`norm_factory` rebuilds ``norm`` from, None for other classes."""
    if type(norm) is not nn.LayerNorm:
        return None
    affine = norm.weight is not None
    bias = affine and norm.bias is not None
    return {"eps": norm.eps, "elementwise_affine": affine, "bias": bias}


def require_zero(**rates: float) -> None:
    """Refuse dropout: the published programs accept these rates and every configuration has 0."""
    for name, rate in rates.items():
        if rate:
            raise ValueError(f"expected {name}=0.0, the only rate that is supported, got {rate}")


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(function, dynamic=True)

    def call(*args: object) -> Tensor:
        for each in args:
            if isinstance(each, Tensor):
                # Unmarked, sizes that happen to be equal at first, or equal to some width, are taken
                # to be so for good, and the first step where they are not compiles again.
                torch._dynamo.maybe_mark_dynamic(each, [0, 1])
        return compiled(*args)

    return call


class Attention(nn.Module):
    """Multi-head self-attention with a packed projection (rows q, k, v in that order)."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: QkvBias, qk_scale: float | None, ops: Ops
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"expected a width divisible by {num_heads} heads, got {dim}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.ops = ops
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias is True)
        self.q_bias = self.v_bias = None
        if qkv_bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, slots: Slots | None = None) -> Tensor:
        """All real tokens attend to all real tokens; x [B, N, C] to [B, N, C]."""
        return self.attend(self.pack(x), slots=slots)

    def pack(self, x: Tensor) -> Tensor:
        """The packed projection of x [..., C] to [..., 3 C]."""
        return self.qkv(x) if self.q_bias is None else self._project(x, slice(None))

    def attend(
        self, packed: Tensor, queries: Tensor | None = None, slots: Slots | None = None
    ) -> Tensor:
        """Attention and output projection, of all tokens or of ``queries``; see ``Ops.attention``."""
        lengths, context = slots or (None, 0)
        return self.proj(
            self.ops.attention(packed, self.num_heads, self.scale, queries, lengths, context)
        )

    def forward_rows(self, x: Tensor, rows: Rows, slots: Slots | None = None) -> Tensor:
        """As ``forward(x)`` taken at ``rows``, without queries and projections of the other tokens."""
        width = self.proj.in_features
        q = self._project(take_rows(x, rows), slice(width))
        kv = self._project(x, slice(width, None))
        return self.attend(kv, q, slots)

    def _project(self, x: Tensor, part: slice) -> Tensor:
        """Some rows of the packed projection."""
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return nn.functional.linear(x, self.qkv.weight[part], None if bias is None else bias[part])


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.fc2(self.ops.linear_gelu(x, self.fc1.weight, self.fc1.bias))


class Block(nn.Module):
    """``x += attn(norm1(x)); x += mlp(norm2(x))``, whole or for the tokens that somebody reads.

    With ``checkpointing`` a block's activations are recomputed in backward; nothing in it is random.

    Where ``slots`` say that tokens are padding, these influence no real token, and as long as they are
    finite and nothing reads their outputs they add nothing to any gradient.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        qkv_bias: QkvBias,
        qk_scale: float | None,
        norm_layer: NormLayer,
        ops: Ops,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.ops = ops
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, ops)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), ops)

    def forward(self, x: Tensor, rows: Rows | None = None, slots: Slots | None = None) -> Tensor:
        """x [B, N, C] to [B, N, C], or to the wanted [B, R, C] alone.

        Raises:
            ValueError: wanted rows of padded sequences that are not the target's slots.
        """
        if slots and rows is not None and (isinstance(rows, Tensor) or rows != slots.context):
            raise ValueError("expected the target's slots as the rows of padded sequences")
        return self._run(self._forward, x, rows, slots)

    def forward_shared(
        self, x: Tensor, contexts: int, kept: int, queries_only: bool, slots: Slots | None = None
    ) -> Tensor:
        """The block on sequences that begin with the same contexts, normed and projected once.

        Args:
            x: [M * R, Kx + Ky, C], M times the same R contexts, each time with other queries.
            contexts: R.
            kept: Kx.
            queries_only: whether only the queries' outputs are wanted.
            slots: which tokens are real; its context slots are Kx.

        Returns:
            [M * R, Kx + Ky, C], or [M * R, Ky, C].
        """
        return self._run(self._forward_shared, x, contexts, kept, queries_only, slots)

    def compile_parts(self) -> None:
        """Compile what the block computes, once for any lengths and batches; keys and weights stay."""
        self._forward = _compiled(self._forward)
        self._forward_shared = _compiled(self._forward_shared)

    def _run(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
        return function(*args)

    def _forward(self, x: Tensor, rows: Rows | None, slots: Slots | None) -> Tensor:
        normed = self._normed(self.norm1, x)
        if rows is None:
            return self._add(x, self.attn(normed, slots))
        return self._add(take_rows(x, rows), self.attn.forward_rows(normed, rows, slots))

    def _forward_shared(
        self, x: Tensor, contexts: int, kept: int, queries_only: bool, slots: Slots | None
    ) -> Tensor:
        blocks, width = len(x) // contexts, x.shape[-1]
        queries = x[:, kept:]
        shared = self.attn.pack(self._normed(self.norm1, x[:contexts, :kept]))
        own = self.attn.pack(self._normed(self.norm1, queries))

        def pack(shared: Tensor, own: Tensor) -> Tensor:
            repeated = shared.expand(blocks, *shared.shape)  # a view: only the result is written
            return torch.cat([repeated, own.unflatten(0, (blocks, -1))], dim=2).flatten(0, 1)

        if not queries_only:
            return self._add(x, self.attn.attend(pack(shared, own), slots=slots))
        packed = pack(shared[..., width:], own[..., width:])
        return self._add(queries, self.attn.attend(packed, own[..., :width], slots))

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self._sum_normed(norm, x, None)[1]

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normed = self._sum_normed(self.norm2, x, attended)
        return x + self.mlp(normed)

    def _sum_normed(
        self, norm: nn.Module, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if type(norm) is nn.LayerNorm:
            return self.ops.layer_norm(x, norm.weight, norm.bias, norm.eps, residual)
        total = x if residual is None else x + residual
        return total, norm(total)
