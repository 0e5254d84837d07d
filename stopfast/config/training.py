"""The optimiser, its schedules, and how a step is computed."""

from dataclasses import dataclass
from typing import Literal

from stopfast.config.checks import Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedules, and the moving average of the target encoder."""

    epochs: int = 300
    warmup: float = 15.0
    """Warm-up, in epochs."""
    start_lr: float = 2e-4
    """Learning rate that the warm-up begins at."""
    lr: float = 1e-3
    """Learning rate after the warm-up; it is not scaled with the batch."""
    final_lr: float = 1e-6
    """Learning rate at the end of its cosine."""
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    """Weight decay at the end of its cosine."""
    ema: Range = (0.996, 1.0)
    """Momentum of a target encoder's average at the first step, and at the end of the schedule."""
    ipe_scale: float = 1.0
    """Length of the schedules over the length of the run."""
    fix_lr_thres: float = -1.0
    """Epoch from which the learning rate leaves its cosine; negative for never."""
    fix_lr_strategy: Literal["const", "linear"] = "const"
    fix_wd_thres: float = -1.0
    """Epoch from which the weight decay leaves its cosine; negative for never."""
    fix_wd_strategy: Literal["const", "linear"] = "const"
    clip: Literal["none", "global", "per_tensor"] = "none"
    clip_norm: float = 1.0
    clip_encoder_only: bool = False
    """Clip the encoder's gradients alone, as the published StoP does."""
    betas: Range = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    decay_tokens: bool = True
    """Whether mask and class tokens are decayed."""
    schedule: Literal["ijepa", "mae", "beit"] = "ijepa"
    """How the published programs count steps: ``ijepa`` from 1, so that the first step is one into the
    warm-up; ``mae`` from 0; ``beit`` from 0, with a warm-up whose last step has the full rate."""
    optimizer: Literal["auto", "adamw_ema", "torch", "apex"] = "auto"
    """Implementation of AdamW and of the average; see ``stopfast.optim.build_optimizer``."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"expected epochs > 0, got {self.epochs}")
        require(
            0 <= self.warmup < self.epochs * self.ipe_scale,
            f"expected --optim.warmup below epochs * ipe_scale = {self.epochs * self.ipe_scale:g}, "
            f"got {self.warmup}",
        )
        require(
            0 <= self.ema[0] <= self.ema[1] <= 1,
            f"expected ema 0 <= start <= end <= 1, got {self.ema}",
        )
        require(self.clip_norm > 0, f"expected clip_norm > 0, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """How one optimiser step is computed."""

    fast: bool = False
    """Turn on all that is expected to make a step faster on its device and leaves its numbers the same,
    but for what other flags say; see ``stopfast.build.fastest``."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    """Micro-batches of one step; with ``truncate_over="global"`` they equal the big batch."""
    checkpointing: bool = False
    """Recompute each block's activations in backward."""
    ops: Literal["auto", "eager", "fused"] = "auto"
    """Implementation of the operations; ``auto`` is eager on the CPU and by measurement on a GPU."""
    attention: Literal["auto", "triton", "sdpa", "flex", "xformers"] = "auto"
    """Backend of attention; ``auto`` is that of the operations."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    skip_unused: bool = True
    """Leave out what nothing reads; gradients are the same."""
    bucket: int = 1
    """Round the lengths of contexts and targets up to multiples of this and pad; 1 for none. The numbers
    are the same, and there are far fewer shapes."""
    ahead: bool = True
    """Draw the next step's masks while this one is computed."""
    copies: bool = False
    """Compute with bf16 copies of the weights that the optimiser writes, instead of casting them in every
    step; for bf16, with ``--optim.optimizer adamw_ema``."""
    target_stream: bool = False
    """Run the target encoder beside the context encoder, on a CUDA stream of its own."""
    graphs: bool = False
    """Replay whole steps, update included, as CUDA graphs: one for each shape, so with a bucket."""

    def __post_init__(self) -> None:
        require(self.accumulate > 0, f"expected accumulate > 0, got {self.accumulate}")
        require(self.bucket > 0, f"expected bucket > 0, got {self.bucket}")
        require(
            not self.copies or self.precision == "bf16",
            f"expected precision bf16 with copies, got {self.precision}",
        )
        require(
            not self.graphs or self.precision != "fp16",
            "expected precision fp32 or bf16 with graphs, got fp16, whose loss scaler no graph holds",
        )
