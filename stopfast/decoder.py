"""The decoder of DropPos: from the features of visible patches to their positions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stopfast.block import Block, NormLayer, QkvBias, norm_factory
from stopfast.initial import Scheme, init_weights, token
from stopfast.kernels.ops import Ops, resolve_ops


class PositionDecoder(nn.Module):
    """A narrow transformer without positions, which are what it tells (DropPos, Wang et al., 2023).

    Args:
        num_patches: L, positions to choose from.
        embed_dim: width of the features.
        decoder_embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of its blocks.
        class_token: whether the first token is a class token, of which no position is told.
        learned_token: whether the token that stands in for a dropped position, which the encoder gets, is
            trained.
        init, init_rescale, checkpointing, ops: as in the encoder.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        num_patches: int,
        embed_dim: int,
        decoder_embed_dim: int = 512,
        depth: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: QkvBias = True,
        norm_layer: NormLayer | Mapping[str, Any] = nn.LayerNorm,
        *,
        class_token: bool = True,
        learned_token: bool = True,
        init: Scheme = "xavier",
        init_rescale: bool = False,
        checkpointing: bool = False,
        ops: Ops | str = "auto",
    ) -> None:
        super().__init__()
        norm = norm_factory(norm_layer)
        self.class_token = class_token
        self.mask_pos_token = token(embed_dim, scheme=init).requires_grad_(learned_token)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(
                decoder_embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=None,
                norm_layer=norm,
                ops=resolve_ops(ops),
                checkpointing=checkpointing,
            )
            for _ in range(depth)
        )
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, num_patches)
        init_weights(self, self.decoder_blocks, rescale=init_rescale, scheme=init)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tell positions.

        Args:
            x: [B, V, D] features, or [B, 1 + V, D] with a class token.
            noise: [B, V, D] that is added to the patches' features before the projection, so that it
                shares the projection's weights as StoP's does; zero where there is none.

        Returns:
            [B, V, L] logits.
        """
        first = int(self.class_token)
        if noise is not None:
            x = (x + nn.functional.pad(noise, (0, 0, first, 0))).to(x.dtype)
        x = self.decoder_embed(x)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, first:]))
