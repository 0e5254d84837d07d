"""Classifiers of features: a linear probe with a sweep of learning rates, and a logistic regression.

Whatever is chosen is chosen on training images: no function here that fits is given a test image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stopfast.evaluation.knn import require_features

_EPS = 1e-6
_CHUNK = 16384  # rows of one pass


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings:
    """How the linear probe is trained: SGD with momentum, cosine to zero, no weight decay."""

    rates: tuple[float, ...] = (0.0004, 0.002, 0.01, 0.05, 0.25, 1.0, 5.0)
    """Learning rates at the start for batches of 256, scaled with the batch; one head each."""
    epochs: int = 30
    batch_size: int | None = None
    """Default: a hundredth of the images, from 128 to 1024."""
    momentum: float = 0.9
    held_out: float = 0.2
    """Share of each class's training images that the learning rate is chosen on."""

    def __post_init__(self) -> None:
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise ValueError(f"expected at least one rate > 0, got {self.rates}")
        batch_size = 1 if self.batch_size is None else self.batch_size
        if self.epochs < 1 or batch_size < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                "expected epochs >= 1, batch_size >= 1 and momentum in [0, 1), "
                f"got {self.epochs}, {self.batch_size} and {self.momentum}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"expected held_out in (0, 1), got {self.held_out}")


class Heads(NamedTuple):
    """Linear classifiers side by side, of features standardised by one mean and deviation."""

    weight: Tensor
    """fp32 [D, L * C], the C columns of head 0 first."""
    bias: Tensor
    """fp32 [L * C]."""
    mean: Tensor
    """fp32 [D]."""
    scale: Tensor
    """fp32 [D], the reciprocal of the deviation."""

    def standardise(self, features: Tensor, rows: Tensor) -> Tensor:
        """Take rows int64 [B] of features [n, D], fp32 [B, D] on the heads' device."""
        taken = features[rows.to(features.device)].to(self.mean.device, torch.float32)
        return taken.sub_(self.mean).mul_(self.scale)  # in place: indexing copied them

    def logits(self, features: Tensor, rows: Tensor) -> Tensor:
        """Classify rows int64 [B] of features [n, D]: fp32 [B, L * C]."""
        return torch.addmm(self.bias, self.standardise(features, rows), self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProbe:
    """A linear classifier of features."""

    rate: float
    """The learning rate that was chosen."""
    held_out: tuple[float, ...]
    """Accuracy on the held-out training images of each rate of the settings."""
    heads: Heads

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Features [m, D] to classes, int64 [m] on the CPU."""
        chunks = torch.arange(len(features)).split(_CHUNK)
        return torch.cat([self.heads.logits(features, rows).argmax(1).cpu() for rows in chunks])


@torch.no_grad()
def fit_linear(
    features: Tensor,
    labels: Tensor,
    *,
    seed: int,
    settings: LinearSettings | None = None,
    device: torch.device | None = None,
) -> LinearProbe:
    """Train a linear classifier by softmax cross-entropy on standardised features.

    One head a learning rate is trained, all at once, on the training images without a held-out share of
    each class; the rate that is best there (by accuracy, then by loss) trains the final head on all of
    them. The standardisation is that of a BatchNorm without affine in evaluation mode: mean and
    deviation of the images that are trained on. Heads begin at zero, so ``seed`` decides the split and
    the batches alone.

    Args:
        features: [n, D], floating point, on any device; batches of it are moved.
        labels: int64 [n], classes from 0, at least two.
        seed: of the split and of the order of the batches.
        settings: default ``LinearSettings()``.
        device: where to compute; default: where the features lie.

    Raises:
        ValueError: shapes that do not fit, one class only, or a class of one image only.
    """
    require_features(features, labels)
    settings = settings or LinearSettings()
    device = device or features.device
    labels = labels.cpu()
    generator = np.random.default_rng(seed)
    held_out = stratified(labels.numpy(), settings.held_out, generator)
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    if len(np.unique(labels)) < 2 or len(np.unique(labels[rest])) < len(np.unique(labels)):
        raise ValueError(
            "expected at least two classes with at least two training images each, "
            f"got {np.bincount(labels.numpy()).tolist()} images"
        )
    heads = _train(features, labels, rest, settings.rates, settings, generator, device)
    accuracy, loss = _score(heads, features, labels, held_out, len(settings.rates))
    best = max(range(len(settings.rates)), key=lambda head: (accuracy[head], -loss[head]))
    rate = settings.rates[best]
    everything = np.arange(len(labels))
    return LinearProbe(
        rate=rate,
        held_out=tuple(accuracy),
        heads=_train(features, labels, everything, [rate], settings, generator, device),
    )


def stratified(labels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Draw a share of the images of each class, rounded, at least one; return their places, sorted.

    Args:
        labels: int64 [n].
        share: in (0, 1].
        generator: what draws.

    Raises:
        ValueError: another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in (0, 1], got {share}")
    chosen = []
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        chosen.append(places[: max(1, round(share * len(places)))])
    return np.sort(np.concatenate(chosen))


# L2 weight over images: the value that the StoP authors' evaluation command states.
PUBLISHED_L2 = 0.0025


def logistic_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    *,
    share: float = 0.01,
    seed: int,
    l2: float = PUBLISHED_L2,
) -> tuple[Tensor, int]:
    """Classify by a logistic regression on a stratified share of the training labels.

    Multinomial, without intercept, mean cross-entropy + l2 / (2 n) |W|^2 with the published ``l2``, on
    features standardised by the mean and deviation of the n labelled images (the authors' program
    standardises the test features by those of the test set instead, and solves with cyanure to a
    tolerance of 1e-3).

    Args:
        train: [n_all, D], of which a share is used.
        labels: int64 [n_all].
        test: [m, D].
        share: of the training labels, at least one image a class.
        seed: of the subset.
        l2: weight of the penalty, times n.

    Returns:
        Predictions int64 [m] on the CPU, and the number of labelled images.

    Raises:
        ValueError: shapes that do not fit, a share outside (0, 1], or one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    require_features(train, labels)
    named = labels.cpu().numpy()
    chosen = stratified(named, share, np.random.default_rng(seed))
    if len(np.unique(named)) < 2:
        raise ValueError(f"expected at least two classes, got {np.unique(named).tolist()}")
    model = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-3, max_iter=1000),
    )
    model.fit(train[chosen].cpu().float().numpy(), named[chosen])
    return torch.from_numpy(model.predict(test.cpu().float().numpy())), len(chosen)


def _train(
    features: Tensor,
    labels: Tensor,
    rows: np.ndarray,
    rates: Sequence[float],
    settings: LinearSettings,
    generator: np.random.Generator,
    device: torch.device,
) -> Heads:
    classes, count = int(labels.max()) + 1, len(rates)
    mean, scale = _moments(features, rows, device)
    weight = torch.zeros(features.shape[1], count * classes, device=device)
    heads = Heads(weight, torch.zeros(count * classes, device=device), mean, scale)
    speed = tuple(torch.zeros_like(p) for p in heads[:2])
    batch_size = settings.batch_size or min(1024, max(128, len(rows) // 100))
    rate = torch.tensor(rates, device=device).repeat_interleave(classes) * (batch_size / 256)
    batches = math.ceil(len(rows) / batch_size)
    total = settings.epochs * batches
    for epoch in range(settings.epochs):
        order = torch.from_numpy(generator.permutation(rows))
        for number, batch in enumerate(order.chunk(batches)):
            wanted = labels[batch].to(device)
            x = heads.standardise(features, batch)
            # The gradient of the mean cross-entropy by the logits: softmax less one at the label.
            error = torch.addmm(heads.bias, x, weight).view(-1, count, classes).softmax(2)
            index = wanted[:, None, None].expand(-1, count, 1)
            error.scatter_add_(2, index, error.new_full((), -1.0).expand(index.shape))
            error = error.flatten(1) / len(batch)
            step = rate * (0.5 + 0.5 * math.cos(math.pi * (epoch * batches + number) / total))
            for parameter, velocity, gradient in zip(
                heads[:2], speed, (x.T @ error, error.sum(0)), strict=True
            ):
                velocity.mul_(settings.momentum).add_(gradient)
                parameter.sub_(velocity * step)
    return heads


def _score(
    heads: Heads, features: Tensor, labels: Tensor, rows: np.ndarray, count: int
) -> tuple[list[float], list[float]]:
    """Accuracy and mean cross-entropy of each head."""
    correct, loss = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for batch in torch.from_numpy(rows).split(_CHUNK):
        logits = heads.logits(features, batch).view(len(batch), count, -1).cpu()
        wanted = labels[batch]
        correct += (logits.argmax(2) == wanted[:, None]).sum(0)
        index = wanted[:, None, None].expand(-1, count, 1)
        loss -= logits.double().log_softmax(2).gather(2, index).sum((0, 2))
    return (correct / len(rows)).tolist(), (loss / len(rows)).tolist()


def _moments(features: Tensor, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of each column over these rows, fp32 [D]."""
    parts = torch.from_numpy(rows).split(_CHUNK)
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    square = total.clone()
    for part in parts:
        total += features[part.to(features.device)].double().sum(0)
    mean = total / len(rows)
    for part in parts:
        square += (features[part.to(features.device)].double() - mean).square().sum(0)
    variance = square / len(rows)
    return mean.float().to(device), (variance + _EPS).rsqrt().float().to(device)
