"""Whole training steps as CUDA graphs, one for each shape of what they are given."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stopfast.flat_adamw import FlatAdamW

LIMIT = 32
"""Shapes that get a graph. Lengths in multiples of 8 have 8 to 13 joint ones on the published grids, and a
graph of some thousand kernels holds tens of megabytes."""

Work = Callable[[Any], tuple[Tensor, Sequence[Tensor]]]
"""A step of (images, draws): the loss, and the parameters that were updated. It reads nothing else that
changes, and all that it leaves behind is weights and optimiser state, in their old memory."""


class Recorder(Protocol):
    """Runs work, or captures it without computing anything."""

    def place(self) -> AbstractContextManager[None]:
        """Where everything runs: after what the caller's stream was given before, and before the rest."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what computes what ``work`` would compute now, on the same memory. Called inside place."""
        ...


class CudaRecorder:
    """Captures into CUDA graphs that share one pool of memory.

    They may share it, in whatever order they are replayed, since they run one after the other on one stream
    and nothing in the pool outlives a step. Steps that are not replayed run on the same stream, as torch
    wants it of a warm-up, but in memory of their own: what libraries allocate on first use stays, and
    a replay would write over it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def place(self) -> Iterator[None]:
        """As :meth:`Recorder.place`: a stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """As :meth:`Recorder.capture`: a graph."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that decode images, may allocate what they want meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return graph.replay


class _Given(NamedTuple):
    """What a step was called with, taken apart."""

    key: Hashable
    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, inputs: Any, launches: Hashable) -> "_Given":  # noqa: ANN401
        leaves, spec = pytree.tree_flatten(inputs)
        values = tuple(
            (x.shape, x.dtype, x.stride()) if isinstance(x, Tensor) else x for x in leaves
        )
        return cls((launches, spec, values), leaves, spec)


class _Graph(NamedTuple):
    replay: Callable[[], None]
    updated: list[Tensor]


class StepGraphs:
    """Takes steps, and replays those whose shapes it has met before.

    A shape is the shapes of all tensors of the inputs, and the values of the rest. Its first step runs as
    it is, since that is where kernels are compiled; its second is captured and replayed, and so on. A
    replay runs no Python, so it calls no hooks of modules and tensors; hooks of the optimiser's ``step``
    are called in no step.

    Args:
        optimizer: what the steps update with.
        recorder: what captures and replays.
        device: of the steps.
    """

    def __init__(
        self, optimizer: FlatAdamW, recorder: Recorder, device: torch.device | str
    ) -> None:
        self._optimizer, self._recorder, self._device = optimizer, recorder, device
        self._met: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        # One graph runs at a time, so inputs of one shape are the same memory in all of them.
        self._memory: dict[Hashable, Tensor] = {}
        self._loss: Tensor | None = None
        self._full = False
        self.counts = {"graphs": 0, "replayed": 0, "eager": 0}

    def __call__(self, inputs: Any, work: Work) -> Tensor:  # noqa: ANN401
        """Take one step; return its loss.

        Args:
            inputs: tensors in tuples, lists, dictionaries and named tuples, and numbers and names.
            work: what is captured; the same in every call.

        Raises:
            RuntimeError: a step that cannot be captured.
            ValueError: inputs of which the shape cannot be told; parameters moved out of the optimiser.
        """
        given = _Given.of(inputs, self._optimizer.launches())
        try:
            met = given.key in self._met
        except TypeError as error:
            raise ValueError(f"expected draws of tensors and plain values: {error}") from error
        with self._recorder.place():
            self._optimizer.fill_scalars()
            if not met:
                self._meet(given.key)
                self.counts["eager"] += 1
                return self._eager(inputs, work)
            self._optimizer.check_memory()
            held = self._filled(given.leaves)
            graph = self._graphs.get(given.key)
            if graph is None:
                inputs = pytree.tree_unflatten(held, given.spec)
                graph = self._graphs[given.key] = self._capture(inputs, work)
            graph.replay()
        self.counts["replayed"] += 1
        self._optimizer.mark_updated(graph.updated)
        assert self._loss is not None
        return self._loss.clone()

    def _meet(self, key: Hashable) -> None:
        if len(self._met) < LIMIT:
            self._met.add(key)
        elif not self._full:
            self._full = True
            warnings.warn(
                f"more than {LIMIT} shapes of a step: those beyond run without a CUDA graph; a larger "
                "--step.bucket makes fewer",
                stacklevel=4,
            )

    def _eager(self, inputs: Any, work: Work) -> Tensor:  # noqa: ANN401
        loss, _ = work(inputs)
        if self._loss is None:
            self._loss = torch.empty_like(loss)  # in no graph's memory
        return loss

    def _capture(self, inputs: Any, work: Work) -> _Graph:  # noqa: ANN401
        updated: list[Tensor] = []

        def body() -> None:
            loss, updated[:] = work(inputs)
            assert self._loss is not None
            self._loss.copy_(loss)

        try:
            replay = self._recorder.capture(body)
        except Exception as error:
            raise RuntimeError(
                f"a step could not be captured as a CUDA graph: {error}; train without graphs "
                "(--step.no-graphs), or take out of the objective's loss what waits for the device"
            ) from error
        self.counts["graphs"] += 1
        return _Graph(replay, updated)

    @torch.no_grad()
    def _filled(self, leaves: list[Any]) -> list[Any]:
        """The leaves in memory that stays, on the steps' device wherever they are themselves."""
        held = []
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                key = (at, leaf.shape, leaf.dtype, leaf.stride())
                if key not in self._memory:
                    self._memory[key] = torch.empty_like(leaf, device=self._device)
                leaf = self._memory[key].copy_(leaf, non_blocking=True)
            held.append(leaf)
        return held
