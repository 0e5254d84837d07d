"""The record of a run on disk: CSV and JSONL always, TensorBoard and Weights & Biases on request.

The loss stays on the device until the journal is flushed, so that writing a row for every step does not
make the host wait for every step.
"""

import csv
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stopfast.config import Config, to_document

STEPS, LOOKS, LINES = "log.csv", "monitors.csv", "log.jsonl"
LOOKED_AT = ("step", "feature_std", "rankme", "target_variance", "knn")


class Sink(Protocol):
    """Somewhere else that rows go to."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Take a row of a step."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


class Journal:
    """Rows of a run in its folder, cut back to the checkpoint that a resumed run goes on from.

    ``log.csv`` has a row for every step (step, epoch, loss, the step's scalars, seconds and how many of
    these the host waited for data), ``monitors.csv`` one for every look of the monitors; ``log.jsonl`` has
    both.

    Args:
        folder: of the run; it exists.
        done: steps that the checkpoint has done; rows of later ones are removed, since they come again.
            Without any, the record of an attempt that left no checkpoint is removed.
        sinks: where else the rows go.
        looked_at: columns of ``monitors.csv``, ``step`` first; those of the objective follow.
    """

    def __init__(
        self,
        folder: Path,
        done: int,
        sinks: Sequence[Sink] = (),
        looked_at: Sequence[str] = LOOKED_AT,
    ) -> None:
        self.folder, self.sinks, self.looked_at = folder, list(sinks), looked_at
        self._held: list[tuple[dict[str, Any], Tensor]] = []
        if not done:
            for name in (STEPS, LOOKS, LINES):
                (folder / name).unlink(missing_ok=True)
        for name in (STEPS, LOOKS):
            _cut(folder / name, done, lambda line: line.partition(",")[0])
        _cut(folder / LINES, done, lambda line: str(json.loads(line)["step"]))

    def step(self, row: Mapping[str, float], loss: Tensor) -> None:
        """Hold a step's row, ``step`` first, until the next flush."""
        self._held.append((dict(row), loss))

    def flush(self) -> list[float]:
        """Write the steps held, and return their losses; this waits for the device."""
        if not self._held:
            return []
        losses = torch.stack([loss for _, loss in self._held]).tolist()
        rows = [{**row, "loss": loss} for (row, _), loss in zip(self._held, losses, strict=True)]
        self._held.clear()
        self._write(STEPS, list(rows[0]), rows)
        return losses

    def looked(self, step: int) -> bool:
        """Whether a look after this step is written."""
        path = self.folder / LOOKS
        if not path.exists():
            return False
        return any(line.startswith(f"{step},") for line in path.read_text().splitlines())

    def look(self, row: Mapping[str, float]) -> None:
        """Write what the monitors saw, ``step`` first; what the objective measures is in every row."""
        measured = [name for name in row if name not in self.looked_at]
        self._write(LOOKS, [*self.looked_at, *measured], [row])

    def close(self) -> None:
        """Write what is held, and close the sinks."""
        self.flush()
        self._sinks(lambda sink: sink.close())

    def _write(
        self, name: str, columns: Sequence[str], rows: Sequence[Mapping[str, float]]
    ) -> None:
        with (self.folder / name).open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
        with (self.folder / LINES).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            rest = {k: v for k, v in row.items() if k != "step"}
            self._sinks(lambda sink, row=row, rest=rest: sink.write(int(row["step"]), rest))

    def _sinks(self, act: Callable[[Sink], None]) -> None:
        """Act on each sink; one that fails is given up, since none is worth a run."""
        for sink in list(self.sinks):
            try:
                act(sink)
            except Exception as error:
                self.sinks.remove(sink)
                told = f"{type(sink).__name__.strip('_')} fails and gets no more rows: {error}"
                warnings.warn(told, RuntimeWarning, stacklevel=2)


def _cut(path: Path, done: int, step_of: Any) -> None:  # noqa: ANN401
    """Keep a file's header and its rows of steps up to ``done``; a last line that a kill cut short goes."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        step = step_of(line)
        if step == "step" or int(step) <= done:
            kept.append(line)
    whole = path.with_name(f".{path.name}.unfinished")
    whole.write_text("".join(kept))
    whole.replace(path)


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        # Events of steps that come again are hidden from purge_step on.
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, folder: Path, config: Config) -> None:
        wandb = import_module("wandb")
        name = folder / "wandb-id"
        resumed = name.read_text() if name.exists() else None
        self.run = wandb.init(
            project=project,
            dir=str(folder),
            name=folder.name,
            id=resumed,
            resume="allow",  # its rows of steps that come again stay: they are the same
            config=to_document(config),
        )
        name.write_text(self.run.id)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()


_NEEDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def require_sinks(config: Config) -> None:
    """Refuse settings whose loggers are not installed, before anything is written.

    Raises:
        ValueError: names the library and how to get it.
    """
    asked = {"tensorboard": config.run.tensorboard, "wandb": config.run.wandb is not None}
    for name, wanted in asked.items():
        if not wanted:
            continue
        try:
            import_module(_NEEDS[name])
        except ImportError as error:
            raise ValueError(
                f"expected {name} for --run.{name}, which cannot be imported ({error}): "
                f"pip install 'stopfast[{name}]'"
            ) from None


def open_sinks(config: Config, folder: Path, done: int) -> list[Sink]:
    """Return the loggers that the settings ask for."""
    sinks: list[Sink] = []
    if config.run.tensorboard:
        sinks.append(_TensorBoard(folder, done))
    if config.run.wandb is not None:
        sinks.append(_WeightsAndBiases(config.run.wandb, folder, config))
    return sinks


def last_finite(losses: list[float], last: int) -> float:
    """Return the last of the losses up to step ``last``, NaN where there are none.

    Raises:
        FloatingPointError: one that is not finite.
    """
    for back, loss in enumerate(reversed(losses)):
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {last - back}: the loss is {loss}")
    return losses[-1] if losses else math.nan
