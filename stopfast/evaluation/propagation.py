"""Label propagation through drawn clips: are features of the same thing alike from frame to frame?

The clips stand in for DAVIS-2017, which StoP's authors use with the protocol of Caron et al. (DINO,
2021; after Jabri et al., *Space-Time Correspondence as a Contrastive Random Walk*, 2020). They are far
simpler, and no figure of them can be compared with a published one; they compare encoders with each
other on equal terms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from stopfast.config import Transforms
from stopfast.evaluation.drawing import gratings, sampler, to_input
from stopfast.evaluation.features import Representation
from stopfast.pos_embed import Grid

OBJECTS = 2
_STREAM = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PropagationSettings:
    """How many clips, and how labels pass from frame to frame."""

    clips: int = 32
    frames: int = 8
    seed: int = 0
    """Of the clips."""
    neighbours: int = 5
    """Patches of earlier frames that a patch takes its label from."""
    temperature: float = 0.1
    queue: int = 7
    """Frames just before that are looked at, beside the first."""
    radius: float = 0.2
    """How far away a patch may be, as a share of the longer side of the grid; at least one patch."""

    def __post_init__(self) -> None:
        numbers = (self.frames - 1, self.neighbours, self.queue)
        if self.clips < 2 or min(numbers) < 1 or self.temperature <= 0 or not 0 < self.radius <= 1:
            raise ValueError(
                "expected clips and frames >= 2, neighbours and queue >= 1, temperature > 0 "
                f"and radius in (0, 1], got {self}"
            )


class Propagated(NamedTuple):
    """J of each clip: intersection over union, mean over objects and the frames after the first."""

    scores: dict[str, np.ndarray]
    """fp64 [clips], by source."""
    unmoved: float
    """Mean J of the first frame's labels kept where they are: what no features at all give."""


class Clip(NamedTuple):
    """A short film with what is where."""

    pixels: np.ndarray
    """fp32 [T, H, W, 3] in 0..1."""
    labels: np.ndarray
    """int64 [T, H, W], 0 for the background, then the objects."""


def draw_clip(seed: int, index: int, size: tuple[int, int], frames: int) -> Clip:
    """Draw two textured shapes that move, turn and deform before a textured background that drifts.

    A pure function of its arguments. The shapes' textures move with them; one starts left, the other
    right, and where they meet the second is in front. Over the clip each goes about a fifth of the
    shorter side.

    Args:
        seed, index: of the draws.
        size: (H, W) in pixels.
        frames: T.
    """
    side = min(size)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    pixels, labels = [], []
    for time in np.linspace(0.0, 1.0, frames):
        draws = sampler(seed, index, _STREAM)  # the same draws for every frame
        drift = draws.uniform(-0.1, 0.1, 2) * side * time
        frame = _surface(draws, rows - drift[0], columns - drift[1], side)
        label = np.zeros(size, dtype=np.int64)
        for number in range(1, OBJECTS + 1):
            place = np.array([draws.uniform(0.35, 0.65), draws.uniform(0.2, 0.34)])
            place[1] += 0.46 * (number - 1)
            heading = draws.uniform(0, 2 * np.pi)
            place = place * size + 0.2 * side * time * np.array([np.sin(heading), np.cos(heading)])
            down, right = rows - place[0], columns - place[1]
            turn = draws.uniform(-0.8, 0.8) * time
            up, along = (
                np.cos(turn) * down - np.sin(turn) * right,
                np.sin(turn) * down + np.cos(turn) * right,
            )
            angle = np.arctan2(up, along)
            edge = np.full(size, draws.uniform(0.15, 0.2))
            for waves in (2, 3):
                depth, phase, speed = draws.uniform([0.05, 0, -2], [0.2, 2 * np.pi, 2])
                edge *= 1 + depth * np.sin(waves * angle + phase + speed * time)
            inside = np.hypot(up, along) < edge * side
            frame = np.where(inside[..., None], _surface(draws, up, along, side), frame)
            label[inside] = number
        pixels.append(frame.clip(0, 1))
        labels.append(label)
    return Clip(np.stack(pixels).astype(np.float32), np.stack(labels))


@torch.no_grad()
def propagate_labels(
    sources: Mapping[str, Representation],
    transforms: Transforms,
    *,
    device: torch.device,
    settings: PropagationSettings | None = None,
) -> Propagated:
    """Carry the first frame's labels through clips by the similarity of patch features alone.

    Each patch takes its label from the ``neighbours`` most similar patches (cosine s, weights
    exp(s / temperature)) of the first frame and of the ``queue`` frames before it, within ``radius``.
    Labels of patches, as shares, are scaled up bilinearly to pixels. Nothing is learnt.

    Args:
        sources: by name.
        transforms: size, mean and deviation of what the encoders see; frames are of that size.
        device: of the encoders.
        settings: default ``PropagationSettings()``.
    """
    settings = settings or PropagationSettings()
    scores: dict[str, list[float]] = {name: [] for name in sources}
    unmoved = []
    for index in range(settings.clips):
        clip = draw_clip(settings.seed, index, transforms.size, settings.frames)
        images = to_input(clip.pixels, transforms).to(device)
        truth = torch.from_numpy(clip.labels)
        unmoved.append(region_similarity(truth[:1].expand_as(truth[1:]), truth[1:]))
        for name, source in sources.items():
            grid = source.grid(images)
            said = propagate(source(images).patches, truth[0], grid, settings)
            scores[name].append(region_similarity(said, truth[1:]))
    by_source = {name: np.array(values) for name, values in scores.items()}
    return Propagated(by_source, float(np.mean(unmoved)))


def propagate(patches: Tensor, first: Tensor, grid: Grid, settings: PropagationSettings) -> Tensor:
    """Carry labels through one clip; see :func:`propagate_labels`.

    Args:
        patches: [T, N, D], patch features in raster order.
        first: int64 [H, W], labels of the first frame.
        grid: (rows, columns) of the N patches.
        settings: how.

    Returns:
        int64 [T - 1, H, W] on the CPU, labels of the other frames.
    """
    rows, columns = grid
    features = normalize(patches.float(), dim=2)
    classes = max(OBJECTS, int(first.max())) + 1
    shares = one_hot(first, classes).float().unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
    known = [shares.mean((1, 3)).flatten(0, 1).to(features.device)]
    near = _near(grid, settings.radius).to(features.device)
    for now in range(1, len(features)):
        seen = [0, *range(max(1, now - settings.queue), now)]
        earlier = features[seen].flatten(0, 1)
        labels = torch.cat([known[frame] for frame in seen])
        similarity = features[now] @ earlier.T
        similarity = similarity.masked_fill(~near.repeat(1, len(seen)), -torch.inf)
        best, place = similarity.topk(min(settings.neighbours, len(earlier)), dim=1)
        weights = (best / settings.temperature).softmax(1)
        known.append((weights[..., None] * labels[place]).sum(1))
    maps = torch.stack(known[1:]).mT.unflatten(2, (rows, columns))
    maps = interpolate(maps, size=tuple(first.shape), mode="bilinear", align_corners=False)
    return maps.argmax(1).cpu()


def region_similarity(said: Tensor, truth: Tensor) -> float:
    """Return J: the mean over frames and objects of intersection over union; int64 [T, H, W] each.

    An object that is in neither map of a frame counts as 1, as in the DAVIS evaluation.
    """
    found = []
    for number in range(1, OBJECTS + 1):
        one, other = said == number, truth == number
        together = (one | other).sum((1, 2))
        shared = (one & other).sum((1, 2))
        found.append(torch.where(together > 0, shared / together.clamp_min(1), 1.0))
    return float(torch.stack(found).double().mean())


def _near(grid: Grid, radius: float) -> Tensor:
    """Which patches a patch may look at, bool [N, N]: at most so far up, down, left and right."""
    rows, columns = (torch.arange(count) for count in grid)
    places = torch.cartesian_prod(rows, columns)
    reach = max(1, round(radius * max(grid)))
    return (places[:, None] - places).abs().amax(2) <= reach


def _surface(
    draws: np.random.Generator, rows: np.ndarray, columns: np.ndarray, side: int
) -> np.ndarray:
    """A coloured texture at places, fp64 [H, W, 3]."""
    colour, contrast = draws.uniform(0.3, 0.7, 3), draws.uniform(-0.4, 0.4, 3)
    return colour + contrast * gratings(draws, rows, columns, side)[..., None]
