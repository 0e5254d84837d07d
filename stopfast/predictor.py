"""From features of a context to queried positions: I-JEPA's and StoP's predictor, MAE's decoder."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

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
)
from stopfast.encoder import Masks, as_list
from stopfast.hub import HubMixin
from stopfast.initial import Scheme, init_weights, token
from stopfast.kernels.ops import Noise, Ops, Places, positional_noise, resolve_ops
from stopfast.pos_embed import (
    Grid,
    Positions,
    interpolate_pos_embed,
    position_table,
    square_grid,
)

Variant = Literal["ijepa", "stop", "stop_off", "stop_paper"]
ApplyTo = Literal["masked", "context", "both"]
Covariance = Literal["learned", "fixed"]
NoiseDim = Literal["encoder", "predictor"]

_VARIANT_OF: dict[bool | None, Variant] = {None: "ijepa", True: "stop", False: "stop_off"}


def _choose(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"expected {name} in {get_args(choices)}, got {value!r}")


class Predictor(nn.Module, HubMixin):
    """Predictor with the arguments, call and state_dict of the published programs.

    ``apply_stop=None`` is I-JEPA (query = mask token + position), True is StoP (position + noise through
    the shared ``predictor_embed``, bias included), False is the published StoP program with StoP off
    (position alone). The same state_dict fits all three; ``mask_token`` is trainable only where used.

    Beyond the published arguments:

    * ``variant="stop_paper"``: the paper's own form (Eq. 1-6): explicit mask token, no bias, and
      ``noise_var`` as the variance. The published program uses ``noise_var`` as the standard deviation.
    * ``apply_to``: which tokens are noisy. Noise on context tokens is one draw for all target blocks.
    * ``cov``: ``"learned"`` projects the noise, ``"fixed"`` adds it to the position as it is.
    * ``noise_dim``: width the noise is drawn in, of the encoder or of the predictor. The tied learned
      covariance needs the encoder's and is the default; the fixed one needs the predictor's.
    * ``tie=False``: the noise gets a projection of its own, ``noise_embed``, beside ``predictor_embed``.
    * ``grid_size``: (rows, columns) where the image is not square.
    * ``out_dim``: width of the predictions, the encoder's by default; as the decoder of MAE and Beyond
      Masking, the numbers of a patch. ``class_token``, ``positions``, ``init`` as in the encoder; with
      a class token, ``x`` begins with it, and no noise is added to it, which has no position.
      ``embed_bias=False`` projects without a bias.
    * ``init_rescale``, ``checkpointing``, ``skip_unused``, ``ops``: as in the encoder.

    Raises:
        ValueError: a dropout rate other than 0, sizes that do not divide, or switches that exclude
            each other.
    """

    predictor_pos_embed: nn.Parameter
    mask_token: nn.Parameter
    read_in_fp32 = ("predictor_embed.bias",)
    """Added to queries as it is, besides the cast of it that autocast adds to the context: see
    :class:`stopfast.step.copies.ComputeCopies`."""

    def __init__(
        self,
        num_patches: int,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: QkvBias = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer | Mapping[str, Any] = nn.LayerNorm,
        init_std: float = 0.02,
        apply_stop: bool | None = None,
        noise_var: float = 0.25,
        learned_pos_emb: bool = False,
        *,
        variant: Variant | None = None,
        apply_to: ApplyTo = "masked",
        cov: Covariance = "learned",
        noise_dim: NoiseDim | None = None,
        tie: bool = True,
        grid_size: Grid | None = None,
        out_dim: int | None = None,
        class_token: bool = False,
        positions: Positions = "2d",
        embed_bias: bool = True,
        init: Scheme = "normal",
        include_mask_token: bool | None = None,  # accepted and unused, as published
        init_rescale: bool = False,
        checkpointing: bool = False,
        skip_unused: bool = True,
        ops: Ops | str = "auto",
    ) -> None:
        super().__init__()
        require_zero(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        )
        self.variant = _resolve_variant(variant, apply_stop)
        stochastic = self.variant in ("stop", "stop_paper")
        noise_dim = _resolve_noise_dim(noise_dim, cov, tie)
        _choose("apply_to", apply_to, ApplyTo)
        if noise_var < 0:
            raise ValueError(f"expected noise_var >= 0, got {noise_var}")
        self.noise_std = noise_var**0.5 if self.variant == "stop_paper" else noise_var
        self.noise_channels = embed_dim if noise_dim == "encoder" else predictor_embed_dim
        self.noisy_queries = stochastic and apply_to != "context"
        self.noisy_context = stochastic and apply_to != "masked"
        self.cov = cov

        norm = norm_factory(norm_layer)
        self.embed_dim = embed_dim
        rows, columns = square_grid(num_patches) if grid_size is None else grid_size
        self.grid_size: Grid = (rows, columns)
        if self.grid_size[0] * self.grid_size[1] != num_patches:
            raise ValueError(f"expected a grid of {num_patches} patches, got {self.grid_size}")
        self.skip_unused = skip_unused
        self.ops = resolve_ops(ops)

        self.predictor_embed = nn.Linear(
            embed_dim, predictor_embed_dim, bias=embed_bias and self.variant != "stop_paper"
        )
        # A parameter that nothing reads must not be trainable: DDP would wait for its gradient.
        self.mask_token = token(predictor_embed_dim, init_std, init)
        self.mask_token.requires_grad_(self.variant in ("ijepa", "stop_paper"))
        self.class_token = class_token
        table = position_table(predictor_embed_dim, self.grid_size, positions, class_token)
        if learned_pos_emb:
            table = torch.randn_like(table) * 0.02
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=learned_pos_emb)
        self.noise_embed = None
        if stochastic and cov == "learned" and not tie:
            self.noise_embed = nn.Linear(self.noise_channels, predictor_embed_dim, bias=False)
        self.predictor_blocks = nn.ModuleList(
            Block(
                predictor_embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                norm_layer=norm,
                ops=self.ops,
                checkpointing=checkpointing,
            )
            for _ in range(depth)
        )
        self.predictor_norm = norm(predictor_embed_dim)
        self.predictor_proj = nn.Linear(predictor_embed_dim, out_dim or embed_dim)
        # The published Beyond Masking leaves this one layer at torch's default.
        self.predictor_embed.keeps_default = init == "truncated"  # type: ignore[assignment]
        init_weights(self, self.predictor_blocks, init_std, init_rescale, init)
        self._remember(norm_layer=norm_config(self.predictor_norm))

    def forward(
        self,
        x: Tensor,
        masks_x: Masks,
        masks: Masks,
        *,
        noise: Sequence[Tensor] | None = None,
        noise_context: Tensor | None = None,
        seed: Tensor | int | None = None,
        sample_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        whole: bool = False,
    ) -> Tensor:
        """Predict the features at each target mask from each context.

        Args:
            x: [E * B, Kx, D] context features in the order (context mask, image); [E * B, 1 + Kx, D] with
                a class token, which comes first.
            masks_x: E context index tensors int64 [B, Kx], or one.
            masks: M target index tensors int64 [B, Ky], or one.
            noise: explicit draws for the queries, one [E * B, Ky, noise channels] for each target mask,
                already scaled by the standard deviation.
            noise_context: explicit draws for the context's patches, [E * B, Kx, noise channels], scaled.
            seed: int64 [2] (seed, step) or a seed alone (step 0); a tensor on x's device under CUDA graph
                capture, so that each replay can have its own step; None draws one from torch's
                generator of x's device: where activations are recomputed without torch's generator
                (``preserve_rng_state=False``, ``activation_memory_budget``), that would be another
                draw in the recomputation, so give a seed there. Noise follows
                :func:`stopfast.kernels.noise.positional_noise`.
            sample_ids: int64 [B], each image's position in the step's global batch; default 0..B-1.
            lengths: int32 [2] on the device, how many context and target tokens of each mask are real;
                see :func:`stopfast.buckets.pad_to_bucket`. The others may be anything in ``x``; they
                influence nothing, and what is predicted for them is to be ignored. Noise is the same
                as without them; explicit draws have a row for them too.
            whole: return the predictions of the context as well, before those of the queries.

        Returns:
            [M * E * B, Ky, D] in the order (target mask, context mask, image); [M * E * B, Kx + Ky, D] with
            ``whole``. A class token is left out.

        Raises:
            ValueError: shapes that do not fit each other, draws for tokens that take no noise, or lengths
                with a class token.
        """
        masks_x, masks = as_list(masks_x), as_list(masks)
        if lengths is not None and self.class_token:
            raise ValueError("expected a predictor without a class token with lengths")
        first = int(self.class_token)
        self._check(x, masks_x, masks, first)
        index, context = torch.stack(masks) + first, torch.cat(masks_x)
        if first:  # row 0 of the table is the class token's
            context = nn.functional.pad(context + 1, (1, 0))
        draws = self._noise(x, index, noise, noise_context, seed, sample_ids)
        weight, bias = self.predictor_embed.weight, self.predictor_embed.bias
        # What stands in for the missing content of a query: in published StoP the projection's bias.
        offset = {"stop": bias, "stop_off": None}.get(self.variant, self.mask_token.view(-1))
        slots = Slots.of(lengths, x.shape[1])
        places = Places(context, index, lengths)
        tokens = self.ops.predictor_tokens(
            x, places, weight, bias, self.predictor_pos_embed[0], offset, draws
        )
        predicted = self._predict(tokens, len(x), x.shape[1], slots, whole)
        return self.predictor_proj(
            self.predictor_norm(predicted[:, first:] if whole else predicted)
        )

    def _noise(
        self,
        x: Tensor,
        index: Tensor,
        queries: Sequence[Tensor] | None,
        context: Tensor | None,
        seed: Tensor | int | None,
        sample_ids: Tensor | None,
    ) -> Noise | None:
        """What is added to which tokens: explicit draws, or what the operation draws."""
        first, (blocks, batch, tokens) = int(self.class_token), index.shape
        given = self._explicit("noise", queries, self.noisy_queries, (blocks, len(x), tokens))
        added = self._explicit(
            "noise_context", context, self.noisy_context, (len(x), x.shape[1] - first)
        )
        if not (self.noisy_queries or self.noisy_context):
            return None
        ids = None
        if (self.noisy_queries and given is None) or (self.noisy_context and added is None):
            seed = self._seed(seed, x.device)
            ids = torch.arange(batch, device=x.device) if sample_ids is None else sample_ids
            if ids.shape != (batch,):
                raise ValueError(
                    f"expected sample_ids ({batch},), one for each image, got {tuple(ids.shape)}"
                )
        drawn = seed if isinstance(seed, Tensor) and ids is not None else None
        if first and self.noisy_context:  # the operation would draw for the class token too
            if added is None:
                assert drawn is not None and ids is not None
                added = self._patch_noise(drawn, ids, len(x) // max(1, batch), x.shape[1] - first)
            added = nn.functional.pad(added, (0, 0, first, 0))
        own = self.predictor_embed if self.noise_embed is None else self.noise_embed
        return Noise(
            seed=drawn,
            sample_ids=ids,
            std=self.noise_std,
            weight=own.weight if self.cov == "learned" else None,
            on_queries=self.noisy_queries,
            on_context=self.noisy_context,
            queries=given,
            context=added,
        )

    def _patch_noise(self, seed: Tensor, sample_ids: Tensor, copies: int, tokens: int) -> Tensor:
        """The context's draws, scaled, [copies * B, tokens, noise channels]."""
        dtype = self.predictor_pos_embed.dtype
        wide = torch.promote_types(torch.float32, dtype)
        normals = positional_noise(
            seed, sample_ids, 1, copies, tokens, self.noise_channels, True, wide
        )[0]
        return (normals * self.noise_std).to(dtype)

    def resize_positions(self, grid: Grid) -> None:
        """Replace the position table by one for another grid, interpolated from it.

        The parameter is a new one: an optimiser that holds learned positions has to be made after this.
        """
        first, patches = self.predictor_pos_embed.data.split(
            [int(self.class_token), self.grid_size[0] * self.grid_size[1]], dim=1
        )
        table = torch.cat([first, interpolate_pos_embed(patches, self.grid_size, grid)], dim=1)
        self.predictor_pos_embed = nn.Parameter(
            table, requires_grad=self.predictor_pos_embed.requires_grad
        )
        self.grid_size = grid
        self._remember(grid_size=grid, num_patches=grid[0] * grid[1])

    def _check(self, x: Tensor, masks_x: list[Tensor], masks: list[Tensor], first: int) -> None:
        shapes_x, shapes = [tuple(m.shape) for m in masks_x], [tuple(m.shape) for m in masks]
        for name, got in (("masks_x", shapes_x), ("masks", shapes)):
            # Compared one by one: a set would hash the lengths, and a compiler then fixes them.
            if not got or len(got[0]) != 2 or any(shape != got[0] for shape in got):
                raise ValueError(f"expected {name} of one shape (B, K), got {got}")
        batch, kept = shapes_x[0]
        expected = (len(masks_x) * batch, first + kept, self.embed_dim)
        if tuple(x.shape) != expected or shapes[0][0] != batch:
            raise ValueError(
                f"expected x {expected} and target masks of {batch} images for context masks "
                f"{shapes_x}, got x {tuple(x.shape)} and masks {shapes}"
            )

    def _explicit(
        self,
        name: str,
        draws: Sequence[Tensor] | Tensor | None,
        noisy: bool,
        shape: Sequence[int],
    ) -> Tensor | None:
        if draws is None:
            return None
        if not noisy:
            raise ValueError(f"expected no {name}: variant {self.variant!r} has no noise there")
        expected = (*shape, self.noise_channels)
        got = draws if isinstance(draws, Tensor) else torch.stack(list(draws))
        if tuple(got.shape) != expected:
            raise ValueError(f"expected {name} {expected}, got {tuple(got.shape)}")
        return got

    @staticmethod
    def _seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
        if seed is None:
            high = torch.iinfo(torch.int64).max
            drawn = torch.randint(0, high, (1,), device=device)
            return torch.cat([drawn, torch.zeros_like(drawn)])
        if isinstance(seed, int):
            return torch.tensor([seed, 0], dtype=torch.int64, device=device)
        return seed.to(device)

    def _predict(
        self, x: Tensor, contexts: int, kept: int, slots: Slots | None, whole: bool
    ) -> Tensor:
        """Run the blocks on the sequences of every target mask; return the queries' rows, or all."""
        depth = len(self.predictor_blocks)
        if whole:
            for block in self.predictor_blocks:
                x = block(x, slots=slots)
            return x
        if depth == 0:
            return x[:, kept:]
        first, *others = self.predictor_blocks
        assert isinstance(first, Block)
        if not self.skip_unused:
            for block in self.predictor_blocks:
                x = block(x, slots=slots)
            return x[:, kept:]
        if len(x) == contexts:  # nothing is shared
            x = first(x, kept if depth == 1 else None, slots)
        else:
            x = first.forward_shared(x, contexts, kept, depth == 1, slots)
        for number, block in enumerate(others, start=2):
            x = block(x, kept if number == depth else None, slots)
        return x


def _resolve_variant(variant: Variant | None, apply_stop: bool | None) -> Variant:
    if variant is None:
        return _VARIANT_OF[apply_stop]
    _choose("variant", variant, Variant)
    implied = {"stop_paper": True}.get(variant, {v: k for k, v in _VARIANT_OF.items()}.get(variant))
    if apply_stop is not None and apply_stop != implied:
        raise ValueError(
            f"expected apply_stop={implied} with variant {variant!r}, got {apply_stop}"
        )
    return variant


def _resolve_noise_dim(noise_dim: NoiseDim | None, cov: Covariance, tie: bool) -> NoiseDim:
    _choose("cov", cov, Covariance)
    needed = {"fixed": "predictor"}.get(cov, "encoder" if tie else None)
    if noise_dim is None:
        return needed or "encoder"  # type: ignore[return-value]
    _choose("noise_dim", noise_dim, NoiseDim)
    if needed not in (None, noise_dim):
        raise ValueError(
            f"expected noise_dim={needed!r} with cov={cov!r} and tie={tie}, got {noise_dim!r}"
        )
    return noise_dim
