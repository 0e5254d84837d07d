"""MAE and Beyond Masking: predict the pixels of an image from a masked or degraded one."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stopfast.config import Transforms
from stopfast.degradations import Degradation
from stopfast.encoder import VisionTransformer
from stopfast.kernels.ops import Ops, resolve_ops
from stopfast.optim import OptimizerRecipe, UpdateRule
from stopfast.predictor import Predictor
from stopfast.random_masks import random_order, visible_count
from stopfast.transfers import filled_pair

_PATCHES = 230  # stream


class ReconstructionDraws(NamedTuple):
    """What is random in one micro-batch."""

    order: Tensor | None
    """int64 [B, N], patches in random order, of which the encoder sees the first; None: it sees all."""
    degradation: Tensor | None
    """What the degradation drew."""
    seed: Tensor
    """int64 [2]: the run's seed and the step, which decide the noise."""
    sample_ids: Tensor
    """int64 [B]: places in the step's global batch."""
    noise: list[Tensor] | None = None
    """Explicit, scaled draws for the queries, for comparisons."""


class Reconstruction:
    """Mean squared error between predicted and true pixels, normalised patch by patch.

    MAE (He et al., CVPR 2022) without a degradation; the tasks of Beyond Masking (Tian et al., 2022)
    with one.

    Args:
        encoder: what is trained for its features.
        decoder: a predictor of the numbers of a patch; queries are the masked patches.
        degradation: what the encoder sees, and the loss.
        mask_ratio: share of the patches that the encoder does not see.
        transforms: of the images that the degradation takes.
        update: schedules and clipping.
        seed: the run's.
        ops: implementation of the loss.

    Raises:
        ValueError: parts that do not fit each other, a mask_ratio that leaves no patch, or noise on queries
            that there are none of.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Predictor,
        degradation: Degradation,
        *,
        mask_ratio: float,
        transforms: Transforms,
        update: UpdateRule,
        seed: int = 0,
        ops: Ops | str = "auto",
    ) -> None:
        _check(encoder, decoder, degradation)
        self.encoder, self.decoder, self.degradation = encoder, decoder, degradation
        patches = encoder.patch_embed.num_patches
        self.visible = visible_count(patches, mask_ratio) if mask_ratio else patches
        if self.visible == patches:
            if decoder.noisy_queries and not decoder.noisy_context:
                raise ValueError("expected masks with noise on queries, got mask_ratio 0")
            # What nothing reads must not be trainable: DDP would wait for its gradient.
            decoder.mask_token.requires_grad_(False)
        self.transforms, self.update, self.seed = transforms, update, seed
        self.ops = resolve_ops(ops)

    def modules(self) -> dict[str, nn.Module]:
        """Encoder and decoder."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def draws(self, step: int, batch_size: int, part: slice) -> ReconstructionDraws:
        """Masks and degradation of the part, and what its noise is a function of."""
        device = self.encoder.pos_embed.device
        seed = filled_pair(self.seed, step, device, torch.int64)
        ids = torch.arange(part.start, part.stop, device=device)
        patches, order = self.encoder.patch_embed.num_patches, None
        if self.visible < patches:
            order = random_order(seed, ids, patches, _PATCHES)
        return ReconstructionDraws(order, self.degradation.draws(seed, ids), seed, ids)

    def loss(self, images: Tensor, draws: ReconstructionDraws) -> Tensor:
        """The degradation's loss, over masked patches where there are any."""
        _, prediction = self._predict(images, draws)
        masked = None if draws.order is None else draws.order[:, self.visible :]
        return self.degradation.loss(prediction, images, draws.degradation, masked, self.ops)

    def outputs(self, images: Tensor, draws: ReconstructionDraws) -> dict[str, Tensor]:
        """The visible patches' features and the predicted pixels."""
        features, prediction = self._predict(images, draws)
        return {"encoder features": features, "predictions": prediction}

    def measures(self, images: Tensor, draws: ReconstructionDraws) -> dict[str, Tensor]:
        """Nothing: the loss tells it all."""
        return {}

    def reconstruct(self, images: Tensor, draws: ReconstructionDraws) -> Tensor:
        """The prediction of every patch in raster order [B, N, p * p * 3], for pictures."""
        return self._predict(images, draws, everywhere=True)[1]

    def features(self, images: Tensor) -> Tensor:
        """The encoder's normed output."""
        return self.encoder(images)

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """None."""
        return []

    def optimizer_recipe(self) -> OptimizerRecipe:
        """AdamW on both modules."""
        return self.update.recipe([self.encoder, self.decoder])

    def scalars(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay."""
        return self.update.scalars(step)

    def _predict(
        self, images: Tensor, draws: ReconstructionDraws, everywhere: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features, and the predictions of the masked patches, or of all in raster order."""
        seen = self.degradation.view(images, draws.degradation)
        everywhere = everywhere or self.degradation.predicts_all or draws.order is None
        order = draws.order
        if order is None:
            patches = torch.arange(self.encoder.patch_embed.num_patches, device=images.device)
            order = patches.expand(len(images), -1)
        kept, masked = order[:, : self.visible], order[:, self.visible :]
        features = self.encoder.tokens(seen, None if draws.order is None else kept)
        prediction = self.decoder(
            features,
            kept,
            masked,
            noise=draws.noise,
            seed=draws.seed,
            sample_ids=draws.sample_ids,
            whole=everywhere,
        )
        if everywhere and draws.order is not None:
            place = order.argsort(1)[..., None].expand(-1, -1, prediction.shape[-1])
            prediction = prediction.gather(1, place)
        return features, prediction


def _check(encoder: VisionTransformer, decoder: Predictor, degradation: Degradation) -> None:
    embed = encoder.patch_embed
    if (encoder.cls_token is not None) != decoder.class_token:
        raise ValueError("expected a class token in both of encoder and decoder, or in neither")
    rows, columns = embed.grid
    for what, expected, got in (
        ("a decoder on the encoder's grid", embed.grid, decoder.grid_size),
        ("a decoder of the encoder's width", encoder.embed_dim, decoder.embed_dim),
        ("predictions of 3 channels", 3 * embed.patch_size**2, decoder.predictor_proj.out_features),
        ("images of the encoder's size", (rows * embed.patch_size, columns * embed.patch_size),
         degradation.size),
        ("images of the encoder's channels", embed.in_chans, degradation.channels),
    ):  # fmt: skip
        if expected != got:
            raise ValueError(f"expected {what} {expected}, got {got}")
