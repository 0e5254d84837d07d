"""The settings of a run, as frozen dataclasses."""

from stopfast.config.checks import Range
from stopfast.config.data import DataConfig, Transforms
from stopfast.config.documents import from_document, to_document
from stopfast.config.model import ModelConfig, NoiseConfig
from stopfast.config.objective import (
    Degradation,
    DegradeConfig,
    DropPosConfig,
    JepaConfig,
    MaskConfig,
    ObjectiveConfig,
    ReconstructionConfig,
)
from stopfast.config.run import MonitorConfig, RunConfig
from stopfast.config.settings import Config
from stopfast.config.training import OptimConfig, StepConfig

__all__ = [
    "Config", "DataConfig", "Degradation", "DegradeConfig", "DropPosConfig", "JepaConfig",
    "MaskConfig", "ModelConfig", "MonitorConfig", "NoiseConfig", "ObjectiveConfig", "OptimConfig",
    "Range", "ReconstructionConfig", "RunConfig", "StepConfig", "Transforms", "from_document",
    "to_document",
]  # fmt: skip
