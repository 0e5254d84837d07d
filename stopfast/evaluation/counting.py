"""Counting objects and saying where they are, in scenes that are drawn: do features keep what is where?

The scenes stand in for CLEVR and its counting task, which StoP's authors use. They are far simpler, and
no figure of them can be compared with a published one; they compare encoders with each other on equal
terms.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stopfast.config import Transforms
from stopfast.evaluation.drawing import gratings, sampler, to_input
from stopfast.evaluation.features import Representation
from stopfast.evaluation.ridge import Moments

MOST = 8
_STREAM = 0  # of the draws
_FOLDS = 5
_RADIUS = (0.07, 0.11)
_GAP = 0.02
_CONTRAST = 0.3
_TEXTURE = 0.06


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingSettings:
    """How many scenes, and how they are drawn."""

    train: int = 1000
    test: int = 500
    seed: int = 0
    """Of the scenes."""
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.train < 10 * MOST or self.test < 2 or self.batch_size < 1:
            raise ValueError(
                f"expected train >= {10 * MOST}, test >= 2 and batch_size >= 1, "
                f"got {self.train}, {self.test} and {self.batch_size}"
            )


class Scene(NamedTuple):
    """One drawn picture."""

    pixels: np.ndarray
    """fp32 [H, W, 3] in 0..1."""
    count: int
    """Objects, 1..8."""
    covered: np.ndarray
    """bool [H, W], where an object is."""


class Counted(NamedTuple):
    """What the probes found, by test scene."""

    count: np.ndarray
    """bool [scenes]: the number of objects is right."""
    where: np.ndarray
    """fp64 [scenes]: correlation over patches of where objects are said to be with where they are."""


def draw_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw 1 to 8 discs, squares and triangles at random places, apart, on a textured background.

    A pure function of its arguments. Colours of objects and background are drawn alike, only different
    enough to be seen, so that no single pixel tells an object; sizes do not depend on the number.

    Args:
        seed, index: of the draws; ``index % 8 + 1`` is the number of objects, so all are equally
        frequent.
        size: (H, W) in pixels.
    """
    draws = sampler(seed, index, _STREAM)
    height, width = size
    count = index % MOST + 1
    rows, columns = np.mgrid[:height, :width] + 0.5
    base = draws.uniform(0.35, 0.65) + draws.uniform(-0.05, 0.05, 3)
    pixels = base + _TEXTURE * gratings(draws, rows, columns, min(size))[..., None]
    covered = np.zeros(size, dtype=bool)
    placed: list[tuple[float, float, float]] = []
    while len(placed) < count:
        radius = draws.uniform(*_RADIUS) * min(size)
        centre = draws.uniform(radius, np.array(size) - radius)
        apart = [np.hypot(*(centre - (y, x))) - r - radius for y, x, r in placed]
        if min(apart, default=np.inf) < _GAP * min(size):
            continue
        placed.append((*centre, radius))
        shape = _shape(draws, rows - centre[0], columns - centre[1], radius)
        colour = draws.uniform(0, 1, 3)
        while np.abs(colour - base).max() < _CONTRAST:
            colour = draws.uniform(0, 1, 3)
        texture = _TEXTURE * gratings(draws, rows, columns, min(size))[..., None]
        pixels = np.where(shape[..., None], colour + texture, pixels)
        covered |= shape
    return Scene(pixels.clip(0, 1).astype(np.float32), count, covered)


@torch.no_grad()
def count_and_locate(
    sources: Mapping[str, Representation],
    transforms: Transforms,
    *,
    device: torch.device,
    settings: CountingSettings | None = None,
) -> dict[str, Counted]:
    """Probe frozen features for the number of objects and for where they are.

    Both by ridge regression on standardised features. The number is regressed from the pooled features of
    the last level, at the strength that leaves the least leave-one-out error, and rounded (chance: 1 in
    8). The share of a patch that objects cover is regressed from that patch's features alone, at the
    strength that is best on every fifth training scene; a scene's score is the correlation of said and true
    shares over its patches (chance: 0).

    Args:
        sources: by name.
        transforms: size, mean and deviation of what the encoders see.
        device: of the encoders.
        settings: default ``CountingSettings()``.
    """
    settings = settings or CountingSettings()
    numbers: list[list[Tensor]] = [[], []]
    pooled: dict[str, list[list[Tensor]]] = {name: [[], []] for name in sources}
    shares = {name: (Moments(), Moments()) for name in sources}
    where: dict[str, list[Tensor]] = {name: [] for name in sources}
    for places, images, number, covered in _batches(settings, 0, settings.train, transforms):
        numbers[0].append(number)
        held = places % _FOLDS == _FOLDS - 1
        for name, source in sources.items():
            seen = source(images.to(device))
            pooled[name][0].append(_last(seen.pooled, source))
            patches, truth = seen.patches.cpu(), share_of_patches(covered, source.grid(images))
            for part, chosen in zip(shares[name], (~held, held), strict=True):
                part.add(patches[chosen], truth[chosen, :, None])
    locators = {name: Moments.choose(*parts) for name, parts in shares.items()}
    for _, images, number, covered in _batches(settings, settings.train, settings.test, transforms):
        numbers[1].append(number)
        for name, source in sources.items():
            seen = source(images.to(device))
            pooled[name][1].append(_last(seen.pooled, source))
            truth = share_of_patches(covered, source.grid(images))
            where[name].append(correlation(locators[name].predict(seen.patches)[..., 0], truth))
    known, asked = (torch.cat(parts).numpy() for parts in numbers)
    found = {}
    for name, parts in pooled.items():
        train, test = (torch.cat(part).double().numpy() for part in parts)
        found[name] = Counted(_count(train, known, test) == asked, torch.cat(where[name]).numpy())
    return found


def _count(train: np.ndarray, numbers: np.ndarray, test: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    strengths = np.logspace(-8, 2, 11) * len(train)
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=strengths)).fit(train, numbers)
    return model.predict(test).round().clip(1, MOST)


def share_of_patches(covered: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how much of each patch is covered: bool [B, H, W] to fp64 [B, N], in raster order."""
    rows, columns = grid
    cells = covered.double().unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    return cells.mean((2, 4)).flatten(1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the correlations of rows, [B, N] each to fp64 [B]; 0 where one of the two is constant."""
    first, second = (x.double() - x.double().mean(1, keepdim=True) for x in (first, second))
    scale = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(scale > 1e-12, (first * second).sum(1) / scale.clamp_min(1e-12), 0.0)


def _last(pooled: Tensor, source: Representation) -> Tensor:
    return pooled[:, -(pooled.shape[1] // source.levels) :].cpu()


def _batches(
    settings: CountingSettings, first: int, count: int, transforms: Transforms
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Places int64 [B], images fp32 [B, 3, H, W], numbers int64 [B], covered bool [B, H, W], on the CPU."""
    for places in torch.arange(first, first + count).split(settings.batch_size):
        scenes = [draw_scene(settings.seed, i, transforms.size) for i in places.tolist()]
        yield (
            places,
            to_input(np.stack([scene.pixels for scene in scenes]), transforms),
            torch.tensor([scene.count for scene in scenes]),
            torch.from_numpy(np.stack([scene.covered for scene in scenes])),
        )


def _shape(
    draws: np.random.Generator, down: np.ndarray, right: np.ndarray, radius: float
) -> np.ndarray:
    """A disc, square or triangle, turned at random, inside the circle of this radius; bool [H, W]."""
    corners = (0, 4, 3)[draws.integers(3)]
    turn = draws.uniform(0, 2 * np.pi)
    if corners == 0:
        return np.hypot(down, right) < 0.85 * radius
    inner = radius * np.cos(np.pi / corners)
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    sides = [down * np.sin(a) + right * np.cos(a) for a in angles]
    return np.max(sides, axis=0) < inner
