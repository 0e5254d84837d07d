"""DropPos: tell where the visible patches belong whose positions were dropped."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stopfast.config import DropPosConfig, NoiseConfig, Transforms
from stopfast.decoder import PositionDecoder
from stopfast.encoder import VisionTransformer
from stopfast.kernels.ops import Ops, PatchTarget, Smoothing, positional_noise, resolve_ops
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
    """int64 [B, V], the visible ones in random order, of which the first are told their positions."""
    sigma: Tensor
    """fp32 scalar, width of the smoothing in this epoch."""
    seed: Tensor
    """int64 [2]: the run's seed and the step, which decide the noise."""
    sample_ids: Tensor
    """int64 [B]: places in the step's global batch."""
    shuffle: Tensor | None = None
    """int64 [B, V], the order in which the encoder gets the visible patches."""
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
        ValueError: parts that do not fit each other.
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
        if encoder.cls_token is None:
            raise ValueError("expected an encoder with a class token, got one without")
        if (pixel_decoder is not None) != settings.multi_task:
            raise ValueError("expected a pixel decoder with multi_task, and only then")
        self.encoder, self.decoder, self.pixel_decoder = encoder, decoder, pixel_decoder
        self.settings, self.transforms, self.update = settings, transforms, update
        self.epochs, self.steps_per_epoch, self.seed = epochs, steps_per_epoch, seed
        patches = encoder.patch_embed.num_patches
        self.visible = visible_count(patches, settings.mask_ratio)
        self.told = int(self.visible * (1 - settings.position_mask_ratio))
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
        """Which patches are visible and which are told their positions, of the part."""
        device = self.encoder.pos_embed.device
        seed = filled_pair(self.seed, step, device, torch.int64)
        ids = torch.arange(part.start, part.stop, device=device)
        shuffle = wrong = None
        if self.settings.shuffle:
            shuffle = random_order(seed, ids, self.visible, _SHUFFLE)
        if self.settings.position_token == "wrong":
            wrong = random_order(seed, ids.new_zeros(1), self.visible - self.told, _WRONG)[0]
        return DropPosDraws(
            random_order(seed, ids, self.encoder.patch_embed.num_patches, _PATCHES),
            random_order(seed, ids, self.visible, _POSITIONS),
            torch.full((), self.sigma(step), device=device),
            seed,
            ids,
            shuffle,
            wrong,
        )

    def sigma(self, step: int) -> float:
        """Width of the smoothing in a step's epoch; in the last one it is not 0 yet."""
        if not self.settings.sigma_decay:
            return self.settings.sigma
        epoch = (step - 1) // self.steps_per_epoch
        return self.settings.sigma * (1 - epoch / self.epochs)

    def loss(self, images: Tensor, draws: DropPosDraws) -> Tensor:
        """Weighted cross-entropy of positions; with ``multi_task`` beside the squared error of pixels."""
        visible, asked, features, logits = self._predict(images, draws)
        weight = self._weights(images, visible, asked)
        loss = self.ops.position_cross_entropy(logits, visible, weight, draws.sigma, self.smoothing)
        if self.pixel_decoder is None:
            return loss
        masked = draws.order[:, self.visible :]
        pixels = self._pixels(features, visible, masked, draws)
        return self.settings.position_weight * loss + self.ops.patch_mse(
            pixels, images, masked, self.pixels
        )

    def outputs(self, images: Tensor, draws: DropPosDraws) -> dict[str, Tensor]:
        """The visible patches' features and the logits of their positions, and predicted pixels."""
        visible, _, features, logits = self._predict(images, draws)
        found = {"encoder features": features, "position logits": logits}
        if self.pixel_decoder is not None:
            masked = draws.order[:, self.visible :]
            found["pixel predictions"] = self._pixels(features, visible, masked, draws)
        return found

    @torch.no_grad()
    def measures(self, images: Tensor, draws: DropPosDraws) -> dict[str, Tensor]:
        """``position_accuracy``, and that by the weights of the loss, the published one."""
        visible, asked, _, logits = self._predict(images, draws)
        correct = (logits.argmax(-1) == visible).float()
        weight = self._weights(images, visible, asked)
        return {
            "position_accuracy": (correct * asked).sum() / asked.sum(),
            "position_accuracy_weighted": (correct * weight).sum() / weight.sum(),
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
        visible = draws.order[:, : self.visible]
        asked = torch.ones_like(visible, dtype=torch.bool)
        asked = asked.scatter(1, draws.position_order[:, : self.told], False)
        positions = self._positions(visible, asked, draws)
        if draws.shuffle is not None:
            visible, asked = (x.gather(1, draws.shuffle) for x in (visible, asked))
            positions = positions.gather(
                1, draws.shuffle[..., None].expand(-1, -1, positions.shape[-1])
            )
        features = self.encoder.tokens(images, visible, positions)
        logits = self.decoder(features, self._noise(asked, draws))
        return visible, asked, features, logits

    def _positions(self, visible: Tensor, asked: Tensor, draws: DropPosDraws) -> Tensor:
        """What is added to the visible patches [B, V, D]: their positions, or what stands in for them."""
        own = self.encoder.patch_positions()[visible]
        if draws.wrong is not None:
            slots = draws.position_order[:, self.told :]
            wide = slots[..., None].expand(-1, -1, own.shape[-1])
            return own.scatter(1, wide, own.gather(1, wide[:, draws.wrong]))
        token = self.decoder.mask_pos_token
        if self.settings.position_token == "zeros":
            token = torch.zeros_like(token)
        return torch.where(asked[..., None], token, own)

    def _noise(self, asked: Tensor, draws: DropPosDraws) -> Tensor | None:
        if self.noise_std is None:
            return None
        width = self.encoder.embed_dim
        normals = positional_noise(
            draws.seed, draws.sample_ids, 1, 1, self.visible, width, context=True
        )[0]
        noisy = {"masked": asked, "context": ~asked, "both": torch.ones_like(asked)}[self.apply_to]
        return normals * (self.noise_std * noisy[..., None])

    def _pixels(
        self, features: Tensor, visible: Tensor, masked: Tensor, draws: DropPosDraws
    ) -> Tensor:
        assert self.pixel_decoder is not None
        return self.pixel_decoder(
            features, visible, masked, seed=draws.seed, sample_ids=draws.sample_ids
        )

    @torch.no_grad()
    def _weights(self, images: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Weight of each visible patch in the loss, fp32 [B, V]; no gradient goes through it."""
        if not self.settings.attentive:
            return asked.float()
        tokens = self.encoder.tokens(images).float()
        alike = F.cosine_similarity(tokens[:, :1], tokens[:, 1:], dim=-1)
        attention = (alike / self.settings.temperature).softmax(-1).gather(1, visible)
        return asked * attention / attention.sum(1, keepdim=True)


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
    return noise.noise_var**0.5 if noise.variant == "stop_paper" else noise.noise_var
