"""Parts of the step: draws made early, nothing that waits for the device, one compilation for all."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stopfast.block import Block
from stopfast.config import StepConfig
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.masking import Masks
from stopfast.objectives.jepa import Jepa
from stopfast.step import TrainStep
from stopfast.step import train_step as step_module
from stopfast.step.draws import StepDraws
from tests.test_compute_copies import assert_equal
from tests.test_objective import build, images, weights

CPU = torch.device("cpu")


def early(objective: Jepa, accumulate: int) -> StepDraws:
    """Draws as on a GPU, but for the stream."""
    draws = StepDraws(objective, accumulate, CPU, ahead=True)
    assert not draws.early  # there is nothing to gain on the CPU
    draws.early = True
    return draws


@pytest.mark.parametrize("accumulate", [1, 2])
def test_draws_ahead_change_no_number(accumulate: int):
    """Neither in a row, nor after a jump, another batch or a resume; and none is drawn twice."""
    found, asked = [], []
    for ahead in (False, True):
        objective = build()
        step = TrainStep(objective, StepConfig(accumulate=accumulate))
        if ahead:
            step._draws = early(objective, accumulate)
            objective.draws = mock.Mock(wraps=objective.draws)
            asked = objective.draws.call_args_list
        for number in (1, 2, 3, 7, 8):
            step(images(), number)
        step(images()[:4], 9)
        saved = step.state_dict()
        again = TrainStep(objective, StepConfig(accumulate=accumulate))
        again.load_state_dict(saved)
        again(images(), 10)
        found.append(weights(objective))
    assert_equal(*found)
    drawn = [call.args[:2] for call in asked if call.args[2].start == 0]
    early_ones = [(1, 8), (2, 8), (3, 8), (4, 8), (7, 8), (8, 8), (9, 8), (9, 4), (10, 4)]
    assert drawn == [*early_ones, (10, 8)]


def test_what_cannot_be_drawn_is_met_when_it_is_asked_for():
    """A step beyond the last one, which nobody takes, may fail unheard."""

    class Ending(Jepa):
        def draws(self, step: int, batch_size: int, part: slice) -> Any:
            if step > 2:
                raise ValueError("no such step")
            return super().draws(step, batch_size, part)

    objective = build()
    objective.__class__ = Ending
    step = TrainStep(objective)
    step._draws = early(objective, 1)
    for number in (1, 2):
        step(images(), number)
    with pytest.raises(ValueError, match="no such step"):
        step(images(), 3)


class NothingWaits(TorchDispatchMode):
    """Fails where a host would wait for its device."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        leaves = pytree.tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, Tensor) and x.ndim}
        if len(devices) > 1:
            self.copies += 1
            to_device = name == "copy_" and args[0].device.type == "meta"
            assert to_device and args[2:] == (True,), f"{name} {devices} {args[2:]}"
        return result


@contextmanager
def gpu_of_no_numbers() -> Iterator[torch.device]:
    """The device "meta", on which reading a number fails too, with what it lacks to train on."""

    def address(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()._cdata << 24
        return storage + tensor.storage_offset() * tensor.element_size()

    with (
        mock.patch.object(Tensor, "data_ptr", address),
        mock.patch.object(torch, "equal", return_value=True),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(step_module, "autocast", return_value=nullcontext()),
    ):
        yield torch.device("meta")


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)
def test_a_step_waits_for_nothing(ops: Ops):
    """One copy to the device a step, the schedules', which does not wait for it."""
    with gpu_of_no_numbers() as device:
        objective = build(clip="global", ops=ops, bucket=4)
        for module in objective.modules().values():
            for part in module.modules():
                if hasattr(part, "ops"):
                    part.ops = ops  # type: ignore
        settings = StepConfig(accumulate=2)
        step = TrainStep(objective, settings, device=device, optimizer="adamw_ema", ops=ops)
        drawn = {n: StepDraws(objective, 2, device, ahead=False).take(n, 8) for n in (1, 2)}
        batch = images().to(device)
        with mock.patch.object(step._draws, "take", lambda number, _: drawn[number]):
            with NothingWaits() as mode:
                losses = [step(batch, number).loss for number in (1, 2)]
            assert mode.copies == 2
            for waits in (lambda: losses[0].item(), lambda: losses[0].reshape(1).cpu()):
                with (
                    pytest.raises((AssertionError, RuntimeError, NotImplementedError)),
                    NothingWaits(),
                ):
                    waits()


def test_overflows_are_counted_on_the_device(monkeypatch: pytest.MonkeyPatch):
    step = TrainStep(build(), StepConfig(precision="fp16"), optimizer="adamw_ema")
    drawn = step._draws.take(1, 8)
    monkeypatch.setattr(step._draws, "take", lambda *_: drawn)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
            patch.setattr(Tensor, name, lambda _: pytest.fail("a number was read"))
        for number in (1, 2):
            step(images(), number)
            step.scaler.update(new_scale=2.0**60)
    assert step.skipped == 1 and step.state_dict()["skipped"] == 1


LENGTHS = [(kept, wanted) for kept in range(4, 24) for wanted in range(2, 17)]


def test_three_hundred_lengths_compile_once():
    """After the first step under torch.compile no mask's lengths, whatever they are, compile again."""
    import torch._dynamo as dynamo

    torch.compiler.reset()
    objective = build(masks={"nenc": 1})
    for module in objective.modules().values():
        for part in module.modules():
            if isinstance(part, Block):
                part.compile_parts()

    def masks(batch: int, iteration: int, *, device: Any, **_: int) -> Masks:
        kept, wanted = LENGTHS[iteration * 7 % len(LENGTHS)]
        order = torch.rand(batch, 36, device=device).argsort(1)
        targets = [order[:, 20 + 2 * i :][:, :wanted].sort(1).values for i in (-2, 0)]
        return Masks([order[:, :kept].sort(1).values], targets)

    objective.masks = masks  # type: ignore[assignment]
    step = TrainStep(objective, StepConfig(compile=True))
    batch = images(2)
    step(batch, 1)  # whose sizes are equal to each other where they can be
    warm = step.counts()["compilations"]
    with dynamo.config.patch(error_on_recompile=True):
        losses = [step(batch, number).loss for number in range(2, 2 + len(LENGTHS))]
    assert step.counts()["compilations"] == warm > 0
    assert torch.stack(losses).isfinite().all() and step.counts()["eager"] == 301
