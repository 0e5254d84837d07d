"""The settings of a fine-tuning run: a recipe, and where it is applied."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stopfast.trained import Which

Range = tuple[float, float]
RecipeName = Literal[
    "droppos-b",
    "droppos-l",
    "beyond",
    "ijepa-1-percent",
    "ijepa-1-percent-h",
    "ijepa-100-percent",
    "small",
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a fine-tuned model depends on, beside the checkpoint and the images."""

    epochs: int = 100
    batch_size: int = 1024
    """Images of one optimiser step."""
    accumulate: int = 1
    """Micro-batches of one step; mixup and cutmix are drawn anew for each, as for each GPU of the published
    runs."""
    blr: float = 1e-3
    """Learning rate after the warm-up for batches of 256; it is scaled with the batch."""
    lr: float | None = None
    """Learning rate after the warm-up as it is, instead of ``blr``."""
    min_lr: float = 1e-6
    """Learning rate at the end of its cosine."""
    warmup: float = 5.0
    """Warm-up from 0, in epochs."""
    schedule: Literal["mae", "beit"] = "mae"
    """With ``beit`` the warm-up's last step has the full rate already."""
    layer_decay: float = 0.75
    """Learning rate of a layer over that of the next one; the head has the whole."""
    weight_decay: float = 0.05
    """Of weights of two dimensions or more, but for positions and class token."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows from 0 at the first in a straight line."""
    positions: Literal["frozen", "learned"] = "frozen"
    """Whether the position table is trained; either way it begins as the checkpoint has it."""
    fc_norm: bool = True
    """A new norm after the average over patches; without, the checkpoint's own norm before it."""
    head_std: float = 2e-5
    """Standard deviation of the head's weights at the start, truncated; its biases are 0."""
    init_values: float | None = None
    """Add layer scale to every branch, of this value at the start; None for none."""
    label_smoothing: float = 0.1
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none. With both, each is used for half of the batches."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's words; empty for none."""
    color_jitter: float = 0.0
    """Strength of the colour jitter, which timm leaves out where there is RandAugment."""
    erase: float = 0.25
    """Probability that a rectangle is replaced by noise."""
    crop_scale: Range = (0.08, 1.0)
    """Area of the random crop, as a share of the photograph."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    center: float = 224 / 256
    """For evaluation: side of the centred crop, as a share of the shorter side."""
    share: float = 1.0
    """Share of each class's training images that is used, at least one image."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            _require(getattr(self, name) > 0, f"expected {name} > 0, got {getattr(self, name)}")
        parts, rest = divmod(self.batch_size, self.accumulate)
        _require(
            rest == 0,
            f"expected a batch_size that accumulate={self.accumulate} divides, got {self.batch_size}",
        )
        _require(
            not (self.mixup or self.cutmix) or parts % 2 == 0,
            f"expected an even micro-batch with mixup or cutmix, which mix pairs, got {parts}",
        )
        _require(0 <= self.warmup < self.epochs, f"expected warmup in 0..epochs, got {self.warmup}")
        _require(
            0 <= self.min_lr <= self.top_lr,
            f"expected a learning rate >= min_lr={self.min_lr}, got {self.top_lr}",
        )
        for name in ("layer_decay", "center", "share"):
            share = getattr(self, name)
            _require(0 < share <= 1, f"expected {name} in (0, 1], got {share}")
        for name in ("drop_path", "label_smoothing"):
            share = getattr(self, name)
            _require(0 <= share < 1, f"expected {name} in [0, 1), got {share}")
        for name in ("erase", "flip"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"expected {name} in 0..1, got {share}")
        for name in ("weight_decay", "head_std", "mixup", "cutmix", "color_jitter", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"expected {name} >= 0, got {value}")
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1, f"expected crop_scale 0 < low <= high <= 1, got {self.crop_scale}"
        )
        _require(
            not self.rand_augment or self.rand_augment.startswith("rand"),
            f"expected rand_augment in timm's words, rand-..., or empty, got {self.rand_augment!r}",
        )

    @property
    def top_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.blr * self.batch_size / 256 if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """Train a classifier end to end, from a pre-trained encoder."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint folder, or a run's folder: then its newest checkpoint."""
    data: Path
    """Folder with train/ and val/ or test/, each of class folders of images."""
    name: Annotated[RecipeName, tyro.conf.arg(name="recipe")]
    """What the other flags begin from."""
    which: Which = "target_encoder"
    """Which of the two trained encoders; the published results are the target encoder's."""
    output: Path | None = None
    """Folder of the run; default: ``runs/<pre-training's folder>-<recipe>``."""
    resume: bool = False
    """Go on from the newest checkpoint in ``output``, where there is one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    """Processes that decode and augment, 0 for none beside this one; default: one less than there are
    processors. They change no number."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Images that cannot be decoded: say which and stop before training, or leave them out."""
    log_every: int = 50
    """Steps between two printed lines."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        _require(
            self.workers is None or self.workers >= 0, f"expected workers >= 0, got {self.workers}"
        )
        _require(self.log_every > 0, f"expected log_every > 0, got {self.log_every}")
