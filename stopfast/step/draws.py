"""What is random in a step, drawn while the step before it is computed."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stopfast.objectives import Objective
from stopfast.transfers import SideStream


class StepDraws:
    """An objective's draws for each micro-batch of a step.

    With ``ahead`` on a GPU, all of them are drawn on a CUDA stream of their own, so that what they wait
    for, such as a length, is not the step that the device is computing. Draws are a pure function of the
    step: ones that nobody asks for, after a jump or at the end, are let go of.

    Args:
        objective: what draws.
        accumulate: micro-batches of a step.
        device: where.
        ahead: whether to draw early; on the CPU there is nothing to be had from it.
    """

    def __init__(
        self, objective: Objective[Any], accumulate: int, device: torch.device, ahead: bool
    ) -> None:
        self._objective, self._accumulate, self._device = objective, accumulate, device
        self.early = ahead and device.type == "cuda"
        self._beside = SideStream(priority=-1) if self.early else None
        self._ready: tuple[tuple[int, int], list[Any]] | None = None
        self._begun = False

    def take(self, step: int, batch_size: int) -> list[Any]:
        """Return the draws of a step, which the current stream may use."""
        if self._ready is None or self._ready[0] != (step, batch_size):
            self._draw(step, batch_size)
        assert self._ready is not None
        drawn, self._ready = self._ready[1], None
        if self._beside is not None:
            leaves = pytree.tree_leaves(drawn)
            used = [x for x in leaves if isinstance(x, Tensor) and x.is_cuda]
            self._beside.join(self._device, *used)
        return drawn

    def prepare(self, step: int, batch_size: int) -> None:
        """Draw for a step that will probably be asked for, where drawing early is of use."""
        if not self.early:
            return
        try:
            self._draw(step, batch_size)
        except Exception:
            self._ready = None  # if the step is ever asked for, this will be met again, and told

    def _draw(self, step: int, batch_size: int) -> None:
        micro = batch_size // self._accumulate
        parts = [slice(start, start + micro) for start in range(0, batch_size, micro)]
        beside = nullcontext()
        if self._beside is not None:
            # The first comes after whatever made the objective; later ones need nothing of the main stream.
            beside = self._beside.beside(self._device, after=not self._begun)
        with beside:
            drawn = [self._objective.draws(step, batch_size, part) for part in parts]
        self._ready, self._begun = ((step, batch_size), drawn), True
