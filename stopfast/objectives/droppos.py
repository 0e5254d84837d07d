"""DropPos: tell where the visible patches belong whose positions were dropped."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stopfast.config import DropPosConfig, NoiseConfig, Transforms
from stopfast.decoder import PositionDecoder
from stopfast.encoder import VisionTransformer
from stopfast.kernels.ops import (
    Ops,
    PatchTarget,
    Smoothing,
    position_map,
    positional_noise,
    resolve_ops,
)
from stopfast.optim import OptimizerRecipe, UpdateRule
from stopfast.predictor import Predictor
from stopfast.random_masks import random_order, visible_count
from stopfast.transfers import filled_pair

_PATCHES, _POSITIONS, _SHUFFLE, _WRONG = 231, 232, 233, 234  # streams
_RELEASED_PATCH = 14
"""Pixels of the patches that the released scripts' map of positions is for, whatever the model's are."""


class DropPosDraws(NamedTuple):
    """What is random in one micro-batch."""

    order: Tensor
    """int64 [B, N], patches in random order, of which the first V are visible."""
    position_order: Tensor
    """int64 [B, V], places among the visible ones in random order; the first are told their positions."""
    sigma: Tensor
    """fp32 scalar, width of the smoothing in this epoch."""
    seed: Tensor
    """int64 [2]: the run's seed and the step, which decide the noise."""
    sample_ids: Tensor
    """int64 [B]: places in the step's global batch."""
    wrong: Tensor | None = None
    """int64 [dropped], which dropped position another gets, the same in every image."""


class DropPos:
    """Cross-entropy between predicted and true positions (DropPos, Wang et al., NeurIPS 2023).

    Args:
        encoder: with a class token; what is trained for its features.
        decoder: of positions.
        pixel_decoder: of the masked patches' pixels, for ``multi_task``.
        settings: the objective's own.
        noise: StoP's, on the features of the patches whose positions are asked for, before the
            decoder's projection, which they share (variants ``stop`` and ``stop_paper``, whose
            ``noise_var`` is a variance).
        transforms: of the images.
        update: schedules and clipping.
        epochs, steps_per_epoch: of the run: the smoothing falls epoch by epoch.
        seed: the run's.
        ops: implementation of the losses.

    Raises:
        ValueError: parts that do not fit each other, or no position to ask for.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: PositionDecoder,
        pixel_decoder: Predictor | None = None,
        *,
        settings: DropPosConfig,
        noise: NoiseConfig,
        transforms: Transforms,
        update: UpdateRule,
        epochs: int,
        steps_per_epoch: int,
        seed: int = 0,
        ops: Ops | str = "auto",
    ) -> None:
        patches = encoder.patch_embed.num_patches
        if encoder.cls_token is None or not decoder.class_token:
            raise ValueError(
                "expected --model.class-token: DropPos's encoder and decoder have a class token, got one "
                "without"
            )
        widths = decoder.decoder_embed.in_features, decoder.decoder_pred.out_features
        if widths != (encoder.embed_dim, patches):
            raise ValueError(
                f"expected a decoder from width {encoder.embed_dim} to {patches} positions, got {widths}"
            )
        if (pixel_decoder is not None) != settings.multi_task:
            raise ValueError("expected a pixel decoder with multi_task, and only then")
        if noise.learned_pos_emb and not settings.multi_task:
            raise ValueError(
                "expected learned_pos_emb with multi_task: this decoder has no positions"
            )
        self.encoder, self.decoder, self.pixel_decoder = encoder, decoder, pixel_decoder
        self.settings, self.transforms, self.update = settings, transforms, update
        self.epochs, self.steps_per_epoch, self.seed = epochs, steps_per_epoch, seed
        self.visible = visible_count(patches, settings.mask_ratio)
        self.told = int(self.visible * (1 - settings.position_mask_ratio))
        if self.told == self.visible:
            raise ValueError("expected position_mask_ratio > 0, got 0: no position is asked for")
        self.smoothing = Smoothing(
            grid=self._smoothing_grid(),
            norm="column" if settings.smoothing_norm == "released" else "row",
            ignore_confident=settings.ignore_confident,
        )
        self.noise_std = _noise_std(noise)
        self.apply_to = noise.apply_to
        self.pixels = PatchTarget(encoder.patch_embed.patch_size, "patch", (1e-6,))
        self.ops = resolve_ops(ops)

    def modules(self) -> dict[str, nn.Module]:
        """Encoder, decoder and, with ``multi_task``, the decoder of pixels."""
        found: dict[str, nn.Module] = {"encoder": self.encoder, "decoder": self.decoder}
        if self.pixel_decoder is not None:
            found["pixel_decoder"] = self.pixel_decoder
        return found

    def draws(self, step: int, batch_size: int, part: slice) -> DropPosDraws:
        """Which patches are visible and which are told their positions, of the part.

        ``shuffle`` puts the visible patches in another order, and with them all that is theirs: as
        published, but for the pixels of ``multi_task``, which the published program then mixes up.
        """
        device = self.encoder.pos_embed.device
        seed = filled_pair(self.seed, step, device, torch.int64)
        ids = torch.arange(part.start, part.stop, device=device)
        order = random_order(seed, ids, self.encoder.patch_embed.num_patches, _PATCHES)
        position_order = random_order(seed, ids, self.visible, _POSITIONS)
        wrong = None
        if self.settings.shuffle:
            shuffle = random_order(seed, ids, self.visible, _SHUFFLE)
            visible, masked = order.tensor_split([self.visible], dim=1)
            order = torch.cat([visible.gather(1, shuffle), masked], dim=1)
            position_order = shuffle.argsort(1).gather(1, position_order)
        if self.settings.position_token == "wrong":
            wrong = random_order(seed, ids.new_zeros(1), self.visible - self.told, _WRONG)[0]
        sigma = torch.full((), self.sigma(step), device=device)
        return DropPosDraws(order, position_order, sigma, seed, ids, wrong)

    def sigma(self, step: int) -> float:
        """Width of the smoothing in a step's epoch; not yet 0 in the last one, 0 after the run."""
        if not self.settings.sigma_decay:
            return self.settings.sigma
        epoch = (step - 1) // self.steps_per_epoch
        return self.settings.sigma * max(0.0, 1 - epoch / self.epochs)

    def asked(self, draws: DropPosDraws) -> tuple[Tensor, Tensor]:
        """The visible patches, int64 [B, V], and which are asked for their positions, bool [B, V]."""
        visible = draws.order[:, : self.visible]
        asked = torch.ones_like(visible, dtype=torch.bool)
        return visible, asked.scatter(1, draws.position_order[:, : self.told], False)

    def loss(self, images: Tensor, draws: DropPosDraws) -> Tensor:
        """Weighted cross-entropy of positions; with ``multi_task`` beside the squared error of pixels.

        The sum of the weights that divides it is this micro-batch's, as published. Where all images weigh
        the same, which attentive weights and ``ignore_confident`` do not let them, accumulated
        micro-batches are exactly the big batch; else they are the mean of their own means, as with the
        published program's devices.
        """
        visible, asked, features, logits = self._predict(images, draws)
        # After the prediction: what autocast first casts without gradients has none from then on, in torch
        # 2.10.
        weight = self._weights(images, visible, asked)
        loss = self.ops.position_cross_entropy(logits, visible, weight, draws.sigma, self.smoothing)
        if self.pixel_decoder is None:
            return loss
        pixels = self._pixels(features, draws)
        masked = draws.order[:, self.visible :]
        return self.settings.position_weight * loss + self.ops.patch_mse(
            pixels, images, masked, self.pixels
        )

    def outputs(self, images: Tensor, draws: DropPosDraws) -> dict[str, Tensor]:
        """The visible patches' features and the logits of their positions, and predicted pixels."""
        _, _, features, logits = self._predict(images, draws)
        found = {"encoder features": features, "position logits": logits}
        if self.pixel_decoder is not None:
            found["pixel predictions"] = self._pixels(features, draws)
        return found

    @torch.no_grad()
    def measures(self, images: Tensor, draws: DropPosDraws) -> dict[str, Tensor]:
        """``position_accuracy`` of the patches that are asked for, each counted once, and
        ``position_accuracy_weighted`` by the weights of the loss, the published one.
        """
        visible, asked, _, logits = self._predict(images, draws)
        correct = (logits.argmax(-1) == visible).float()
        weight = self._weights(images, visible, asked)
        if self.settings.ignore_confident:
            wanted = position_map(self.smoothing, draws.sigma).diagonal()[visible]
            likely = logits.float().softmax(-1).gather(-1, visible[..., None])[..., 0]
            weight = torch.where(likely >= wanted, 0.0, weight)
        total = weight.sum()
        return {
            "position_accuracy": (correct * asked).sum() / asked.sum(),
            "position_accuracy_weighted": (correct * weight).sum()
            / torch.where(total == 0, 1.0, total),
        }

    def features(self, images: Tensor) -> Tensor:
        """The encoder's normed output, without the class token."""
        return self.encoder(images)

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """None."""
        return []

    def optimizer_recipe(self) -> OptimizerRecipe:
        """AdamW on all modules."""
        return self.update.recipe(list(self.modules().values()))

    def scalars(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay."""
        return self.update.scalars(step)

    def _smoothing_grid(self) -> tuple[int, int]:
        grid = self.encoder.patch_embed.grid
        if self.settings.smoothing_grid == "corrected":
            return grid
        size = self.encoder.patch_embed.patch_size
        released = grid[0] * size // _RELEASED_PATCH, grid[1] * size // _RELEASED_PATCH
        if released[0] * released[1] < grid[0] * grid[1]:
            raise ValueError(
                f"expected a released grid of at least {grid[0] * grid[1]} positions, got {released}"
            )
        return released

    def _predict(
        self, images: Tensor, draws: DropPosDraws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Visible patches [B, V], which of them are asked for, all features, and the logits [B, V, L]."""
        visible, asked = self.asked(draws)
        features = self.encoder.tokens(images, visible, self._positions(visible, asked, draws))
        logits = self.decoder(features, self._noise(asked, draws))
        return visible, asked, features, logits

    def _positions(self, visible: Tensor, asked: Tensor, draws: DropPosDraws) -> Tensor:
        """What is added to the visible patches [B, V, D]: their positions, or what stands in for them."""
        own = self.encoder.patch_positions()[visible]
        if draws.wrong is not None:
            places = draws.position_order[:, self.told :]
            wide = places[..., None].expand(-1, -1, own.shape[-1])
            return own.scatter(1, wide, own.gather(1, wide[:, draws.wrong]))
        token = self.decoder.mask_pos_token
        if self.settings.position_token == "zeros":
            token = torch.zeros_like(token)
        return torch.where(asked[..., None], token, own)

    def _noise(self, asked: Tensor, draws: DropPosDraws) -> Tensor | None:
        if self.noise_std is None:
            return None
        width = self.encoder.embed_dim
        # Of a second copy, since the first is what the pixel decoder's context draws.
        normals = positional_noise(
            draws.seed, draws.sample_ids, 1, 2, self.visible, width, context=True
        )[0, len(asked) :]
        noisy = {"masked": asked, "context": ~asked, "both": torch.ones_like(asked)}[self.apply_to]
        return normals * (self.noise_std * noisy[..., None])

    def _pixels(self, features: Tensor, draws: DropPosDraws) -> Tensor:
        assert self.pixel_decoder is not None
        visible, masked = draws.order.tensor_split([self.visible], dim=1)
        return self.pixel_decoder(
            features, visible, masked, seed=draws.seed, sample_ids=draws.sample_ids
        )

    @torch.no_grad()
    def _weights(self, images: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Weight of each visible patch in the loss, fp32 [B, V]; no gradient goes through it.

        Attentive weights are the softmax of the whole image's patches, made to sum to 1 over the visible
        ones: the softmax of the visible ones alone, so that the last block computes no other patches.
        """
        if not self.settings.attentive:
            return asked.float()
        rows = F.pad(visible + 1, (1, 0))  # row 0 is the class token
        tokens = self.encoder.tokens(images, rows=rows).float()
        alike = F.cosine_similarity(tokens[:, :1], tokens[:, 1:], dim=-1)
        return asked * (alike / self.settings.temperature).softmax(-1)


def _noise_std(noise: NoiseConfig) -> float | None:
    """Deviation of the noise, None without.

    Raises:
        ValueError: noise of another kind than this decoder takes.
    """
    if noise.variant in ("ijepa", "stop_off"):
        return None
    if noise.cov != "learned" or not noise.tie or noise.noise_dim == "predictor":
        raise ValueError(
            "expected noise in the encoder's width that shares the decoder's projection "
            f"(cov 'learned', tie), got cov {noise.cov!r}, tie {noise.tie}, "
            f"noise_dim {noise.noise_dim!r}"
        )
    if noise.noise_var < 0:
        raise ValueError(f"expected noise_var >= 0, got {noise.noise_var}")
    return noise.noise_var**0.5 if noise.variant == "stop_paper" else noise.noise_var
