"""I-JEPA and StoP computed the way the published programs compute them, costs included.

This is the opponent of the benchmarks: plain torch modules, written from a description of the
programs, with their state-dictionary keys. What makes them slow is kept on purpose. Three of the
costs are switches, so that a benchmark can say what each is worth:

- `sdpa=False`: attention builds the softmax matrix (and returns it, unused);
- `repeat_tables=True`: the position table is copied for every image before it is gathered;
- `checkpointing`: attention and MLP of every block are recomputed in the backward. The StoP
  program always does this, the I-JEPA program never. `"full"` recomputes all of both, as torch's
  checkpoint did by default when the program was published; `"early"` is torch's later kind, which
  stops once every saved tensor is back and so spares the last product of each.

The rest is structure: the context is copied once per target block, and every token goes through
every block. An index is expanded to full width as a view, which is the cheaper reading.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NormLayer = Callable[[int], nn.Module]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q, k and v [B, heads, N, d], and what is added to the scores [1, 1, 1, N], if anything."""
Checkpointing = Literal["none", "full", "early"]
layer_norm_1e6 = partial(nn.LayerNorm, eps=1e-6)


def sincos_table(dim: int, height: int, width: int) -> Tensor:
    """Fixed positions [1, height * width, dim]: first half the column, second half the row.

    The angles are formed in double precision, as published; in single precision the last bits of
    the table differ.
    """
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)

    def waves(index: Tensor) -> Tensor:
        angle = index[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    return torch.cat([waves(columns), waves(rows)], dim=1).float()[None]


def gather_tokens(x: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
    """Rows of x [B, N, D] named by each mask [B, K], through an index as wide as x."""
    return [x.gather(1, mask[..., None].expand(-1, -1, x.shape[-1])) for mask in masks]


def as_list(masks: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [masks] if isinstance(masks, Tensor) else list(masks)


def library_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention by torch's own kernels."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    """Self-attention; `bias` keeps keys out that only fill a sequence up, which no program published."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, sdpa: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attend: Attend | None = library_attention if sdpa else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        batch, tokens, dim = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        weights = None
        if self.attend is not None:
            mixed = self.attend(q, k, v, bias)
        else:
            scores = (q @ k.transpose(-2, -1)) * self.scale
            weights = (scores if bias is None else scores + bias).softmax(dim=-1)
            mixed = weights @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim)), weights


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; a checkpoint spans attention or MLP, not the norms or sums."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: NormLayer,
        *,
        qkv_bias: bool,
        sdpa: bool,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, sdpa=sdpa)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        run = nn.Module.__call__
        if self.checkpointing != "none":
            run = partial(checkpoint, use_reentrant=self.checkpointing == "full")
        mixed, _ = run(self.attn, self.norm1(x), bias)
        x = x + mixed
        return x + run(self.mlp, self.norm2(x))


def _initialise(module: nn.Module) -> None:
    """Every weight from a normal of std 0.02 and every bias zero, as training leaves them."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class _PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PublishedEncoder(nn.Module):
    """Vision transformer without a class token; K averages the normalised last K blocks."""

    def __init__(
        self,
        img_size: Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: NormLayer = layer_norm_1e6,
        *,
        sdpa: bool = False,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.patch_embed = _PatchEmbed(img_size[0], patch_size, in_chans, embed_dim)
        side = img_size[0] // patch_size
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, side, side), requires_grad=False)
        costs = {"qkv_bias": qkv_bias, "sdpa": sdpa, "checkpointing": checkpointing}
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, norm_layer, **costs) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        _initialise(self)

    def forward(
        self,
        images: Tensor,
        masks: Tensor | Sequence[Tensor] | None = None,
        K: int = 1,
        bias: Tensor | None = None,
    ) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = torch.cat(gather_tokens(x, as_list(masks)))
        last = []
        for index, block in enumerate(self.blocks):
            x = block(x, bias)
            if index >= len(self.blocks) - K:
                last.append(self.norm(x))
        return torch.stack(last).mean(0) if K > 1 else last[0]


class PublishedPredictor(nn.Module):
    """Predictor of I-JEPA (`apply_stop=None`), of StoP (True), of StoP switched off (False).

    The three differ in the target queries only: mask token + position; position + projected
    noise; position alone. `noise_var` is used as a standard deviation, as published.
    """

    def __init__(
        self,
        num_patches: int = 196,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: NormLayer = layer_norm_1e6,
        apply_stop: bool | None = None,
        noise_var: float = 0.25,
        learned_pos_emb: bool = False,
        *,
        sdpa: bool = False,
        repeat_tables: bool = True,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        width = predictor_embed_dim
        self.apply_stop, self.noise_var = apply_stop, noise_var
        self.repeat_tables = repeat_tables
        self.predictor_embed = nn.Linear(embed_dim, width)
        # StoP's program owns a mask token too and never uses it: it stays in the state dictionary.
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        side = math.isqrt(num_patches)
        table = sincos_table(width, side, side)
        if learned_pos_emb:
            table = torch.randn_like(table) * 0.02
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=learned_pos_emb)
        costs = {"qkv_bias": qkv_bias, "sdpa": sdpa, "checkpointing": checkpointing}
        self.predictor_blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, norm_layer, **costs) for _ in range(depth)
        )
        self.predictor_norm = norm_layer(width)
        self.predictor_proj = nn.Linear(width, embed_dim)
        _initialise(self)

    def forward(
        self,
        x: Tensor,
        masks_x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor],
        noise: Sequence[Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Predict [M * E * B, K_y, embed_dim], ordered target block, context copy, image.

        `noise` replaces the draws: one tensor [E * B, K_y, embed_dim] for each target block,
        already scaled by the standard deviation.
        """
        masks_x, masks = as_list(masks_x), as_list(masks)
        context = self.predictor_embed(x) + torch.cat(self._positions(masks_x))
        queries = self._queries(masks, len(masks_x), noise)
        tokens = torch.cat([context.repeat(len(masks), 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            tokens = block(tokens, bias)
        return self.predictor_proj(self.predictor_norm(tokens)[:, context.shape[1] :])

    def _positions(self, masks: list[Tensor]) -> list[Tensor]:
        if not self.repeat_tables:
            return [self.predictor_pos_embed[0][mask] for mask in masks]
        return gather_tokens(self.predictor_pos_embed.repeat(len(masks[0]), 1, 1), masks)

    def _queries(self, masks: list[Tensor], copies: int, noise: Sequence[Tensor] | None) -> Tensor:
        if not self.apply_stop:
            queries = torch.cat([p.repeat(copies, 1, 1) for p in self._positions(masks)])
            if self.apply_stop is None:
                queries = self.mask_token.repeat(queries.shape[0], queries.shape[1], 1) + queries
            return queries
        rows = []
        for index, mask in enumerate(masks):
            (position,) = self._positions([mask])
            position = position.repeat(copies, 1, 1)
            if noise is None:
                size = (*position.shape[:2], self.predictor_embed.in_features)
                draw = torch.normal(0.0, self.noise_var, size, device=position.device)
            else:
                draw = noise[index]
            rows.append(position + self.predictor_embed(draw))
        return torch.cat(rows)


def published_targets(features: Tensor, masks: Sequence[Tensor], nenc: int) -> Tensor:
    """Target-encoder features [B, N, D], normalised per token without parameters (eps 1e-5).

    Gathered per target block and repeated for each context: the predictor's order.
    """
    normalised = F.layer_norm(features, (features.shape[-1],))
    return torch.cat([kept.repeat(nenc, 1, 1) for kept in gather_tokens(normalised, masks)])


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(prediction, target)


@torch.no_grad()
def published_ema(encoder: nn.Module, target_encoder: nn.Module, momentum: float) -> None:
    """Move the target towards the encoder: one multiplication and one sum for each tensor."""
    pairs = zip(encoder.parameters(), target_encoder.parameters(), strict=True)
    for online, target in pairs:
        target.mul_(momentum).add_((1.0 - momentum) * online)
