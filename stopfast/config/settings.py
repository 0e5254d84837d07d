"""All settings of a run."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from stopfast.config.checks import require
from stopfast.config.data import DataConfig
from stopfast.config.model import ModelConfig, NoiseConfig
from stopfast.config.objective import (
    DropPosConfig,
    JepaConfig,
    ReconstructionConfig,
)
from stopfast.config.run import MonitorConfig, RunConfig
from stopfast.config.training import OptimConfig, StepConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run depends on."""

    preset: Annotated[str, tyro.conf.Suppress]
    """Name of the preset that these settings began as; no flag, since it says where they came from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: Annotated[
        JepaConfig | DropPosConfig | ReconstructionConfig, tyro.conf.AvoidSubcommands
    ] = field(default_factory=JepaConfig)
    """Which one it is, the preset says."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def jepa(self) -> JepaConfig:
        """The settings of I-JEPA and StoP.

        Raises:
            ValueError: of another objective.
        """
        if not isinstance(self.objective, JepaConfig):
            raise ValueError(f"expected I-JEPA or StoP, got the objective {self.objective.name!r}")
        return self.objective

    def __post_init__(self) -> None:
        require(
            self.data.batch_size % self.step.accumulate == 0,
            f"expected a batch_size that accumulate={self.step.accumulate} divides, "
            f"got {self.data.batch_size}",
        )
        require(
            isinstance(self.objective, JepaConfig) or not self.optim.clip_encoder_only,
            "expected --optim.clip-encoder-only with I-JEPA or StoP alone, got "
            f"{self.objective.name}",
        )
        if isinstance(self.objective, JepaConfig):
            require(
                1 <= self.objective.target_blocks <= self.model.depth,
                f"expected target_blocks in 1..{self.model.depth}, got {self.objective.target_blocks}",
            )
