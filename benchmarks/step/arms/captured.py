"""The strongest assembled step: compiled blocks and buckets, and the whole of a step as one CUDA graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.engine.refusals import NotHere
from benchmarks.step.arms.assembled import Bucketed, compile_blocks, weighted_criterion
from benchmarks.step.arms.program import Scalars
from benchmarks.step.workload import Workload
from stopfast.masking import Masks

_WARM_UP = 3
_STATIC: dict[str, Any] = {"dynamic": False}


class _Graph(NamedTuple):
    """A captured step and the memory that it reads and writes."""

    replay: Callable[[], None]
    masks: Masks
    noise: list[Tensor] | None
    loss: Tensor


class Captured(Bucketed):
    """Forward, backward and AdamW as one graph for each pair of padded lengths; the average beside it.

    AdamW's rate lies on the device. Its decay cannot, so weights are multiplied by ``1 - rate * decay``
    before it, which is what it does itself.
    """

    def __init__(self, workload: Workload) -> None:
        self._rate = torch.zeros((), device=workload.device)
        self._keep = torch.ones((), device=workload.device)
        super().__init__(workload)
        self._images = torch.empty_like(workload.pixels)
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._begin_state()
        self._begin_recording()

    def counts(self) -> dict[str, int]:
        """Graphs of torch.compile, and captured steps."""
        return {**super().counts(), "graphs": len(self._graphs)}

    def close(self) -> None:
        """Let go of the graphs and their memory."""
        self._graphs.clear()
        super().close()

    def _optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, lr=self._rate, weight_decay=0.0, fused=True, capturable=True
        )

    def _begin_state(self) -> None:
        """Make the state of what has gradients, which AdamW would make inside the first graph."""
        self._images.copy_(self.workload.pixels)
        with self._attention():
            self._forward(self._masks(self.workload.masks_of(1)), None).backward()
        self._decayed: list[Tensor] = []
        for group in self.optimizer.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["decayed"]:
                self._decayed += trained
        self.optimizer.step()  # with a rate of 0
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def _compile(self) -> None:
        encoder, predictor, target = self.networks
        for blocks in (encoder.blocks, predictor.predictor_blocks, target.blocks):
            compile_blocks(list(blocks), lengths_change=False, **_STATIC)
        self._criterion = torch.compile(weighted_criterion, **_STATIC)

    def _set_scalars(self, scalars: Scalars) -> None:
        self._rate.fill_(scalars.lr)
        self._keep.fill_(1.0 - scalars.lr * scalars.weight_decay)

    def _take(self, masks: Masks, noise: list[Tensor] | None) -> Tensor:
        noise = None if noise is None else self._padded_noise(masks, noise)
        key = masks.context[0].shape[1], masks.target[0].shape[1], noise is not None
        if key not in self._graphs:
            # Given noise is the gate's: its graphs and their memory are not the arm's.
            self._graphs = {k: graph for k, graph in self._graphs.items() if k[2] == key[2]}
            self._graphs[key] = self._capture(masks, noise)
        captured = self._graphs[key]
        pairs = [(self._images, self.workload.pixels)]
        pairs += zip(captured.masks.context, masks.context, strict=True)
        pairs += zip(captured.masks.target, masks.target, strict=True)
        pairs += zip(captured.noise or [], noise or [], strict=True)
        torch._foreach_copy_([into for into, _ in pairs], [new for _, new in pairs])  # type: ignore[attr-defined]
        captured.replay()
        return captured.loss

    def _capture(self, masks: Masks, noise: list[Tensor] | None) -> _Graph:
        masks = Masks([m.clone() for m in masks.context], [m.clone() for m in masks.target])
        noise = None if noise is None else [draw.clone() for draw in noise]
        self._images.copy_(self.workload.pixels)
        lost = torch.empty((), device=self.device)

        def gradients() -> Tensor:
            loss = self._forward(masks, noise)
            loss.backward()
            return loss.detach()

        def work() -> None:
            lost.copy_(gradients())
            with torch.no_grad():
                torch._foreach_mul_(self._decayed, self._keep)  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        def warm_up() -> None:
            for _ in range(_WARM_UP):  # everything but the update: no step is taken
                gradients()
                self.optimizer.zero_grad(set_to_none=True)

        return _Graph(self._record(warm_up, work), masks, noise, lost)

    def _begin_recording(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def _record(self, warm_up: Callable[[], None], work: Callable[[], None]) -> Callable[[], None]:
        """Return what does the work by replaying it; recording does none."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            warm_up()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay


def captured_arm(workload: Workload) -> Captured:
    """Build the arm.

    Raises:
        NotHere: no GPU.
    """
    if workload.device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    return Captured(workload)
