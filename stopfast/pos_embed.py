"""Fixed sine-cosine position tables over a grid, and their transfer to another grid."""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Positions = Literal["2d", "1d"]
"""Sines and cosines of row and column, or of the number in raster order."""
Grid = tuple[int, int]


def square_grid(num_patches: int) -> Grid:
    """Return the square grid of ``num_patches`` positions.

    Raises:
        ValueError: not a square number; such a model needs its grid stated.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"expected a square number of patches or an explicit grid_size, got {num_patches} patches"
        )
    return side, side


def sincos_pos_embed(dim: int, grid: Grid) -> Tensor:
    """Position table [H * W, dim] of the published I-JEPA, StoP, MAE and DropPos programs, fp32.

    Channels [0, dim/2) encode the column, [dim/2, dim) the row; inside a half the first quarter is the
    sine and the second the cosine of ``index * 10000 ** (-k / (dim/4))``. Computed in fp64.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos_pos_embed: expected a width that is a multiple of 4, got {dim}")
    omega = 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = []
    for index in (columns, rows):
        angle = index.reshape(-1, 1) * omega
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


def sinusoid_pos_embed(dim: int, count: int) -> Tensor:
    """Position table [count, dim] of the published Beyond Masking program, fp32, in raster order.

    Channel j is the sine (even j) or cosine (odd j) of ``index / 10000 ** (2 * (j // 2) / dim)``. Computed
    in fp64.
    """
    channel = np.arange(dim)
    angle = np.arange(count)[:, None] / 10000.0 ** (2 * (channel // 2) / dim)
    return torch.from_numpy(np.where(channel % 2, np.cos(angle), np.sin(angle))).float()


def position_table(
    dim: int, grid: Grid, kind: Positions = "2d", class_token: bool = False
) -> Tensor:
    """Fixed position table [1, H * W, dim]; with a class token one row more, zeros, before the others.

    Raises:
        ValueError: a width that does not fit the kind.
    """
    by_number = kind == "1d"
    table = sinusoid_pos_embed(dim, grid[0] * grid[1]) if by_number else sincos_pos_embed(dim, grid)
    return torch.cat([table.new_zeros(int(class_token), dim), table])[None]


def interpolate_pos_embed(table: Tensor, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Resample a position table [..., H * W, D] to another grid (bicubic, patch centres aligned).

    The table is returned unchanged where the grids are equal. Every position takes part: the published
    interpolation assumes a class token that these models do not have, and is wrong for them.

    Raises:
        ValueError: the table does not have ``H * W`` rows.
    """
    if table.shape[-2] != grid_from[0] * grid_from[1]:
        raise ValueError(
            f"interpolate_pos_embed: expected {grid_from[0]}x{grid_from[1]} rows, got {table.shape[-2]}"
        )
    if grid_from == grid_to:
        return table
    image = table.reshape(-1, *grid_from, table.shape[-1]).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=grid_to, mode="bicubic", align_corners=False)
    rows = image.permute(0, 2, 3, 1).reshape(*table.shape[:-2], -1, table.shape[-1])
    return rows.to(table.dtype)
