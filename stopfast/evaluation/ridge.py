"""Ridge regression from sums alone, so that no table of patch features is ever held."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

_STRENGTHS = tuple(10.0**power for power in range(-8, 3))


class Ridge(NamedTuple):
    """A linear regression of T targets on D features."""

    weight: Tensor
    """fp64 [D, T]."""
    bias: Tensor
    """fp64 [T]."""
    strength: float
    """The penalty that was chosen, on standardised features, per row."""

    def predict(self, features: Tensor) -> Tensor:
        """Features [..., D] to fp64 [..., T] on the CPU."""
        return features.cpu().double() @ self.weight + self.bias


class Moments:
    """Sums over rows of features, targets and their products."""

    def __init__(self) -> None:
        self.rows = 0
        self.width = 0
        self.products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: features [..., D] and targets [..., T].

        Raises:
            ValueError: as many targets as features are expected, or another D or T than before.
        """
        if features.shape[:-1] != targets.shape[:-1]:
            raise ValueError(
                f"expected targets {list(features.shape[:-1])} + [T], got {list(targets.shape)}"
            )
        x, y = (v.cpu().double().flatten(0, -2) for v in (features, targets))
        joined = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x, y], dim=1)
        if not self.rows:
            self.width = x.shape[1]
            self.products = torch.zeros(joined.shape[1], joined.shape[1], dtype=torch.float64)
        if (joined.shape[1], x.shape[1]) != (len(self.products), self.width):
            raise ValueError(
                f"expected {self.width} features and {len(self.products) - 1 - self.width} targets, "
                f"got {x.shape[1]} and {y.shape[1]}"
            )
        self.rows += len(x)
        self.products += joined.T @ joined

    @classmethod
    def choose(cls, fit: Self, held_out: Self) -> Ridge:
        """Choose the strength whose fit to ``fit`` errs least on ``held_out``, and fit that to both.

        The penalty is strength * rows * |w|^2 / 2 of standardised features, the bias free; strengths
        are powers of ten from 1e-8 to 100.

        Raises:
            ValueError: no rows in one of the two.
        """
        if not fit.rows or not held_out.rows:
            raise ValueError(
                f"expected rows to fit and rows to choose on, got {fit.rows} and {held_out.rows}"
            )
        errors = [held_out._error(fit._solve(strength)) for strength in _STRENGTHS]
        both = cls()
        both.rows, both.width = fit.rows + held_out.rows, fit.width
        both.products = fit.products + held_out.products
        return both._solve(_STRENGTHS[int(torch.tensor(errors).argmin())])

    def _solve(self, strength: float) -> Ridge:
        """Fit, on features standardised by these sums."""
        first, last = 1, 1 + self.width
        mean = self.products[0] / self.rows
        covariance = self.products / self.rows - mean[:, None] * mean
        scale = covariance.diagonal()[first:last].clamp_min(1e-12).rsqrt()
        gram = covariance[first:last, first:last] * scale[:, None] * scale
        cross = covariance[first:last, last:] * scale[:, None]
        # Of columns that are copies of each other, a penalty above rounding makes one solution.
        penalty = strength * torch.eye(self.width, dtype=torch.float64)
        weight = torch.linalg.solve(gram + penalty, cross) * scale[:, None]
        return Ridge(weight, mean[last:] - mean[first:last] @ weight, strength)

    def _error(self, ridge: Ridge) -> float:
        """Mean squared error of a regression on these rows."""
        last = 1 + self.width
        targets = len(self.products) - last
        residual = torch.cat(
            [-ridge.bias[None], -ridge.weight, torch.eye(targets, dtype=torch.float64)]
        )
        return float((residual * (self.products @ residual)).sum() / self.rows)
