"""The parts of a fine-tuning run, and what its checkpoints hold."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import DataLoader

from stopfast.checkpoint import (
    MANIFEST,
    CheckpointError,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    unflatten_state,
)
from stopfast.config import Transforms, to_document
from stopfast.data.loader import TrainPlan
from stopfast.encoder import VisionTransformer
from stopfast.finetuning.data import LabelledImages, TrainKeys, load
from stopfast.finetuning.settings import FinetuneSettings, Recipe
from stopfast.finetuning.step import FinetuneStep, Labelled
from stopfast.run_state import different_settings, save_step

CHECKPOINTS, MODEL, RESULT = "checkpoints", "model", "result.json"


@dataclass(kw_only=True)
class Run:
    """The parts of a run that has begun, and how far it is."""

    settings: FinetuneSettings
    console: Console
    output: Path
    checkpoint: Path
    encoder: VisionTransformer
    transforms: Transforms
    train: LabelledImages
    test: LabelledImages
    tested: DataLoader[Labelled]
    """All test images, in batches."""
    plan: TrainPlan
    step: FinetuneStep
    workers: int
    done: int = 0
    """Updates that the weights have taken."""
    updating: bool = False
    """In the middle of an update, which may be cut in two."""

    @property
    def recipe(self) -> Recipe:
        """What the settings say of the model."""
        return self.settings.recipe

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the labels."""
        return self.train.images.classes

    @property
    def last_step(self) -> int:
        """Updates of the whole run."""
        return self.recipe.epochs * self.plan.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.done / self.plan.steps_per_epoch

    def tell(self, text: str) -> None:
        """Print a line that begins with how far the run is."""
        self.console.print(f"step {self.done}/{self.last_step}, epoch {self.epoch:.2f}: {text}")

    def depends_on(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint must have in common with the one that made it."""
        manifest = (self.checkpoint / MANIFEST).read_bytes()
        return {
            "recipe": to_document(self.recipe),
            "start": {"sha256": hashlib.sha256(manifest).hexdigest(), "which": self.settings.which},
            "data": {
                name: labelled.images.fingerprint()
                for name, labelled in (("train", self.train), ("test", self.test))
            },
        }

    def batches(self) -> Generator[Labelled, None, None]:
        """Yield the micro-batches of the steps that are left."""
        keys = TrainKeys(self.plan, self.done + 1, self.last_step, self.recipe.accumulate)
        yield from load(self.train, keys, self.workers, self.step.device)

    def save(self) -> Path:
        """Write a checkpoint of the updates done."""
        return save_step(
            self.output / CHECKPOINTS,
            self.done,
            self.step.model.state_dict(),
            self.step.state_dict(),
            {"finetuning": self.depends_on()},
            self.step.device,
        )

    def load(self) -> Path:
        """Take over the newest checkpoint.

        Raises:
            CheckpointError: an altered one, or one of another recipe, start or data.
        """
        path = newest_checkpoint(self.output / CHECKPOINTS)
        tensors, documents = load_checkpoint(path)
        different = different_settings(documents["finetuning"], self.depends_on(), {})
        if different:
            raise CheckpointError(
                f"{path}: expected recipe, start and data that it was made with, got other "
                f"{', '.join(different)}"
            )
        load_weights(self.step.model, tensors["model"], str(path))
        state = documents["state"]
        self.step.load_state_dict(unflatten_state(tensors["optimizer"], state["optimizer"]))
        self.done = state["step"]
        return path
