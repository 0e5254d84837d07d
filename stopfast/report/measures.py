"""What the pictures show, as numbers: coverage, covariance, similarities, components. No drawing here."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from stopfast.masking import Masks, MultiBlockMasks
from stopfast.objectives import Objective
from stopfast.predictor import Predictor
from stopfast.trained import TrainedRun


class Coverage(NamedTuple):
    """Share of the images in which each patch is seen, fp64 [rows, columns] each."""

    context: Tensor
    target: Tensor
    """In at least one of the target blocks."""


def coverage(masks: MultiBlockMasks, batch_size: int, batches: int) -> Coverage:
    """Return how often each patch is context, and target, over the first ``batches`` iterations.

    Contexts are cut to the shortest of their batch, so the share depends on the batch size.
    """
    count = math.prod(masks.grid)
    totals = [torch.zeros(count, dtype=torch.float64) for _ in range(2)]
    for iteration in range(batches):
        drawn = masks(batch_size, iteration)
        for total, blocks in zip(totals, (drawn.context, drawn.target), strict=True):
            seen = torch.zeros(batch_size, count)
            for index in blocks:
                seen.scatter_(1, index, 1.0)
            total += seen.sum(0)
    context, target = (t.view(masks.grid) / (batch_size * batches) for t in totals)
    return Coverage(context, target)


def noise_projection(predictor: Predictor) -> Tensor | None:
    """Return the matrix A [d_p, noise channels] that projects the noise; None for I-JEPA and StoP off.

    A fixed covariance has the identity.
    """
    if not (predictor.noisy_queries or predictor.noisy_context):
        return None
    if predictor.cov == "fixed":
        return torch.eye(predictor.predictor_embed.out_features)
    own = predictor.noise_embed or predictor.predictor_embed
    return own.weight.detach().float()


def projection_spectrum(predictor: Predictor) -> Tensor:
    """Return the eigenvalues of A A^T, descending, fp64 [d_p]; A is the predictor's shared projection.

    They are the squared singular values of A, and zeros beyond them.
    """
    weight = predictor.predictor_embed.weight.detach().double()
    values = torch.linalg.svdvals(weight).square()
    return torch.nn.functional.pad(values, (0, weight.shape[0] - len(values)))


def noise_to_position(predictor: Predictor) -> tuple[float, float]:
    """Return std^2 tr(A A^T) and the mean of |psi|^2 over the positions (d_p / 2 for sines and cosines).

    The first is the mean squared length of the noise that a query receives; 0 where there is none.
    """
    projection = noise_projection(predictor)
    energy = 0.0 if projection is None else projection.double().square().sum().item()
    positions = predictor.predictor_pos_embed.detach()[0].double()
    return predictor.noise_std**2 * energy, positions.square().sum(1).mean().item()


def position_cosines(predictor: Predictor, place: int, noise: Tensor | None = None) -> Tensor:
    """Return the cosine of one position's embedding with every position's, fp32 [..., rows, columns].

    Args:
        predictor: its position table and, with ``noise``, its projection A.
        place: number of the position in raster order.
        noise: standard normals [..., noise channels]; the position then is psi^ = psi + std A n, without
            the offset that all queries share.

    Raises:
        ValueError: a place outside the grid, or noise for a predictor that has none.
    """
    table = predictor.predictor_pos_embed.detach()[0].float()
    if not 0 <= place < len(table):
        raise ValueError(f"expected a place in 0..{len(table) - 1}, got {place}")
    query = table[place]
    if noise is not None:
        projection = noise_projection(predictor)
        if projection is None:
            raise ValueError("expected no noise: this predictor's queries have none")
        query = query + predictor.noise_std * noise @ projection.T
    cosines = normalize(query, dim=-1) @ normalize(table, dim=-1).T
    return cosines.unflatten(-1, predictor.grid_size)


@torch.inference_mode()
def patch_features(objective: Objective[Any], images: Tensor) -> Tensor:
    """Return the features of whole images [B, 3, H, W], as evaluation takes them: fp32 [B, N, D]."""
    return objective.features(images).float()


def position_share(features: Tensor) -> float:
    """Return the share of the variance of features [B, N, D] that each position's mean over B explains."""
    rows = features.double()
    explained = rows.mean(0).var(0, correction=0).sum()
    return (explained / rows.flatten(0, 1).var(0, correction=0).sum().clamp_min(1e-30)).item()


def pca_colours(features: Tensor) -> tuple[Tensor, float]:
    """Return the first three principal components of patch features as colours, and their share.

    Args:
        features: [B, N, D]; the components are those of all patches of all images together.

    Returns:
        fp32 [B, N, 3] in 0..1 (each component stretched from its 2nd to its 98th percentile, its sign
        chosen so that its skewness is not negative), and the share of the variance that they hold.

    Raises:
        ValueError: fewer than three patches or channels.
    """
    rows = features.flatten(0, -2).double()
    if min(rows.shape) < 3:
        raise ValueError(f"expected at least 3 patches and channels, got {tuple(rows.shape)}")
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    components = rows @ vectors[:, -3:].flip(1)
    components = components * torch.where(components.pow(3).sum(0) < 0, -1.0, 1.0)
    low, high = (components.quantile(q, dim=0) for q in (0.02, 0.98))
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    share = (values[-3:].sum() / values.sum().clamp_min(1e-30)).item()
    return colours.float().unflatten(0, features.shape[:-1]), share


class Retrieval(NamedTuple):
    """What one predicted token of each image is like."""

    places: Tensor
    """int64 [B]: the position that was predicted."""
    cosines: Tensor
    """fp32 [B, rows, columns]: its cosine with the target encoder's token at each position."""
    weights: Tensor
    """fp32 [B, rows, columns]: their softmax, which sums to 1."""


@torch.inference_mode()
def retrieve(
    run: TrainedRun, seen: Tensor, images: Tensor, masks: Masks, *, temperature: float = 0.1
) -> Retrieval:
    """Predict the middle token of each image's first target block, and compare it with every token.

    Args:
        run: its three networks; the noise is drawn once, as in training, from the run's seed.
        seen: what the context encoder sees, fp32 [B, C, H, W], normalised: the images, or degraded ones.
        images: what the target encoder sees, fp32 [B, 3, H, W].
        masks: of these images; the first context and target masks are used.
        temperature: of the softmax over the cosines.

    The targets are layer-normed as in the loss (eps 1e-5).
    """
    context, target = masks.context[0], masks.target[0]
    middle = target.shape[1] // 2
    seed = torch.tensor([run.config.run.seed, run.step])
    predicted = run.predictor(run.encoder(seen, context), context, target, seed=seed)
    features = run.target_encoder(images, K=run.config.jepa.target_blocks).float()
    features = layer_norm(features, features.shape[-1:], eps=1e-5)
    predicted = normalize(predicted[:, middle].float(), dim=-1)
    cosines = (normalize(features, dim=-1) * predicted[:, None]).sum(-1)
    weights = (cosines / temperature).softmax(-1)
    grid = run.predictor.grid_size
    return Retrieval(target[:, middle], cosines.unflatten(1, grid), weights.unflatten(1, grid))
