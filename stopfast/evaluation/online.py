"""Measures of collapse for the training loop: pure functions of a few hundred features.

A loss that falls says nothing about collapse (the targets of a teacher may shrink with it), so each of
these looks at features alone. All compute in fp32 and return a Python float.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stopfast.evaluation.knn import knn_predict

_RANKME_EPS = 1e-7


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    r"""Return the spread of l2-normalised features: 0 for one direction, 1 for isotropic ones.

    sqrt(D) / D * sum_j std_i(z_ij / |z_i|), with the deviation over the images (divided by n): a unit
    vector of random direction has a variance of 1/D in every channel. Chen & He, *Exploring Simple
    Siamese Representation Learning* (CVPR 2021), plot the same without the sqrt(D).

    Args:
        features: [n, D], n >= 2.

    Raises:
        ValueError: another shape.
    """
    _require_rows(features)
    spread = normalize(features.float(), dim=1).std(0, correction=0)
    return float(spread.mean() * features.shape[1] ** 0.5)


@torch.no_grad()
def rankme(features: Tensor) -> float:
    r"""Return the effective rank of the features, from 1 to min(n, D).

    exp(-sum_k p_k log p_k), p_k = s_k / sum_l s_l + 1e-7, with the singular values s of the features as
    they are (not centred): Garrido et al., *RankMe* (ICML 2023), equation 1. Features that are all zero
    give 1, and features that are not finite NaN.

    Args:
        features: [n, D], n >= 2; the authors use many more rows than columns.

    Raises:
        ValueError: another shape.
    """
    _require_rows(features)
    if not bool(features.isfinite().all()):
        return float("nan")  # the decomposition would raise, and training has its own check
    singular = torch.linalg.svdvals(features.float())
    total = singular.sum()
    if total == 0:
        return 1.0
    share = singular / total + _RANKME_EPS
    return float((-share * share.log()).sum().exp())


@torch.no_grad()
def target_variance(targets: Tensor) -> float:
    r"""Return how much the targets of the loss differ between images and places, from 0 to 1.

    1/D * sum_d var_{b,n}(t_bnd), divided by B * N. Targets are layer-normed without weights, so that
    their mean square is 1: what is missing from 1 is the part that is the same everywhere, which a
    predictor can learn without looking at the image.

    Args:
        targets: [B, N, D], layer-normed target features, B * N >= 2.

    Raises:
        ValueError: another shape.
    """
    if targets.ndim != 3:
        raise ValueError(f"expected targets [B, N, D], got {list(targets.shape)}")
    rows = targets.flatten(0, 1)
    _require_rows(rows)
    return float(rows.float().var(0, correction=0).mean())


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the share of test images that :func:`stopfast.evaluation.knn.knn_predict` gets right.

    Args:
        train, test: [n, D] and [m, D].
        train_labels, test_labels: int64 [n] and [m], classes from 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    if test_labels.shape != test.shape[:1] or not len(test):
        raise ValueError(
            f"expected one label for each of at least one test image, "
            f"got {list(test_labels.shape)} for {list(test.shape)}"
        )
    predicted = knn_predict(train, train_labels, test)
    return float((predicted == test_labels.cpu()).float().mean())


def _require_rows(features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise ValueError(
            f"expected features [n, D] of at least two rows, got {list(features.shape)}"
        )
