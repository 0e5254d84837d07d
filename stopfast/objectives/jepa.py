"""I-JEPA and StoP: predict a slow copy's features of masked blocks from the features of the rest."""

import copy
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stopfast.buckets import pad_to_bucket
from stopfast.config import Transforms
from stopfast.degradations import Degradation
from stopfast.encoder import VisionTransformer
from stopfast.kernels.ops import Ops, resolve_ops
from stopfast.masking import Masks, MultiBlockMasks
from stopfast.optim import OptimizerRecipe, UpdateRule
from stopfast.predictor import Predictor
from stopfast.transfers import SideStream, filled_pair


class JepaDraws(NamedTuple):
    """What is random in one micro-batch."""

    masks: Masks
    seed: Tensor
    """int64 [2]: the run's seed and the step, which decide the noise."""
    sample_ids: Tensor
    """int64 [B]: places in the step's global batch."""
    noise: list[Tensor] | None = None
    """Explicit, scaled draws for each target mask, padding included, instead of the seed's; for
    comparisons."""
    degradation: Tensor | None = None
    """What the degradation of the context image drew."""


class Jepa:
    """Smooth-L1 between predictions and the layer-normed features of a moving average of the encoder.

    I-JEPA (Assran et al., CVPR 2023) or StoP (Bar et al., ICML 2024), by the predictor's variant.

    Args:
        encoder: the context encoder that is trained; the target encoder begins as its copy.
        predictor: as wide as the encoder.
        masks: sampler on the encoder's grid.
        transforms: the images' transforms.
        update: schedules, with a momentum, and clipping.
        degradation: what the context encoder sees of an image; the target encoder sees all of it. None for
            the image as it is.
        target_blocks: average the target encoder's last this many blocks.
        seed: the run's seed.
        clip_encoder_only: clip the encoder's gradients alone.
        skip_unused: compute the target encoder's last block for the wanted tokens only.
        bucket: pad masks to multiples of this; see :func:`stopfast.buckets.pad_to_bucket`. 1 for none.
            The loss and its gradients are the same.
        target_stream: run the target encoder beside the context encoder, on a CUDA stream of its own.
        ops: implementation of the loss.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        masks: MultiBlockMasks,
        *,
        transforms: Transforms,
        update: UpdateRule,
        degradation: Degradation | None = None,
        target_blocks: int = 1,
        seed: int = 0,
        clip_encoder_only: bool = False,
        skip_unused: bool = True,
        bucket: int = 1,
        target_stream: bool = False,
        ops: Ops | str = "auto",
    ) -> None:
        if bucket < 1:
            raise ValueError(f"expected bucket >= 1, got {bucket}")
        grids = encoder.patch_embed.grid, predictor.grid_size, masks.grid
        if len(set(grids)) != 1:
            raise ValueError(f"expected one grid for encoder, predictor and masks, got {grids}")
        if encoder.cls_token is not None or predictor.class_token:
            raise ValueError(
                "expected --model.no-class-token: I-JEPA's and StoP's encoder and predictor have none, "
                "got one with it"
            )
        if encoder.embed_dim != predictor.embed_dim:
            raise ValueError(
                f"expected a predictor of the encoder's width {encoder.embed_dim}, "
                f"got {predictor.embed_dim}"
            )
        self.encoder, self.predictor, self.masks = encoder, predictor, masks
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.transforms = transforms
        self.update, self.degradation = update, degradation
        self._clipped = [encoder] if clip_encoder_only else [encoder, predictor]
        self.target_blocks = target_blocks
        self.seed = seed
        self.skip_unused, self.bucket = skip_unused, bucket
        self._beside = SideStream() if target_stream else None
        self.ops = resolve_ops(ops)

    def modules(self) -> dict[str, nn.Module]:
        """Encoder, predictor and target encoder."""
        return {
            "encoder": self.encoder,
            "predictor": self.predictor,
            "target_encoder": self.target_encoder,
        }

    def draws(self, step: int, batch_size: int, part: slice) -> JepaDraws:
        """Masks of the part, and what its noise is a function of."""
        device = self.encoder.pos_embed.device
        # The published counter of the masks starts at 0.
        masks = self.masks(batch_size, step - 1, start=part.start, stop=part.stop, device=device)
        if self.bucket > 1:
            masks = pad_to_bucket(masks, self.bucket, self.encoder.patch_embed.num_patches)
        seed = filled_pair(self.seed, step, device, torch.int64)
        ids = torch.arange(part.start, part.stop, device=device)
        degraded = None if self.degradation is None else self.degradation.draws(seed, ids)
        return JepaDraws(masks, seed, ids, degradation=degraded)

    def loss(self, images: Tensor, draws: JepaDraws) -> Tensor:
        """Mean smooth-L1 over all predictions; see ``target_smooth_l1``.

        Raises:
            ValueError: ``target_stream`` for images that are not on a GPU.
        """
        seen, whole = self._seen(images, draws)
        beside = self._beside
        with nullcontext() if beside is None else beside.beside(images.device, after=True):
            features, index = self.target_features(whole, draws.masks.target)
        _, prediction = self._predict(seen, draws)
        if beside is not None:
            beside.join(images.device)
        return self.ops.target_smooth_l1(prediction, features, index, draws.masks.lengths)

    def outputs(self, images: Tensor, draws: JepaDraws) -> dict[str, Tensor]:
        """The context's features and the predictions."""
        features, prediction = self._predict(self._seen(images, draws)[0], draws)
        return {"encoder features": features, "predictions": prediction}

    def measures(self, images: Tensor, draws: JepaDraws) -> dict[str, Tensor]:
        """Nothing: the features tell more than the loss."""
        return {}

    def _seen(self, images: Tensor, draws: JepaDraws) -> tuple[Tensor, Tensor]:
        """What the context encoder sees, and what the target encoder sees."""
        if self.degradation is None:
            return images, images
        return self.degradation.view(images, draws.degradation), self.degradation.whole(images)

    def _predict(self, seen: Tensor, draws: JepaDraws) -> tuple[Tensor, Tensor]:
        context, target, lengths = draws.masks
        features = self.encoder(seen, context, lengths=lengths)
        prediction = self.predictor(
            features,
            context,
            target,
            noise=draws.noise,
            seed=draws.seed,
            sample_ids=draws.sample_ids,
            lengths=lengths,
        )
        return features, prediction

    @torch.no_grad()
    def target_features(self, images: Tensor, target: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Target features [B, T, D] and the rows among them that each target mask reads [M, B, Ky].

        The features are not normed yet. T is N, or M * Ky where that is fewer rows to compute: padding
        counts, so that the shape decides. Rows of padding are computed for nobody.
        """
        index = torch.stack(target)
        blocks, batch, tokens = index.shape
        if not self.skip_unused or blocks * tokens >= self.encoder.patch_embed.num_patches:
            return self.target_encoder(images, K=self.target_blocks), index
        rows = index.transpose(0, 1).flatten(1)
        features = self.target_encoder(images, K=self.target_blocks, rows=rows)
        place = torch.arange(blocks * tokens, device=index.device).view(blocks, 1, tokens)
        return features, place.expand(-1, batch, -1)

    def features(self, images: Tensor) -> Tensor:
        """The target encoder's normed output."""
        return self.target_encoder(images)

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The target encoder follows the encoder."""
        return [(self.encoder, self.target_encoder)]

    def optimizer_recipe(self) -> OptimizerRecipe:
        """AdamW with torch's defaults; encoder and predictor, decayed and not."""
        return self.update.recipe([self.encoder, self.predictor], self._clipped)

    def scalars(self, step: int) -> dict[str, float]:
        """Learning rate, weight decay and EMA momentum."""
        return self.update.scalars(step)
