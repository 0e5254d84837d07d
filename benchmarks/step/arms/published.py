"""The published StoP program with all its costs, and without the needless ones."""

import warnings

import torch
from torch import Tensor

from benchmarks.step.arms.program import Program, build_networks
from benchmarks.step.published_model import published_ema
from benchmarks.step.workload import Workload


class Published(Program):
    """The published program's step.

    Softmax matrices in memory; attention and MLP of every block recomputed; the position table repeated
    for each image; a loss scale even for bf16; AdamW as it is called by default; the average tensor by
    tensor; and the host waiting for the device for each weight matrix's gradient norm, for the loss and
    for the timer.
    """

    def __init__(self, workload: Workload) -> None:
        networks = build_networks(workload, sdpa=False, checkpointing="full", repeat_tables=True)
        super().__init__(workload, networks)
        self._scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            self.device.type, enabled=workload.precision == "bf16"
        )

    def step(self, number: int, noise: list[Tensor] | None = None) -> Tensor:
        """Take one optimiser step, and read what the program logs of it."""
        with warnings.catch_warnings():
            # The program checkpoints the target encoder too, which has no gradients to recompute for.
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            loss = super().step(number, noise)
        float(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def _optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups)

    def _update(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._log_gradients()
        self.optimizer.zero_grad()

    def _log_gradients(self) -> list[float]:
        return [
            float(torch.norm(parameter.grad))
            for name, parameter in self.networks.encoder.named_parameters()
            if parameter.grad is not None and not name.endswith(".bias") and parameter.ndim > 1
        ]

    def _follow(self, momentum: float) -> None:
        published_ema(self.networks.encoder, self.networks.target_encoder, momentum)
