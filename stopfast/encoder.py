"""The vision transformer of all objectives: fixed positions, maskable input, a class token if wanted."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stopfast.block import (
    Block,
    NormLayer,
    QkvBias,
    Slots,
    norm_config,
    norm_factory,
    require_zero,
    take_rows,
)
from stopfast.hub import HubMixin
from stopfast.initial import Scheme, init_weights, token
from stopfast.kernels.ops import Ops, resolve_ops
from stopfast.pos_embed import Grid, Positions, interpolate_pos_embed, position_table

Masks = Tensor | Sequence[Tensor]


def as_list(masks: Masks) -> list[Tensor]:
    """Return the masks as a list; a single index tensor is a list of one."""
    return [masks] if isinstance(masks, Tensor) else list(masks)


def image_grid(img_size: int | Sequence[int], patch_size: int) -> Grid:
    """Return (rows, columns) of patches of an image size: a number, [side], or [height, width].

    Raises:
        ValueError: a side that is not a multiple of the patch.
    """
    sides = [img_size] if isinstance(img_size, int) else list(img_size)
    height, width = sides * 2 if len(sides) == 1 else sides
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"expected image sides that are multiples of the patch size {patch_size}, "
            f"got {height}x{width}"
        )
    return height // patch_size, width // patch_size


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches in raster order, of all of them or of the wanted ones.

    An embedding of one channel (Beyond Masking's de-colorized images) takes the mean of three: what it
    was trained on is a sum with random weights of that mean.
    """

    def __init__(self, grid: Grid, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_patches = grid[0] * grid[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def image_grid(self, images: Tensor) -> Grid:
        """Return the grid of a batch [B, C, H, W].

        Raises:
            ValueError: not a batch of images with this embedding's channels and patches.
        """
        if images.ndim != 4 or images.shape[1] not in (self.in_chans, 3 * (self.in_chans == 1)):
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got {tuple(images.shape)}"
            )
        return image_grid(images.shape[2:], self.patch_size)

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """images [B, C, H, W] to [B, N, D]; with an index [B, K], that of those patches, [B, K, D]."""
        size = self.patch_size
        if self.in_chans == 1:
            images = images.mean(1, keepdim=True)
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # B, rows, columns, C, p, p: a view
        if index is None:
            patches = patches.flatten(3).flatten(1, 2)
        else:
            image = torch.arange(len(images), device=index.device)[:, None]
            columns = patches.shape[2]
            patches = patches[image, index // columns, index % columns].flatten(2)
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module, HubMixin):
    """Encoder with the arguments, call and state_dict of the published I-JEPA and StoP encoders.

    ``predictor_embed_dim`` and ``predictor_depth`` are accepted and unused, as published. Beyond the
    published arguments: ``img_size`` may be ``[height, width]``; ``init_rescale`` keeps the division
    of the residual projections by sqrt(2 l) that the published training scripts undo;
    ``class_token`` puts a learned token before the patches, whose position is zero (MAE, DropPos);
    ``positions`` and ``init`` are those of the published programs of other objectives; ``qkv_bias="qv"``
    leaves keys without a bias (Beyond Masking); ``checkpointing`` recomputes each block in backward;
    ``skip_unused=False`` computes what nothing reads (gradients are the same); ``ops`` chooses the
    implementation of the operations.

    Raises:
        ValueError: a dropout rate other than 0, or sizes that do not divide.
    """

    pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int | Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 12,
        predictor_depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: QkvBias = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer | Mapping[str, Any] = nn.LayerNorm,
        init_std: float = 0.02,
        *,
        class_token: bool = False,
        positions: Positions = "2d",
        init: Scheme = "normal",
        init_rescale: bool = False,
        checkpointing: bool = False,
        skip_unused: bool = True,
        ops: Ops | str = "auto",
    ) -> None:
        super().__init__()
        require_zero(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        )
        if depth < 1:
            raise ValueError(f"expected depth >= 1, got {depth}")
        norm = norm_factory(norm_layer)
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.skip_unused = skip_unused
        grid = image_grid(img_size, patch_size)
        self.patch_embed = PatchEmbed(grid, patch_size, in_chans, embed_dim)
        table = position_table(embed_dim, grid, positions, class_token)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.cls_token = token(embed_dim, init_std, init) if class_token else None
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                norm_layer=norm,
                ops=resolve_ops(ops),
                checkpointing=checkpointing,
            )
            for _ in range(depth)
        )
        self.norm = norm(embed_dim)
        init_weights(self, self.blocks, init_std, init_rescale, init)
        self._remember(norm_layer=norm_config(self.norm))

    def forward(
        self,
        images: Tensor,
        masks: Masks | None = None,
        K: int = 1,
        *,
        rows: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Encode images, or the patches of each mask.

        Args:
            images: [B, C, H, W]; another size than the model's takes interpolated positions.
            masks: E index tensors int64 [B, Kx] (or one), or None for all N patches.
            K: average the normed outputs of the last K blocks (the published StoP's argument).
            rows: int64 [B or E * B, R]; only these tokens of the result are wanted, and the last
                block computes no others.
            lengths: int32 [2] on the device; only the first ``lengths[0]`` tokens of each mask are real,
                as :func:`stopfast.buckets.pad_to_bucket` leaves them. The others, whose index has to
                name some patch, influence nothing, and what is returned for them is to be ignored.

        Returns:
            [B, N, D], or [E * B, Kx, D] in the order (mask, image); R tokens with ``rows``. A class token
            is left out: :meth:`tokens` has it.

        Raises:
            ValueError: images of another shape, a K outside 1..depth, or lengths without masks or
                with ``rows``; with a class token, lengths or ``rows``.
        """
        if not 1 <= K <= len(self.blocks):
            raise ValueError(f"expected K in 1..{len(self.blocks)}, got {K}")
        if lengths is not None and (masks is None or rows is not None):
            raise ValueError("expected lengths with masks, and without rows")
        if self.cls_token is not None and (lengths is not None or rows is not None):
            raise ValueError("expected an encoder without a class token with lengths or rows")
        x = self._embed(images, None if masks is None else as_list(masks), None)
        slots = Slots.of(lengths, x.shape[1])
        outputs = []
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)
            wanted = rows if last and self.skip_unused else None
            x = block(x, wanted, slots)
            if number > len(self.blocks) - K:
                taken = x if rows is None or wanted is not None else take_rows(x, rows)
                outputs.append(self.norm(taken))
        result = outputs[0] if K == 1 else torch.stack(outputs).mean(0)
        return result if self.cls_token is None else result[:, 1:]

    def tokens(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Encode images, or some patches of them, class token included.

        Args:
            images: [B, C, H, W].
            mask: int64 [B, Kx], the patches, in any order; None for all N.
            positions: [B, Kx, D], what is added to these patches instead of their rows of the table.
            rows: int64 [B, R]; only these tokens of the result are wanted, and the last block computes
                no others.

        Returns:
            [B, Kx, D], the last block's normed output; with a class token [B, 1 + Kx, D], its own first;
            [B, R, D] with ``rows``.

        Raises:
            ValueError: images of another shape.
        """
        x = self._embed(images, None if mask is None else [mask], positions)
        *others, last = self.blocks
        for block in others:
            x = block(x)
        if rows is None or self.skip_unused:
            return self.norm(last(x, rows))
        return self.norm(take_rows(last(x), rows))

    def patch_positions(self) -> Tensor:
        """The position table of the patches, [N, D]."""
        return self.pos_embed[0, int(self.cls_token is not None) :]

    def _embed(
        self, images: Tensor, masks: list[Tensor] | None, positions: Tensor | None
    ) -> Tensor:
        grid = self.patch_embed.image_grid(images)
        table = interpolate_pos_embed(self.patch_positions(), self.patch_embed.grid, grid)
        if masks is None:
            x = self.patch_embed(images) + (table if positions is None else positions)
        else:
            if self.skip_unused:
                patches = [self.patch_embed(images, mask) for mask in masks]
            else:
                whole = self.patch_embed(images)
                patches = [take_rows(whole, mask) for mask in masks]
            x = torch.cat(patches) + (table[torch.cat(masks)] if positions is None else positions)
        if self.cls_token is None:
            return x
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
