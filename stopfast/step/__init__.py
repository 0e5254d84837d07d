"""One optimiser step of any objective, and the switches that make it fast."""

from stopfast.step.train_step import Precision, StepResult, TrainStep, autocast

__all__ = ["Precision", "StepResult", "TrainStep", "autocast"]
