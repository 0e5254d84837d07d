"""A run: where, how long between looks and checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stopfast.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """What is watched while training: a loss that falls says nothing about collapse."""

    every: int = 500
    """Steps between two looks; 0 for none."""
    images: int = 512
    """Training images, fixed, whose features are watched."""
    labelled: Path | None = None
    """Folder with ``train/`` and ``test/`` of class folders for a kNN accuracy; default: where the training
    images lie, if there are such folders."""
    labelled_images: int = 2048
    """At most this many images of each of the two."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"expected every >= 0, got {self.every}")
        for name in ("images", "labelled_images"):
            count = getattr(self, name)
            require(count > 1, f"expected {name} > 1, got {count}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where and how the run happens."""

    output: Path | None = None
    """Folder of the run; default ``runs/<preset>``."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = 50
    """Steps between two printed lines."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the newest two are kept."""
    resume: bool = False
    """Go on from the newest checkpoint in ``output``, where there is one."""
    dry_run: Annotated[bool, tyro.conf.arg(prefix_name=False)] = False
    """Print the resolved settings and stop."""
    tensorboard: bool = False
    """Write TensorBoard events beside the CSV and JSONL files."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"expected seed in 0..2**63-1, got {self.seed}")
        require(self.log_every > 0, f"expected log_every > 0, got {self.log_every}")
        require(
            self.checkpoint_every > 0,
            f"expected checkpoint_every > 0, got {self.checkpoint_every}",
        )
