"""Fused against eager on one's own settings: forward, every gradient, updates, a stretch of training.

Three arms begin with the same weights and see the same images and draws: the eager definition in fp64, the
eager definition in the precision of the settings, and the fused operations in that precision. Fused may be
as far from fp64 as eager is, times 2 for results and 3 for gradients and weights, plus a few units in the
last place.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stopfast.build import build_objective, build_step
from stopfast.checkpoint import load_checkpoint, load_weights, newest_checkpoint
from stopfast.config import Config, from_document
from stopfast.networks import seeded
from stopfast.objectives import Objective
from stopfast.presets import PRESETS
from stopfast.published_yaml import from_yaml
from stopfast.step import Precision, TrainStep, autocast

_RESULTS, _GRADIENTS = 2.0, 3.0
_STEPS = 3  # optimiser steps after which weights are compared
_FLOOR: dict[Precision, float] = {"fp32": 2**-20, "bf16": 2**-12, "fp16": 2**-15}  # 1/16 to 8 ulp


@dataclass(frozen=True)
class Row:
    """One comparison with fp64; errors are norms of differences, relative to the norm of what is exact."""

    what: str
    eager: float
    fused: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the fused error is a number within its limit."""
        return self.fused <= self.limit


class _Arm(NamedTuple):
    objective: Objective[Any]
    step: TrainStep
    dtype: torch.dtype


def read_config(source: str) -> Config:
    """Return the settings that a name or a path stands for: a preset, a JSON file, a published
    YAML file, a run or a checkpoint.

    Raises:
        ValueError: neither a preset nor something that can be read.
    """
    if source in PRESETS:
        return PRESETS[source]()
    path = Path(source)
    if path.is_dir():
        _, documents = load_checkpoint(newest_checkpoint(path))
        return from_document(Config, documents["config"])
    if not path.is_file():
        raise ValueError(f"expected --config as one of {list(PRESETS)} or a path, got {source!r}")
    if path.suffix in (".yaml", ".yml"):
        return from_yaml(path)
    try:
        return from_document(Config, json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path}: expected settings as JSON: {error}") from error


def verify(
    config: Config,
    *,
    checkpoint: Path | None = None,
    steps: int = 10,
    images: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Compare the fused operations with the eager ones on these settings.

    Args:
        config: the settings; their ``step.ops`` is not looked at.
        checkpoint: a run's or a checkpoint's folder, whose weights all begin with; default: fresh ones.
        steps: length of the stretch of training.
        images: images of a step, random ones; default: the settings' batch.
        device: where; on the CPU the kernels need TRITON_INTERPRET=1.

    Raises:
        ValueError: counts below 1, or a checkpoint that does not fit.
    """
    size = config.data.batch_size if images is None else images
    if steps < 1 or size < 1 or size % config.step.accumulate:
        raise ValueError(
            f"expected steps >= 1 and images that accumulate={config.step.accumulate} divides, "
            f"got {steps} and {size}"
        )
    config = replace(config, data=replace(config.data, batch_size=size))
    arms = {name: _arm(config, name, checkpoint, device) for name in ("exact", "eager", "fused")}
    batches = _images(config, arms["exact"].objective, max(steps, _STEPS), device)
    floor = _FLOOR[config.step.precision]
    rows = []
    found = {name: _forward_backward(arm, batches[0]) for name, arm in arms.items()}
    for what in dict.fromkeys(what for each in found.values() for what in each):
        factor = _GRADIENTS if what.startswith("gradient") else _RESULTS
        if any(what not in each for each in found.values()):
            rows.append(Row(f"{what}, which not all have", 0.0, float("inf"), 0.0))
            continue
        eager, fused = (_error(found[n][what], found["exact"][what]) for n in ("eager", "fused"))
        rows.append(Row(what, eager, fused, factor * eager + floor))
    before = copy.deepcopy(_weights(arms["exact"]))
    losses: dict[str, list[Tensor]] = {name: [] for name in arms}
    for number, batch in enumerate(batches[:steps], start=1):
        for name, arm in arms.items():
            losses[name].append(arm.step(batch.to(arm.dtype), number).loss.detach())
        if number == min(_STEPS, steps):
            rows += _weight_rows(arms, before, number, floor)
    eager, fused = (_overlay(losses[name], losses["exact"]) for name in ("eager", "fused"))
    rows.append(Row(f"loss over {steps} steps, worst", eager, fused, _RESULTS * eager + floor))
    return rows


def print_rows(rows: list[Row], console: Console) -> None:
    """Print the comparison; of gradients that pass, the worst of each module."""
    shown: list[Row] = []
    for row in rows:
        if not row.passed or not row.what.startswith("gradient"):
            shown.append(row)
    passed: dict[str, list[Row]] = {}
    for row in rows:
        if row.passed and row.what.startswith("gradient"):
            passed.setdefault(row.what.partition(".")[0], []).append(row)
    for of_module in passed.values():
        worst = max(of_module, key=lambda r: r.fused / r.limit)
        shown.append(replace(worst, what=f"{worst.what} (worst of {len(of_module)})"))
    table = Table(title="relative error against fp64")
    table.add_column("what")
    for heading in ("eager", "fused", "limit", ""):
        table.add_column(heading, justify="right")
    for row in shown:
        verdict = "ok" if row.passed else "DIFFERS"
        table.add_row(row.what, *(f"{x:.1e}" for x in (row.eager, row.fused, row.limit)), verdict)
    console.print(table)
    failed = sum(not row.passed for row in rows)
    console.print(f"{len(rows)} comparisons, {failed} beyond their limit")


def _arm(config: Config, name: str, checkpoint: Path | None, device: torch.device | str) -> _Arm:
    fused = name == "fused"
    step = replace(config.step, ops="fused" if fused else "eager")
    if not fused:
        step = replace(step, attention="auto")
    if name == "exact":
        step = replace(step, precision="fp32")
    chosen = replace(
        config, step=step, optim=replace(config.optim, optimizer="adamw_ema" if fused else "torch")
    )
    # Schedules need the length of an epoch; any will do, since it is the same for all.
    objective = build_objective(chosen, steps_per_epoch=1000)
    if checkpoint is not None:
        path = newest_checkpoint(checkpoint)
        tensors, _ = load_checkpoint(path)
        for module_name, module in objective.modules().items():
            prefix = f"{module_name}."
            state = {k: v for k, v in tensors["model"].items() if k.startswith(prefix)}
            load_weights(
                module,
                {k.removeprefix(prefix): v for k, v in state.items()},
                f"{path}, {module_name}",
            )
    dtype = torch.float64 if name == "exact" else torch.float32
    for module in objective.modules().values():
        module.to(device=device, dtype=dtype)
    return _Arm(objective, build_step(chosen, objective, torch.device(device)), dtype)


def _images(
    config: Config, objective: Objective[Any], count: int, device: torch.device | str
) -> list[Tensor]:
    shape = (config.data.batch_size, 3, *objective.transforms.size)
    with seeded(config.run.seed):
        return [torch.randn(shape).to(device) for _ in range(count)]


def _forward_backward(arm: _Arm, images: Tensor) -> dict[str, Tensor]:
    """The first step's outputs, loss and every gradient, before any update."""
    objective, step = arm.objective, arm.step
    draws = objective.draws(1, len(images), slice(0, len(images)))
    images = images.to(arm.dtype)
    # A block of autocast each: it would give the loss the casts that were made without gradients.
    with autocast(step.device, step.precision), torch.no_grad():
        found = objective.outputs(images, draws)
    with autocast(step.device, step.precision):
        found["loss"] = objective.loss(images, draws)
    step.scaler.scale(found["loss"]).backward()
    scale = step.scaler.get_scale() if step.scaler.is_enabled() else 1.0
    for name, module in objective.modules().items():
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {name}.{key}"] = parameter.grad.double() / scale
    step.optimizer.zero_grad()
    return {name: value.detach().double() for name, value in found.items()}


def _weights(arm: _Arm) -> dict[str, Tensor]:
    return {
        name: torch.cat([p.detach().double().flatten() for p in module.parameters()])
        for name, module in arm.objective.modules().items()
    }


def _weight_rows(
    arms: dict[str, _Arm], before: dict[str, Tensor], number: int, floor: float
) -> list[Row]:
    """Errors of the weights, relative to how far they have moved."""
    weights = {name: _weights(arm) for name, arm in arms.items()}
    rows = []
    for module, exact in weights["exact"].items():
        moved = exact - before[module]
        eager, fused = (
            _error(weights[n][module] - before[module], moved) for n in ("eager", "fused")
        )
        what = f"{module} after {number} steps, of its way"
        rows.append(Row(what, eager, fused, _GRADIENTS * eager + floor))
    return rows


def _overlay(losses: list[Tensor], exact: list[Tensor]) -> float:
    return max(_error(a, b) for a, b in zip(losses, exact, strict=True))


def _error(value: Any, exact: Tensor) -> float:  # noqa: ANN401
    difference = (value.double() - exact.double()).norm().item()
    return difference / max(exact.double().norm().item(), 1e-30) if difference else 0.0
