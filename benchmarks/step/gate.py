"""Whether an arm takes the very same steps as the published program: asked before anything is timed.

Every arm takes a few steps from the same weights with the same images, masks and noise. Compared are each
step's loss; AdamW's first moments after step 1, which are a tenth of the gradients, tensor by tensor;
and how far encoder, predictor and target encoder have travelled at the end.

Weights are compared by their travel, not by their size, which dwarfs a few steps: a target encoder that
does not follow is off by 1, whatever its weights. And elements are left out of which the first gradient was
small beside its tensor's: AdamW divides a gradient by its own size, so that where rounding is all there
is of one (a bias of keys, which softmax cancels) it takes a full step in rounding's direction. What is
left out is compared by its moments.

In fp32 the bounds are fixed. In bf16 the reference is the published program in fp32, and an arm may be at
most twice as far from it as the published program in bf16, and a floor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from benchmarks.engine.refusals import Disagreement
from benchmarks.step.arms.protocol import StepArm
from benchmarks.step.arms.published import Published
from benchmarks.step.workload import Workload

STEPS = 8
_SIGNIFICANT = 1e-2  # of its tensor's root mean square, for an element's gradient to count
_FP32 = {"loss": 1e-5, "moment": 1e-5, "travel": 1e-4}
_BF16_FLOOR = {"loss": 1e-4, "moment": 1e-3, "travel": 5e-3}
_BF16_FACTOR = 2.0
_TOLD = 6


@dataclass(frozen=True)
class Record:
    """What is compared of some steps, in the host's memory."""

    losses: Tensor
    """fp64 [steps]."""
    moments: dict[str, Tensor]
    """After step 1."""
    weights: dict[str, Tensor]
    """After the last step."""


@dataclass(frozen=True)
class Errors:
    """Distances from a reference, all relative."""

    loss: float
    """Root mean square over the steps, over the mean loss."""
    moments: dict[str, float]
    """Of each tensor."""
    travel: dict[str, float]
    """Of each network, over how far the reference has travelled."""


@dataclass(frozen=True)
class Reference:
    """What the published program computes on a workload."""

    workload: Workload
    exact: Record
    """In fp32."""
    own: Errors | None
    """Of the published program in the workload's precision, where that is not fp32."""


def record(arm: StepArm, workload: Workload, steps: int = STEPS) -> Record:
    """Take steps 1, 2, ... with given noise."""
    losses: list[Tensor] = []
    moments: dict[str, Tensor] = {}
    for number in range(1, steps + 1):
        losses.append(arm.step(number, workload.noise_of(number)).double().cpu())
        if number == 1:
            moments = _host(arm.moments())
    return Record(torch.stack(losses), moments, _host(arm.weights()))


def reference(workload: Workload, steps: int = STEPS) -> Reference:
    """Let the published program take the steps, in fp32 and in the workload's precision."""

    def taken(precise: Workload) -> Record:
        arm = Published(precise)
        return record(arm, precise, steps)

    exact = taken(replace(workload, precision="fp32"))
    if workload.precision == "fp32":
        return Reference(workload, exact, None)
    return Reference(workload, exact, errors(taken(workload), exact, workload))


def check(arm: StepArm, expected: Reference, steps: int = STEPS) -> Errors:
    """Let a new arm take the steps and return how far it is from the reference.

    Raises:
        Disagreement: it is farther than it may be; the message says in what.
    """
    workload = expected.workload
    found = errors(record(arm, workload, steps), expected.exact, workload)
    beyond = [(value / limit, text) for text, value, limit in _limited(found, expected.own)]
    wrong = sorted((times, text) for times, text in beyond if not times <= 1.0)[::-1]
    if wrong:
        worst = "; ".join(f"{text} by {times:.1f} times" for times, text in wrong[:_TOLD])
        raise Disagreement(f"{len(wrong)} beyond their bounds: {worst}")
    return found


def errors(got: Record, expected: Record, workload: Workload) -> Errors:
    """Return the distances between two records.

    Raises:
        Disagreement: weights or moments that only one of them has.
    """
    for name in ("moments", "weights"):
        ours, theirs = getattr(got, name).keys(), getattr(expected, name).keys()
        if ours != theirs:
            raise Disagreement(f"expected {name} of the same names, got {sorted(ours ^ theirs)}")
    device = workload.device
    loss = (got.losses - expected.losses).square().mean().sqrt() / expected.losses.mean()
    return Errors(
        loss.item(),
        {
            name: relative_error(got.moments[name].to(device), value.to(device))
            for name, value in expected.moments.items()
        },
        {
            part: _travel(part, start, (got, expected), device)
            for part, start in workload.weights.items()
        },
    )


def _travel(
    part: str, start: Mapping[str, Tensor], records: tuple[Record, Record], device: torch.device
) -> float:
    """Distance of a network's weights over how far they should have come, where gradients were."""
    got, expected = records
    apart, way = torch.zeros(2, dtype=torch.float64, device=device)
    for name, begun in start.items():
        # The target encoder moves where the encoder does, whose average it is.
        moment = expected.moments.get(f"{part}.{name}".replace("target_encoder.", "encoder."))
        if moment is None:
            continue  # a fixed table
        moment, ours, theirs, begun = (
            tensor.to(device)
            for tensor in (
                moment,
                got.weights[f"{part}.{name}"],
                expected.weights[f"{part}.{name}"],
                begun,
            )
        )
        counts = moment.abs() > _SIGNIFICANT * moment.square().mean().sqrt()
        apart += ((ours - theirs).double() * counts).square().sum()
        way += ((theirs - begun).double() * counts).square().sum()
    return (apart / way).sqrt().item()


def _limited(found: Errors, own: Errors | None) -> Iterable[tuple[str, float, float]]:
    """Each distance with its name and its limit."""
    for kind, label, value, published in _pairs(found, own):
        if own is None:
            yield label, value, _FP32[kind]
        else:
            yield label, value, _BF16_FACTOR * published + _BF16_FLOOR[kind]


def _pairs(found: Errors, own: Errors | None) -> Iterable[tuple[str, str, float, float]]:
    yield "loss", "loss", found.loss, own.loss if own else 0.0
    for name, value in found.moments.items():
        yield "moment", f"moment of {name}", value, own.moments[name] if own else 0.0
    for part, value in found.travel.items():
        yield "travel", f"weights of the {part}", value, own.travel[part] if own else 0.0


def _host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in tensors.items()
    }
