"""Weighted k-nearest-neighbour classification in chunks, so that no matrix of all pairs is ever held."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

NEIGHBOURS, TEMPERATURE = 20, 0.07
_TRAIN_ROWS, _TEST_ROWS = 16384, 512  # 32 MiB of similarities


@torch.no_grad()
def knn_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
) -> Tensor:
    """Classify by the nearest training rows, by cosine distance d; each votes with exp(-d / temperature).

    The protocol of Wu et al., *Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination* (CVPR 2018). Memory beside the arguments does not grow with the number of rows of
    either.

    Args:
        train: [n, D], floating point.
        labels: int64 [n], classes from 0.
        test: [m, D].
        neighbours: how many vote; all where there are fewer rows.
        temperature: the smaller, the less the farther ones count.
        device: where to compute; default: where ``train`` lies.

    Returns:
        int64 [m] on the CPU.

    Raises:
        ValueError: shapes that do not fit, or no neighbour.
    """
    require_features(train, labels)
    if test.ndim != 2 or test.shape[1] != train.shape[1]:
        raise ValueError(f"expected test features [m, {train.shape[1]}], got {list(test.shape)}")
    if neighbours < 1 or not temperature > 0:
        raise ValueError(
            f"expected neighbours >= 1 and temperature > 0, got {neighbours} and {temperature}"
        )
    device = device or train.device
    labels = labels.to(device)
    classes = int(labels.max()) + 1
    neighbours = min(neighbours, len(train))
    predictions = []
    for asked in test.split(_TEST_ROWS):
        asked = normalize(asked.to(device).float(), dim=1)
        best = asked.new_empty(len(asked), 0)
        voters = labels.new_empty(len(asked), 0)
        for known, named in zip(train.split(_TRAIN_ROWS), labels.split(_TRAIN_ROWS), strict=True):
            similarity = asked @ normalize(known.to(device).float(), dim=1).T
            near, place = similarity.topk(min(neighbours, len(known)), dim=1)
            best, kept = torch.cat([best, near], 1).topk(
                min(neighbours, best.shape[1] + near.shape[1]), dim=1
            )
            voters = torch.cat([voters, named[place]], 1).gather(1, kept)
        # Distances from the nearest, which scale all votes alike: exp never underflows to no vote.
        weights = ((best - best[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(asked), classes).scatter_add_(1, voters, weights)
        predictions.append(votes.argmax(1).cpu())
    return torch.cat(predictions)


def require_features(features: Tensor, labels: Tensor) -> None:
    """Check features [n, D] and their labels int64 [n].

    Raises:
        ValueError: other shapes or kinds of numbers, or none at all.
    """
    if features.ndim != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(
            "expected floating-point features [n, D] of at least one image, "
            f"got {list(features.shape)} of {features.dtype}"
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"expected int64 labels [{len(features)}], got {list(labels.shape)} of {labels.dtype}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"expected labels from 0, got {int(labels.min())}")
