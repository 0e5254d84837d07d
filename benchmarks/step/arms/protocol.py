"""What an arm of the step benchmarks is: a way to take the very same training steps."""

from typing import Protocol

from torch import Tensor


class StepArm(Protocol):
    """One way to take the steps of a :class:`benchmarks.step.workload.Workload`."""

    def step(self, number: int, noise: list[Tensor] | None = None) -> Tensor:
        """Take optimiser step ``number`` = 1, 2, ...; the loss, on the device and not read.

        ``noise`` is :meth:`benchmarks.step.workload.Workload.noise_of` that step. An arm that is given none
        draws its own, in its own way; stopfast's draws are these numbers, so it takes none.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """Weights in fp32: "encoder.", "predictor." or "target_encoder." and the published key."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """AdamW's first moments by the same names: after step 1 they are a tenth of the gradient."""
        ...

    def counts(self) -> dict[str, int]:
        """Compilations and captured graphs so far."""
        ...

    def choices(self) -> dict[str, str]:
        """What it chose by measurement, for the record."""
        ...

    def close(self) -> None:
        """Give back what the arm holds beyond its own memory."""
        ...
