"""The published multi-block mask sampler as two Python loops over images.

`torch_loop_masks` draws and paints with torch operations in the published order of calls to the
global generator, so a seed reproduces the published masks. `numpy_loop_masks` is what a careful
person writes without vectorising over images. Both keep the published rules: block sizes are a
function of the step alone and shared by the batch; a draw's upper bound is exclusive, so the last
row and column are never reached; a context loses its patches inside its targets and is drawn again
until more than `min_keep` survive; lists are cut to the shortest of the batch from the front.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

Range = tuple[float, float]
Masks = tuple[list[Tensor], list[Tensor]]
RETRIES = 20  # failures before one more target stops constraining the context


class Rules(NamedTuple):
    """Parameters of the sampler; defaults are those of the published configurations."""

    height: int = 14
    width: int = 14
    enc_mask_scale: Range = (0.85, 1.0)
    pred_mask_scale: Range = (0.15, 0.2)
    aspect_ratio: Range = (0.75, 1.5)
    nenc: int = 1
    npred: int = 4
    min_keep: int = 10
    allow_overlap: bool = False

    def block_sizes(self, step: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the step's target blocks and of its context block."""
        generator = torch.Generator().manual_seed(step)
        target_draw = torch.rand(1, generator=generator).item()
        context_draw = torch.rand(1, generator=generator).item()
        target = self._block_size(target_draw, self.pred_mask_scale, self.aspect_ratio)
        context = self._block_size(context_draw, self.enc_mask_scale, (1.0, 1.0))
        if context[0] * context[1] <= self.min_keep:
            raise ValueError(f"a context block of {context} can never keep > {self.min_keep}")
        return target, context

    def _block_size(self, draw: float, scale: Range, aspect: Range) -> tuple[int, int]:
        """One draw sets both area and aspect: small blocks are wide, large ones tall."""
        patches = int(self.height * self.width * (scale[0] + draw * (scale[1] - scale[0])))
        ratio = aspect[0] + draw * (aspect[1] - aspect[0])
        high, wide = round((patches * ratio) ** 0.5), round((patches / ratio) ** 0.5)
        return min(high, self.height - 1), min(wide, self.width - 1)

    def constraining(self, failures: int) -> int:
        """How many of the targets still exclude their patches after so many failed draws."""
        return 0 if self.allow_overlap else max(self.npred - failures // RETRIES, 0)


PUBLISHED = Rules()


def torch_loop_masks(batch_size: int, step: int, rules: Rules = PUBLISHED) -> Masks:
    """Lists of E contexts [B, K_x] and M targets [B, K_y], from the global torch generator."""
    target_size, context_size = rules.block_sizes(step)
    contexts, targets = [], []
    for _ in range(batch_size):
        blocks = [_paint(rules, target_size) for _ in range(rules.npred)]
        targets.append([torch.nonzero(block.flatten()).squeeze(1) for block in blocks])
        outside = [1 - block for block in blocks]
        contexts.append([_torch_context(rules, context_size, outside) for _ in range(rules.nenc)])
    return _shortest(contexts), _shortest(targets)


def _paint(rules: Rules, size: tuple[int, int]) -> Tensor:
    """A map with one rectangle at a drawn place: top first, then left."""
    top = torch.randint(0, rules.height - size[0], (1,))
    left = torch.randint(0, rules.width - size[1], (1,))
    block = torch.zeros((rules.height, rules.width), dtype=torch.int32)
    block[top : top + size[0], left : left + size[1]] = 1
    return block


def _torch_context(rules: Rules, size: tuple[int, int], outside: list[Tensor]) -> Tensor:
    failures = 0
    while True:
        block = _paint(rules, size)
        for allowed in outside[: rules.constraining(failures)]:
            block *= allowed
        kept = torch.nonzero(block.flatten()).squeeze(1)
        if len(kept) > rules.min_keep:
            return kept
        failures += 1


def _shortest(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Cut every list of every image to the batch's shortest and stack the images."""
    shortest = min(len(indices) for image in lists for indices in image)
    return default_collate([[indices[:shortest] for indices in image] for image in lists])


def numpy_loop_masks(
    batch_size: int, step: int, rules: Rules = PUBLISHED, rng: np.random.Generator | None = None
) -> Masks:
    """The same masks in distribution, drawn from `rng` (freshly seeded by the step if absent)."""
    rng = rng or np.random.default_rng(step)
    (high, wide), context_size = rules.block_sizes(step)
    shape = (batch_size, rules.npred)
    tops = rng.integers(0, rules.height - high, shape).tolist()
    lefts = rng.integers(0, rules.width - wide, shape).tolist()
    targets = np.empty((rules.npred, batch_size, high * wide), dtype=np.int64)
    contexts: list[list[np.ndarray]] = [[] for _ in range(rules.nenc)]
    for image in range(batch_size):
        corners = list(zip(tops[image], lefts[image], strict=True))
        for index, (top, left) in enumerate(corners):
            block = np.zeros((rules.height, rules.width), dtype=bool)
            block[top : top + high, left : left + wide] = True
            targets[index, image] = np.flatnonzero(block)
        for copy in contexts:
            copy.append(_numpy_context(rules, context_size, corners, (high, wide), rng))
    shortest = min(len(indices) for copy in contexts for indices in copy)
    stacked = [np.stack([indices[:shortest] for indices in copy]) for copy in contexts]
    return [torch.from_numpy(c) for c in stacked], list(torch.from_numpy(targets))


def _numpy_context(
    rules: Rules,
    size: tuple[int, int],
    corners: list[tuple[int, int]],
    target_size: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    failures = 0
    while True:
        top = int(rng.integers(rules.height - size[0]))
        left = int(rng.integers(rules.width - size[1]))
        block = np.zeros((rules.height, rules.width), dtype=bool)
        block[top : top + size[0], left : left + size[1]] = True
        for y, x in corners[: rules.constraining(failures)]:
            block[y : y + target_size[0], x : x + target_size[1]] = False
        kept = np.flatnonzero(block)
        if len(kept) > rules.min_keep:
            return kept
        failures += 1
