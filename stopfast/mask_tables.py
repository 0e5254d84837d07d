"""What blocks of patches cover, on the host: eight patches in a word, so that it is quick to subtract."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stopfast.pos_embed import Grid


class BlockTables(NamedTuple):
    """A block of one size at every place of the grid."""

    words: Tensor
    """int64 [N, W]: eight patches a word, each a byte that is 1 where the block at that place covers it.
    Words are an eighth of the work of single patches; the last one is filled up with zeros."""
    inside: Tensor
    """int64 [height * width]: the block's positions, counted from its top left one."""

    @classmethod
    def of(cls, block: Grid, grid: Grid) -> "BlockTables":
        """Work out the tables of blocks of ``block`` (height, width) on a grid."""
        inside = []
        for side, size in zip(grid, block, strict=True):
            offset = torch.arange(side) - torch.arange(side)[:, None]
            inside.append((offset >= 0) & (offset < size))
        cover = inside[0][:, None, :, None] & inside[1][None, :, None, :]
        cover = torch.nn.functional.pad(cover.flatten(2).flatten(0, 1), (0, -math.prod(grid) % 8))
        rows = torch.arange(block[0]) * grid[1]
        places = (rows[:, None] + torch.arange(block[1])).flatten()
        return cls(cover.view(torch.int64), places)

    def without(self, places: Tensor, covered: Tensor) -> Tensor:
        """Patches of blocks at places [B, E], less what is covered [B, W]: bool [B, E, 8 * W]."""
        return (self.words[places] & ~covered[:, None]).view(torch.bool)


def first_positions(member: Tensor, rank: Tensor, kept: int) -> Tensor:
    """Positions of the first ``kept`` true of each row of [B, E, N], by their running count."""
    rows, patches = member.shape[:2], member.shape[2]
    # numpy compares and searches six times as fast as torch
    order = rank.numpy()
    found = torch.from_numpy(np.flatnonzero(member.numpy() & (order <= kept)))
    start = torch.arange(0, rows.numel() * patches, patches)
    return found.view(*rows, kept) - start.view(*rows, 1)
