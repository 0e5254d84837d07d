"""The multi-block mask sampler of I-JEPA and StoP, for a whole batch at once."""

import math
import multiprocessing
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from stopfast.kernels.ops import (
    FAILURES_PER_TARGET,
    FUSED,
    MASK_STREAM,
    MaskSettings,
    Ops,
    ops_on,
    resolve_ops,
)
from stopfast.mask_tables import BlockTables, first_positions
from stopfast.philox import words
from stopfast.pos_embed import Grid
from stopfast.transfers import SideStream, filled_pair, read, send

Range = tuple[float, float]
Truncate = Literal["first", "random"]
Scope = Literal["local", "global"]

_MAX_PATCHES = 1 << 13  # a table has a byte for each pair of them: 64 MiB
_KEEP_STREAM = 1 << 32  # numpy's random numbers that choose what a context keeps


class Masks(NamedTuple):
    """Index tensors of one batch: int64, ascending raster order within each row, then any padding."""

    context: list[Tensor]
    """E tensors [B, Kx]."""
    target: list[Tensor]
    """M tensors [B, Ky]."""
    lengths: Tensor | None = None
    """int32 [2] on the device: how many of the Kx and of the Ky are no padding. None for all."""


class Sizes(NamedTuple):
    """(height, width) of the blocks of one iteration."""

    target: Grid
    context: Grid


def block_size(draw: float, scale: Range, aspect_ratio: Range, grid: Grid) -> Grid:
    """Return (height, width) of a block; one draw decides area and aspect ratio, as published.

    Small blocks are therefore wide and large ones tall, and a block never spans a side of the grid.
    """
    area = int(grid[0] * grid[1] * (scale[0] + draw * (scale[1] - scale[0])))
    aspect = aspect_ratio[0] + draw * (aspect_ratio[1] - aspect_ratio[0])
    height = min(round(math.sqrt(area * aspect)), grid[0] - 1)
    width = min(round(math.sqrt(area / aspect)), grid[1] - 1)
    return height, width


class MultiBlockMasks:
    """Sample M target blocks and E context blocks for each image of a batch, without a loop over images.

    Block sizes are a function of the iteration alone and equal those of the published programs. Block
    places are a function of (seed, iteration, position in the batch), the same wherever they are drawn:
    on the host, or by the fused operation (``Ops.multiblock_masks``). A context block loses what the
    image's target blocks cover, is drawn again until more than ``min_keep`` patches survive, and every
    20 failures one more of the last targets stops to constrain it. All context masks are cut to the
    shortest of the batch.

    Args:
        grid: (rows, columns) of patches.
        enc_mask_scale: area of a context block as a share of the grid; its aspect ratio is 1.
        pred_mask_scale: area of a target block as a share of the grid.
        aspect_ratio: height over width of a target block.
        nenc: context masks E.
        npred: target masks M.
        min_keep: a context must keep more patches than this.
        allow_overlap: let contexts keep the patches of targets (I-JEPA's option).
        edge_inclusive: let blocks reach the last row and column; the published sampler never does.
        truncate: keep the ``"first"`` patches in raster order (published; it favours the top of the
            image) or a ``"random"`` choice.
        truncate_over: the shortest mask of the ``"local"`` part (published) or of the whole
            ``"global"`` batch, which makes accumulated micro-batches equal the big batch.
        seed: seed of the places, less than 2**63.
        ops: where they are FUSED's, masks are drawn on the device, unless the truncation is random.

    Raises:
        ValueError: ranges or counts that no block on this grid can satisfy.
    """

    def __init__(
        self,
        grid: Grid = (14, 14),
        enc_mask_scale: Range = (0.85, 1.0),
        pred_mask_scale: Range = (0.15, 0.2),
        aspect_ratio: Range = (0.75, 1.5),
        nenc: int = 1,
        npred: int = 4,
        min_keep: int = 10,
        allow_overlap: bool = False,
        *,
        edge_inclusive: bool = False,
        truncate: Truncate = "first",
        truncate_over: Scope = "local",
        seed: int = 0,
        ops: Ops | str = "auto",
    ) -> None:
        for name, (low, high) in (
            ("enc_mask_scale", enc_mask_scale),
            ("pred_mask_scale", pred_mask_scale),
        ):
            if not 0 < low <= high <= 1:
                raise ValueError(f"expected {name} with 0 < low <= high <= 1, got {(low, high)}")
        if not 0 < aspect_ratio[0] <= aspect_ratio[1]:
            raise ValueError(f"expected aspect_ratio with 0 < low <= high, got {aspect_ratio}")
        if math.prod(grid) > _MAX_PATCHES:
            raise ValueError(f"expected a grid of at most {_MAX_PATCHES} patches, got {grid}")
        if nenc < 1 or npred < 1 or min_keep < 0 or not 0 <= seed < 1 << 63:
            raise ValueError(
                "expected nenc >= 1, npred >= 1, min_keep >= 0 and 0 <= seed < 2**63, "
                f"got {nenc}, {npred}, {min_keep} and {seed}"
            )
        if truncate not in ("first", "random") or truncate_over not in ("local", "global"):
            raise ValueError(
                "expected truncate 'first' or 'random' and truncate_over 'local' or 'global', "
                f"got {truncate!r} and {truncate_over!r}"
            )
        self.grid = grid
        self.enc_mask_scale = enc_mask_scale
        self.pred_mask_scale = pred_mask_scale
        self.aspect_ratio = aspect_ratio
        self.nenc, self.npred, self.min_keep = nenc, npred, min_keep
        self.allow_overlap = allow_overlap
        self.edge_inclusive = edge_inclusive
        self.truncate, self.truncate_over = truncate, truncate_over
        self.seed = seed
        self.ops = resolve_ops(ops)
        self._known: dict[Grid, BlockTables] = {}
        self._beside = SideStream(priority=-1)
        self._check_sizes()

    def _check_sizes(self) -> None:
        # The extremes of the draw bound every size: height and width each grow or shrink with it.
        for draw in (0.0, 1.0 - 2**-24):
            context = block_size(draw, self.enc_mask_scale, (1.0, 1.0), self.grid)
            if context[0] * context[1] <= self.min_keep:
                raise ValueError(
                    f"expected context blocks of more than min_keep={self.min_keep} patches, got "
                    f"{context[0]}x{context[1]} on a grid of {self.grid[0]}x{self.grid[1]}"
                )
            target = block_size(draw, self.pred_mask_scale, self.aspect_ratio, self.grid)
            if min(target) < 1:
                raise ValueError(
                    f"expected target blocks of at least one patch, got {target[0]}x{target[1]} on a "
                    f"grid of {self.grid[0]}x{self.grid[1]}"
                )

    def sizes(self, iteration: int) -> Sizes:
        """Return the block sizes of an iteration (0, 1, ...), the same for every image and rank."""
        generator = torch.Generator().manual_seed(iteration)
        target, context = torch.rand(2, generator=generator).tolist()
        return Sizes(
            block_size(target, self.pred_mask_scale, self.aspect_ratio, self.grid),
            block_size(context, self.enc_mask_scale, (1.0, 1.0), self.grid),
        )

    def __call__(
        self,
        batch_size: int,
        iteration: int,
        *,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Masks:
        """Return the masks of images ``start:stop`` of a batch of ``batch_size``.

        With ``truncate_over="global"`` the length is that of the whole batch, whichever part is asked
        for. On a GPU nothing waits for what it was given to do before: masks of the host are copied in
        their turn, and those of the fused operation are drawn on a stream of their own, whose numbers
        of patches are waited for.

        Raises:
            ValueError: an empty or outlying part of the batch.
        """
        stop = batch_size if stop is None else stop
        if not 0 <= start < stop <= batch_size:
            raise ValueError(f"expected 0 <= start < stop <= {batch_size}, got {start} and {stop}")
        images = range(start, stop) if self.truncate_over == "local" else range(batch_size)
        part = slice(start - images.start, stop - images.start)
        device = torch.device(device)
        operation = ops_on(self.ops, device).multiblock_masks
        if operation is FUSED.multiblock_masks and self.truncate == "first":
            return self._on_device(images, part, iteration, device)
        target, context = self.sizes(iteration)
        places = self._places(images, iteration, 0, [target] * self.npred + [context] * self.nenc)
        tables = self._tables(target), self._tables(context)
        targets, contexts = places.split([self.npred, self.nenc], dim=1)
        binding = 0 if self.allow_overlap else self.npred
        member = tables[1].without(contexts, self._covered(tables[0], targets, binding))
        rank = member.cumsum(-1, dtype=torch.int16)
        kept = int(rank[..., -1].min())
        if kept <= self.min_keep:
            member, rank, kept = self._redraw(member, tables, targets, context, images, iteration)
        if self.truncate_over == "global":
            member, rank, targets = member[part], rank[part], targets[part]
        if self.truncate == "first":
            index = first_positions(member, rank, kept)
        else:
            index = self._random_subset(member, kept, batch_size, iteration, slice(start, stop))
        raster = targets[:, :, None] + tables[0].inside
        return Masks(list(send(index, device).unbind(1)), list(send(raster, device).unbind(1)))

    def _on_device(self, images: range, part: slice, iteration: int, device: torch.device) -> Masks:
        settings = MaskSettings(
            self.grid, self.nenc, self.npred, self.min_keep, self.allow_overlap, self.edge_inclusive
        )
        gpu = device.type == "cuda"
        with self._beside.beside(device, after=False) if gpu else nullcontext():
            seed = filled_pair(self.seed, iteration, device, torch.int64)
            ids = torch.arange(images.start, images.stop, device=device)
            targets, contexts, counts = FUSED.multiblock_masks(
                seed, ids, *self.sizes(iteration), settings
            )
            found = [counts.min()]
            if not self.allow_overlap:
                found.append(_overlap(targets, contexts, found[0], math.prod(self.grid)))
            kept, *overlap = read(torch.stack(found))
        if gpu:
            self._beside.join(device, targets, contexts)
        if any(overlap):
            self._warn_of_overlap()
        cut, targets = contexts[:, part, :kept].contiguous(), targets[:, part].contiguous()
        return Masks(list(cut.unbind(0)), list(targets.unbind(0)))

    def _places(
        self, images: range, iteration: int, attempt: int, blocks: list[Grid], first: int = 0
    ) -> Tensor:
        """Draw each block's top left position, int64 [images, blocks]; they are numbered from ``first``.

        Words 2j and 2j + 1 of an image's stream are those of block j: a quad serves two blocks.
        """
        # Exclusive bounds, as published: the last place that would fit is never drawn.
        span = np.array(self.grid) - np.array(blocks) + int(self.edge_inclusive)
        quads = range(first // 2, (first + len(blocks) + 1) // 2)
        drawn = words((self.seed, iteration), images, quads, MASK_STREAM, attempt)
        drawn = drawn.reshape(len(images), -1, 2)[:, first % 2 :][:, : len(blocks)]
        corners = (drawn * span.astype(np.uint64) >> np.uint64(32)).view(np.int64)
        return torch.from_numpy(corners[..., 0] * self.grid[1] + corners[..., 1])

    def _tables(self, block: Grid) -> BlockTables:
        """What a block covers, for each place: there are few sizes, so each is worked out once."""
        if block not in self._known:
            self._known[block] = BlockTables.of(block, self.grid)
        return self._known[block]

    @staticmethod
    def _covered(table: BlockTables, targets: Tensor, binding: int) -> Tensor:
        """What the first ``binding`` targets of each image cover: words [B, W]."""
        rows = table.words.index_select(0, targets[:, :binding].flatten())
        covered = table.words.new_zeros(len(targets), table.words.shape[1])
        # A loop over the few masks is faster than a reduction over an axis of that length.
        for row in rows.view(len(targets), binding, table.words.shape[1]).unbind(1):
            covered |= row
        return covered

    def _redraw(
        self,
        member: Tensor,
        tables: tuple[BlockTables, BlockTables],
        targets: Tensor,
        context: Grid,
        images: range,
        iteration: int,
    ) -> tuple[Tensor, Tensor, int]:
        """Draw the contexts that are too small again, until none is.

        Returns the patches of each context, their running count, and the shortest context's length.
        """
        for attempt in range(1, FAILURES_PER_TARGET * self.npred + 1):
            dropped, failures = divmod(attempt, FAILURES_PER_TARGET)
            if dropped and not failures:
                self._warn_of_overlap()
            places = self._places(images, iteration, attempt, [context] * self.nenc, self.npred)
            covered = self._covered(tables[0], targets, self.npred - dropped)
            drawn = tables[1].without(places, covered)
            member = torch.where(member.sum(-1, keepdim=True) <= self.min_keep, drawn, member)
            rank = member.cumsum(-1, dtype=torch.int16)
            kept = int(rank[..., -1].min())
            if kept > self.min_keep:
                return member, rank, kept
        raise AssertionError("an unconstrained context is larger than min_keep")

    def _warn_of_overlap(self) -> None:
        warnings.warn(
            f"no context of more than {self.min_keep} patches is free of all targets: some "
            "contexts overlap targets; fewer or smaller targets avoid this",
            stacklevel=4,
        )

    def _random_subset(
        self, member: Tensor, kept: int, batch_size: int, iteration: int, part: slice
    ) -> Tensor:
        """Positions of ``kept`` patches of each context at random, ascending: [B, E, kept]."""
        bits = np.random.Philox(key=self.seed, counter=[0, _KEEP_STREAM, iteration, 0])
        generator = np.random.Generator(bits)
        keys = generator.random((batch_size, *member.shape[1:]), dtype=np.float32)[part]
        ranked = torch.from_numpy(keys).masked_fill_(~member, -1.0)
        return ranked.topk(kept, dim=-1).indices.sort(-1).values


def _overlap(targets: Tensor, contexts: Tensor, shortest: Tensor, patches: int) -> Tensor:
    """Whether a context has a patch of its image's targets among its first ``shortest``: 0 or 1."""
    covered = torch.zeros(targets.shape[1], patches, dtype=torch.bool, device=targets.device)
    covered.scatter_(1, targets.transpose(0, 1).flatten(1), True)
    real = torch.arange(contexts.shape[2], device=contexts.device) < shortest
    met = covered.expand(len(contexts), *covered.shape).gather(2, contexts)
    return (met & real).any().to(shortest)


class MaskCollator:
    """The published collator's constructor and call, over :class:`MultiBlockMasks`.

    Called on a list of samples it returns (default-collated batch, E context masks, M target masks).
    Workers share the iteration counter, whose value decides the block sizes; places are seeded from
    torch's global generator, which the loader seeds differently in each worker.

    Raises:
        ValueError: as :class:`MultiBlockMasks`.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = (224, 224),
        patch_size: int = 16,
        enc_mask_scale: Range = (0.2, 0.8),
        pred_mask_scale: Range = (0.2, 0.8),
        aspect_ratio: Range = (0.3, 3.0),
        nenc: int = 1,
        npred: int = 2,
        min_keep: int = 4,
        allow_overlap: bool = False,
    ) -> None:
        height, width = (input_size,) * 2 if isinstance(input_size, int) else input_size
        self.masks = MultiBlockMasks(
            grid=(height // patch_size, width // patch_size),
            enc_mask_scale=(enc_mask_scale[0], enc_mask_scale[1]),
            pred_mask_scale=(pred_mask_scale[0], pred_mask_scale[1]),
            aspect_ratio=(aspect_ratio[0], aspect_ratio[1]),
            nenc=nenc,
            npred=npred,
            min_keep=min_keep,
            allow_overlap=allow_overlap,
        )
        self._iteration = multiprocessing.Value("i", -1)

    def step(self) -> int:
        """Advance the shared counter and return its new value."""
        with self._iteration.get_lock():
            self._iteration.value += 1
            return self._iteration.value

    def __call__(self, samples: Sequence[Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
        """Collate samples and draw their masks."""
        iteration = self.step()
        self.masks.seed = int(torch.randint(torch.iinfo(torch.int64).max, ()))
        masks = self.masks(len(samples), iteration)
        return default_collate(list(samples)), masks.context, masks.target
