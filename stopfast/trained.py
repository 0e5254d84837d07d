"""The networks of a run, loaded from its checkpoint: what evaluation, export and pictures begin with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from stopfast.build import build_objective
from stopfast.checkpoint import CheckpointError, load_checkpoint, load_modules, newest_checkpoint
from stopfast.config import Config, from_document
from stopfast.encoder import VisionTransformer
from stopfast.networks import build_encoder, seeded
from stopfast.objectives import Objective
from stopfast.objectives.jepa import Jepa
from stopfast.predictor import Predictor

Which = Literal["target_encoder", "encoder"]
"""The trained encoder, or the moving average of it that was its teacher. DropPos, MAE and Beyond Masking
have no teacher: both names mean their one encoder."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What a checkpoint holds, on the CPU and in evaluation mode."""

    checkpoint: Path
    config: Config
    step: int
    """Optimiser steps that it has done."""
    objective: Objective[Any]

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All networks of the objective, by the names that they are saved under."""
        return self.objective.modules()

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder that was trained."""
        return cast(VisionTransformer, self.modules["encoder"])

    @property
    def target_encoder(self) -> VisionTransformer:
        """The encoder's moving average; the encoder itself where the objective has no teacher."""
        for student, teacher in self.objective.teacher_pairs():
            if student is self.encoder:
                return cast(VisionTransformer, teacher)
        return self.encoder

    @property
    def predictor(self) -> Predictor:
        """The predictor of I-JEPA and StoP.

        Raises:
            ValueError: a run of another objective.
        """
        if not isinstance(self.objective, Jepa):
            name = self.config.objective.name
            raise ValueError(f"expected a run of I-JEPA or StoP, got the objective {name!r}")
        return self.objective.predictor

    def chosen(self, which: Which) -> VisionTransformer:
        """Return one of the two encoders; the published results are the target encoder's."""
        return self.target_encoder if which == "target_encoder" else self.encoder

    def untrained(self) -> VisionTransformer:
        """Return the encoder that the run began with."""
        with seeded(self.config.run.seed):
            return build_encoder(self.config).eval()


def load_trained(path: Path) -> TrainedRun:
    """Load a checkpoint folder, or the newest one of a run's folder, whatever its objective.

    Raises:
        CheckpointError: none there, an altered one, or weights that do not fit its settings.
    """
    checkpoint = newest_checkpoint(path)
    tensors, documents = load_checkpoint(checkpoint)
    if "config" not in documents:
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of pre-training, got one with {sorted(documents)}"
        )
    config = from_document(Config, documents["config"])
    images = documents.get("data", {}).get("images", 0)
    objective = build_objective(config, max(1, images // config.data.batch_size))
    load_modules(objective.modules(), tensors["model"], str(checkpoint))
    for module in objective.modules().values():
        module.eval()
    return TrainedRun(
        checkpoint=checkpoint, config=config, step=documents["state"]["step"], objective=objective
    )
