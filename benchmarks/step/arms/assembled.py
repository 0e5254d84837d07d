"""What a skilled user builds of existing parts: compiled blocks, fused attention, buckets, CUDA graphs."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.arms.attention_choice import fastest_attention
from benchmarks.step.arms.program import Networks, Program
from benchmarks.step.published_model import Attend, Attention, Block, published_targets, smooth_l1
from benchmarks.step.workload import Workload
from stopfast.masking import Masks

_MULTIPLE = 8
_STATIC: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}
_SHAPES = 128  # of one function, before torch.compile gives up; the default of 8 would be too few


class Compiled(Program):
    """Every block by torch.compile with lengths that may change, and the loss; attention by measurement.

    Blocks of one network share their compiled code. The target encoder's shape never changes and is
    compiled as such.
    """

    def __init__(self, workload: Workload, attend: Attend | None = None) -> None:
        super().__init__(workload)
        self._choice = None
        if attend is None:
            self._choice = fastest_attention(workload, self._padded())
            attend = self._choice.attend
        use_attention(self.networks, attend)
        self._limits = torch._dynamo.config.patch(
            recompile_limit=_SHAPES, accumulated_recompile_limit=8 * _SHAPES
        )
        self._limits.__enter__()
        self._before = _compilations()
        self._compile()

    def step(self, number: int, noise: list[Tensor] | None = None) -> Tensor:
        """Take one optimiser step."""
        with self._attention():
            return super().step(number, noise)

    def _attention(self) -> AbstractContextManager[object]:
        """Where the chosen kernels are used; also while something is compiled, which keeps them."""
        return self._choice.allowed() if self._choice else nullcontext()

    def counts(self) -> dict[str, int]:
        """Graphs that torch.compile has made since."""
        return {"compilations": _compilations() - self._before, "graphs": 0}

    def close(self) -> None:
        """Put torch.compile's limits back."""
        self._limits.__exit__(None, None, None)

    def choices(self) -> dict[str, str]:
        """The attention."""
        return {"attention": self._choice.name if self._choice else "given"}

    def _padded(self) -> tuple[int, int] | None:
        return None

    def _compile(self) -> None:
        encoder, predictor, target = self.networks
        compile_blocks([*encoder.blocks, *predictor.predictor_blocks], lengths_change=True)
        compile_blocks(list(target.blocks), lengths_change=False, dynamic=False)
        self._criterion = torch.compile(_criterion)

    def _loss(self, masks: Masks, noise: list[Tensor] | None) -> Tensor:
        encoder, predictor, target_encoder = self.networks
        with torch.no_grad():
            features = target_encoder(self._images)
        context = encoder(self._images, masks.context)
        prediction = predictor(context, masks.context, masks.target, noise)
        return self._criterion(prediction, features, masks.target, len(masks.context))


def use_attention(networks: Networks, attend: Attend) -> None:
    """Give every block of the networks this attention."""
    for network in networks:
        for module in network.modules():
            if isinstance(module, Attention):
                module.attend = attend


def compile_blocks(blocks: list[Any], *, lengths_change: bool, **settings: Any) -> None:  # noqa: ANN401
    """Compile the blocks' forward, one piece of code for all of one shape."""
    compiled = torch.compile(Block.forward, **settings)

    def call(block: Block, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if lengths_change:
            torch._dynamo.maybe_mark_dynamic(x, 1)
        return compiled(block, x, bias)

    for block in blocks:
        block.forward = partial(call, block)


def _criterion(prediction: Tensor, features: Tensor, masks: list[Tensor], contexts: int) -> Tensor:
    return smooth_l1(prediction, published_targets(features, masks, contexts))


def _compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Lengths(NamedTuple):
    """What padded masks do to attention and loss."""

    context_bias: Tensor
    """[1, 1, 1, Kx], added to the scores of the context encoder: minus infinity for padding."""
    predictor_bias: Tensor
    """[1, 1, 1, Kx + Ky]."""
    weights: Tensor
    """fp32 [Ky, 1]: of each target's summed loss, 0 for padding."""


class Bucketed(Compiled):
    """Lengths padded to multiples of 8, a bias that keeps padding out, static shapes, torch's CUDA graphs.

    One graph a block and shape (``mode="reduce-overhead"``). What the graphs read of the lengths lies in
    memory that stays where it is, one set for each pair of padded lengths.
    """

    def __init__(self, workload: Workload) -> None:
        self._known: dict[tuple[int, int], Lengths] = {}
        self._lengths: Lengths | None = None
        super().__init__(workload)

    def step(self, number: int, noise: list[Tensor] | None = None) -> Tensor:
        """Take one optimiser step."""
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(number, noise).clone()

    def counts(self) -> dict[str, int]:
        """Graphs of torch.compile, and CUDA graphs that it has recorded."""
        return {**super().counts(), "graphs": _recorded(self.device)}

    def close(self) -> None:
        """Let go of the recorded graphs and their memory."""
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
        super().close()

    def _padded(self) -> tuple[int, int]:
        masks = self.workload.masks_of(1)
        return _round_up(masks.context[0].shape[1]), _round_up(masks.target[0].shape[1])

    def _compile(self) -> None:
        encoder, predictor, target = self.networks
        for blocks in (encoder.blocks, predictor.predictor_blocks, target.blocks):
            compile_blocks(list(blocks), lengths_change=False, **_STATIC)
        self._criterion = torch.compile(weighted_criterion, **_STATIC)

    def _masks(self, masks: Masks) -> Masks:
        real = masks.context[0].shape[1], masks.target[0].shape[1]
        self._lengths = self._lengths_of(real)

        def padded(group: list[Tensor]) -> list[Tensor]:
            extra = _round_up(group[0].shape[1]) - group[0].shape[1]
            return [F.pad(mask, (0, extra)) for mask in group]

        moved = super()._masks(masks)
        return Masks(padded(moved.context), padded(moved.target))

    def _lengths_of(self, real: tuple[int, int]) -> Lengths:
        """Write the real lengths where the graphs of their padded pair read them; nothing is waited for."""
        padded = _round_up(real[0]), _round_up(real[1])
        if padded not in self._known:
            self._known[padded] = self._allocate(*padded)
        lengths = self._known[padded]
        low = -torch.inf
        lengths.context_bias.fill_(0.0)[..., real[0] :] = low
        predictor = lengths.predictor_bias.fill_(0.0)
        predictor[..., real[0] : padded[0]] = low
        predictor[..., padded[0] + real[1] :] = low
        lengths.weights.fill_(0.0)[: real[1]] = self._weight(real[1])
        return lengths

    def _weight(self, targets: int) -> float:
        """What makes the sum over real targets the mean of all their elements."""
        config = self.workload.config
        sequences = self.workload.images * config.jepa.mask.nenc * config.jepa.mask.npred
        return 1.0 / (sequences * targets * config.model.embed_dim)

    def _allocate(self, context: int, target: int) -> Lengths:
        dtype = torch.bfloat16 if self.workload.precision == "bf16" else torch.float32

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            tensor = torch.empty(size, dtype=dtype, device=self.device)
            torch._dynamo.mark_static_address(tensor, guard=False)
            return tensor

        both = empty(1, 1, 1, context + target)
        return Lengths(empty(1, 1, 1, context), both, empty(target, 1, dtype=torch.float32))

    @staticmethod
    def _padded_noise(masks: Masks, noise: list[Tensor]) -> list[Tensor]:
        extra = masks.target[0].shape[1] - noise[0].shape[1]
        return [F.pad(draw, (0, 0, 0, extra)) for draw in noise]

    def _loss(self, masks: Masks, noise: list[Tensor] | None) -> Tensor:
        lengths = self._lengths
        assert lengths is not None
        encoder, predictor, target_encoder = self.networks
        with torch.no_grad():
            features = target_encoder(self._images)
        context = encoder(self._images, masks.context, bias=lengths.context_bias)
        if noise is not None:
            noise = self._padded_noise(masks, noise)
        prediction = predictor(
            context, masks.context, masks.target, noise, bias=lengths.predictor_bias
        )
        return self._criterion(
            prediction, features, masks.target, len(masks.context), lengths.weights
        )


def weighted_criterion(
    prediction: Tensor, features: Tensor, masks: list[Tensor], contexts: int, weights: Tensor
) -> Tensor:
    """Smooth-L1 of each target's elements, weighted [Ky, 1] and summed."""
    wanted = published_targets(features, masks, contexts)
    return (F.smooth_l1_loss(prediction, wanted, reduction="none") * weights).sum()


def _round_up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _recorded(device: torch.device) -> int:
    """CUDA graphs that torch.compile holds."""
    if device.type != "cuda":
        return 0
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(1 + n.num_descendants() for n in manager.get_roots())
