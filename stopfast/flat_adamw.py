"""AdamW over flat buffers: update, teachers' average and half-precision copies in one pass of a kernel."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from stopfast.flat_buffers import Segment, Slot, flatten
from stopfast.kernels.ops import AdamWBuffers, Ops

_SCALARS = 7  # of `adamw_ema`
_STEP = 3  # the one among them that counts


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019) that also moves the teachers of its parameters.

    Updates as ``torch.optim.AdamW`` does, whose ``state_dict`` it shares: either loads the other's. Then
    ``teacher <- momentum * teacher + (1 - momentum) * parameter``, with a group's ``"teacher_momentum"``.
    A parameter without a gradient keeps its weights and state, and its teacher still follows. A step that
    ``torch.amp.GradScaler`` finds not finite leaves everything as it was, without waiting for the device.

    Parameters and teachers become views of flat buffers. Gradients stay where autograd puts them and are
    gathered in each step, for 8 bytes an element: as views of a buffer they would be zeroed and added to.
    Build the optimiser after the modules are on their device. They can be copied, saved and loaded as
    before, but what held a parameter's memory by another way than the parameter, such as its ``.data``,
    holds the old one.

    Args:
        groups: parameters in fp32, or dictionaries of them as ``torch.optim.AdamW`` takes.
        lr, betas, eps, weight_decay: of groups that have none of their own. Each may be a tensor.
        teachers: the teacher of each parameter that has one.
        ops: implementation of the update.
        copies: bf16 or fp16 keeps copies in it of parameters and teachers; see :meth:`copies`.

    Raises:
        ValueError: parameters that are not plain fp32 tensors on one device, each in memory of its own;
            teachers that do not match them; AMSGrad or maximisation, which are not computed here.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf for a step
    _segments: Sequence[Segment] = ()
    _known_versions = 0

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        teachers: Mapping[Tensor, Tensor] | None = None,
        ops: Ops,
        copies: torch.dtype | None = None,
    ) -> None:
        if copies not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"expected copies in bf16 or fp16, got {copies}")
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # What torch.optim.AdamW has besides, so that it can load what this saves.
        shared = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False}
        shared |= {"differentiable": False, "fused": True, "decoupled_weight_decay": True}
        super().__init__(groups, {**own, **shared, "teacher_momentum": None})
        _check_groups(self.param_groups)
        self._ops = ops
        self._segments, self._scalars = flatten(
            self.param_groups, dict(teachers or {}), copies, _SCALARS
        )
        self.refresh_copies()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which only the constructor can.

        Raises:
            ValueError: called later.
        """
        if self._segments:
            raise ValueError("expected every parameter group at construction, got one more")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        gradients: Mapping[Tensor, Tensor] | None = None,
    ) -> Any:  # noqa: ANN401
        """:meth:`fill_scalars` and :meth:`update`; returns the closure's loss.

        Raises:
            ValueError: as they do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.fill_scalars()
        self.update(gradients)
        return loss

    @torch.no_grad()
    def fill_scalars(self) -> None:
        """Send the groups' numbers to the device, without waiting for it.

        A captured graph holds :meth:`update` alone: this is called before each replay, and
        :meth:`mark_updated` after it.

        Raises:
            ValueError: a group with teachers that has no ``"teacher_momentum"``.
        """
        rows: list[list[Any]] = []
        for segment in self._segments:
            group = self.param_groups[segment.group]
            momentum = group["teacher_momentum"] if "average" in segment.buffers else 0.0
            if momentum is None:
                raise ValueError(f"expected 'teacher_momentum' in group {segment.group}, got None")
            step = 0.0  # each launch writes it
            rows.append([group["lr"], group["weight_decay"], momentum, step])
            rows[-1] += [*group["betas"], group["eps"]]
        unused = [0.0] * (self._scalars.shape[1] - _SCALARS)
        numbers = [[0.0 if isinstance(n, Tensor) else n for n in row] + unused for row in rows]
        pinned = self._scalars.is_cuda
        staged = torch.tensor(numbers, dtype=torch.float64, pin_memory=pinned)
        self._scalars.copy_(staged, non_blocking=True)
        for segment, row in zip(self._segments, rows, strict=True):
            for place, value in enumerate(row):
                if isinstance(value, Tensor):
                    segment.scalars[place].copy_(value.reshape(()), non_blocking=True)

    @torch.no_grad()
    def update(self, gradients: Mapping[Tensor, Tensor] | None = None) -> list[Tensor]:
        """Update parameters that have a gradient, and then every teacher, by the numbers on the device.

        Args:
            gradients: what is read instead of the ``grad`` of these parameters, of their shapes, in fp32 or
                in the dtype of the copies.

        Returns:
            The parameters that had a gradient.

        Raises:
            ValueError: parameters or teachers that were moved out of the buffers.
        """
        self.check_memory()
        given, updated = gradients or {}, []
        for segment in self._segments:
            found = [given.get(slot.parameter, slot.parameter.grad) for slot in segment.slots]
            graded = [g for g in found if g is not None]
            updated += [
                slot.parameter
                for slot, gradient in zip(segment.slots, found, strict=True)
                if gradient is not None
            ]
            if segment.together and len(graded) == len(found):
                self._launch(segment, segment.slots, graded)
                continue
            for slot, gradient in zip(segment.slots, found, strict=True):
                if gradient is not None:
                    self._launch(segment, [slot], [gradient])
                elif slot.teacher is not None:
                    self._follow(segment, slot)
            segment.together = segment.together and not graded
        self.mark_updated(updated)
        return updated

    def mark_updated(self, parameters: Collection[Tensor]) -> None:
        """What :meth:`update` of these does besides the device's work: needed after a graph's replay."""
        chosen = set(parameters)
        for segment in self._segments:
            for slot in segment.slots:
                if slot.parameter in chosen and slot.parameter not in self.state:
                    self.state[slot.parameter] = segment.state(slot)
        # Autograd knows by their versions that what a graph saved of them is stale.
        increment_version([*parameters, *(t for s in self._segments for t in s.teachers())])
        self._known_versions = self._versions()

    def check_memory(self) -> None:
        """Refuse parameters or teachers that were moved out of the buffers.

        Raises:
            ValueError: there are some.
        """
        moved = sum(1 for segment in self._segments for _ in segment.moved())
        if moved:
            raise ValueError(
                f"expected parameters in the optimiser's buffers, got {moved} elsewhere: move modules to "
                "their device and dtype first, and build the optimiser after"
            )

    def launches(self) -> Hashable:
        """What decides which kernels :meth:`update` launches, besides which gradients there are."""
        return tuple(segment.together for segment in self._segments)

    def copies(self) -> dict[Tensor, Tensor]:
        """The half-precision copy of each parameter and teacher: views that each step overwrites."""
        return {
            own: slot.of(segment.buffers[name])
            for segment in self._segments
            for slot in segment.slots
            for own, name in ((slot.parameter, "param_copy"), (slot.teacher, "average_copy"))
            if own is not None and name in segment.buffers
        }

    def copy_of(self, tensor: Tensor) -> Tensor:
        """One of :meth:`copies`.

        Raises:
            ValueError: no copies are kept, or none of this tensor.
        """
        found = self.copies().get(tensor)
        if found is None:
            raise ValueError(f"expected a tensor that a copy is kept of, got {tuple(tensor.shape)}")
        return found

    @torch.no_grad()
    def refresh_copies(self, *, if_written: bool = False) -> None:
        """Write the copies again, after parameters or teachers were written from outside, as by a load.

        With ``if_written`` only where autograd's versions of the tensors say that they were, which they do
        not of what is written through ``.data``.
        """
        kept = any("param_copy" in segment.buffers for segment in self._segments)
        if not kept or (if_written and self._versions() == self._known_versions):
            return
        for segment in self._segments:
            for name in ("param", "average"):
                if f"{name}_copy" in segment.buffers:
                    segment.buffers[f"{name}_copy"].copy_(segment.buffers[name])
        self._known_versions = self._versions()

    def _versions(self) -> int:
        """A number that grows with every write into a parameter or a teacher."""
        return sum(tensor._version for segment in self._segments for tensor in segment.tensors())

    def __getstate__(self) -> dict[str, Any]:
        # A copy would update buffers that no parameter is a view of.
        raise TypeError("FlatAdamW cannot be copied or pickled: use state_dict()")

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Part of ``load_state_dict``: what was loaded moves into the buffers."""
        for group in state["param_groups"]:
            group.setdefault("teacher_momentum", None)
        _check_groups(state["param_groups"])
        for parameter, values in state["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if values[name].shape != parameter.shape:
                    got, expected = tuple(values[name].shape), tuple(parameter.shape)
                    raise ValueError(f"{name}: expected the shape {expected}, got {got}")
        super().__setstate__(state)
        for segment in self._segments:
            for slot in segment.slots:
                found = self.state.get(slot.parameter)
                views = segment.state(slot)
                for name, view in views.items():
                    view.copy_(torch.as_tensor(found[name] if found else 0.0))
                if found:
                    self.state[slot.parameter] = views
            segment.together = len(set(segment.steps.tolist())) == 1
        self.refresh_copies()

    def _launch(self, segment: Segment, slots: Sequence[Slot], gradients: Sequence[Tensor]) -> None:
        """Update neighbours that have gradients and were updated equally often."""
        first, last = slots[0], slots[-1]
        found_inf = self._found_inf()
        steps = segment.steps[first.index : last.index + 1]
        steps += 1 if found_inf is None else found_inf == 0
        segment.scalars[_STEP].copy_(steps[0])
        buffers = {n: b[first.start : last.stop] for n, b in segment.buffers.items()}
        self._ops.adamw_ema(
            AdamWBuffers(grad=segment.gather(slots, gradients), **buffers),
            segment.scalars,
            found_inf=found_inf,
            grad_scale=getattr(self, "grad_scale", None),
        )

    def _follow(self, segment: Segment, slot: Slot) -> None:
        """Move one teacher alone: an update without rate, decay and moments changes nothing else."""
        buffers = {n: b[slot.start : slot.stop] for n, b in segment.buffers.items()}
        for name in ("grad", "exp_avg", "exp_avg_sq"):
            buffers[name] = torch.zeros_like(buffers["param"])
        scalars = segment.scalars.clone()
        scalars[:2] = 0.0
        scalars[_STEP:] = 0.5  # betas and an eps by which nothing is not divided by nothing
        scalars[_STEP] = 1.0
        self._ops.adamw_ema(AdamWBuffers(**buffers), scalars, found_inf=self._found_inf())

    def _found_inf(self) -> Tensor | None:
        found = getattr(self, "found_inf", None)
        return found if isinstance(found, Tensor) else None  # GradScaler may give the number 0


def _check_groups(groups: Sequence[dict[str, Any]]) -> None:
    for number, group in enumerate(groups):
        if group.get("amsgrad") or group.get("maximize"):
            raise ValueError(f"expected neither amsgrad nor maximize, got them in group {number}")
