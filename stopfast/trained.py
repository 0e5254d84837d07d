"""The networks of a run, loaded from its checkpoint: what evaluation, export and pictures begin with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stopfast.checkpoint import load_checkpoint, load_weights, newest_checkpoint
from stopfast.config import Config, from_document
from stopfast.encoder import VisionTransformer
from stopfast.networks import build_encoder, build_predictor, seeded
from stopfast.predictor import Predictor

Which = Literal["target_encoder", "encoder"]


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What a checkpoint holds, on the CPU and in evaluation mode."""

    checkpoint: Path
    config: Config
    step: int
    """Optimiser steps that it has done."""
    encoder: VisionTransformer
    predictor: Predictor
    target_encoder: VisionTransformer

    def chosen(self, which: Which) -> VisionTransformer:
        """Return one of the two encoders; the published results are the target encoder's."""
        return self.target_encoder if which == "target_encoder" else self.encoder

    def untrained(self) -> VisionTransformer:
        """Return the encoder that the run began with."""
        with seeded(self.config.run.seed):
            return build_encoder(self.config).eval()


def load_trained(path: Path) -> TrainedRun:
    """Load a checkpoint folder, or the newest one of a run's folder.

    Raises:
        CheckpointError: none there, an altered one, or weights that do not fit its settings.
    """
    checkpoint = newest_checkpoint(path)
    tensors, documents = load_checkpoint(checkpoint)
    config = from_document(Config, documents["config"])
    run = TrainedRun(
        checkpoint=checkpoint,
        config=config,
        step=documents["state"]["step"],
        encoder=build_encoder(config).eval(),
        predictor=build_predictor(config).eval(),
        target_encoder=build_encoder(config).eval().requires_grad_(False),
    )
    for name in ("encoder", "predictor", "target_encoder"):
        prefix = f"{name}."
        state = {
            k.removeprefix(prefix): v for k, v in tensors["model"].items() if k.startswith(prefix)
        }
        load_weights(getattr(run, name), state, f"{checkpoint}, {name}")
    return run
