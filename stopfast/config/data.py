"""Images: where they come from, and what becomes of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stopfast.config.checks import Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Transforms:
    """How a photograph becomes a training image."""

    size: tuple[int, int] = (224, 224)
    """Height and width of a training image, in pixels."""
    crop_scale: Range = (0.3, 1.0)
    """Area of the random crop, as a share of the photograph."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How the crop is resampled; antialiased either way."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    gray: float = 0.0
    """Probability of a grayscale image."""
    blur: float = 0.0
    """Probability of a Gaussian blur, after flip and grayscale."""
    blur_radius: Range = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the training image, drawn uniformly."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel, of values in 0..1, that is subtracted."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel that is divided by."""
    center: float = 1.0
    """For evaluation: side of the centred square, as a share of the shorter side."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1, f"expected crop_scale 0 < low <= high <= 1, got {self.crop_scale}"
        )
        require(
            0 < self.crop_ratio[0] <= self.crop_ratio[1],
            f"expected crop_ratio 0 < low <= high, got {self.crop_ratio}",
        )
        for name in ("flip", "gray", "blur"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"expected {name} in 0..1, got {share}")
        require(
            0 < self.blur_radius[0] <= self.blur_radius[1],
            f"expected blur_radius 0 < low <= high, got {self.blur_radius}",
        )
        require(0 < self.center <= 1, f"expected center in (0, 1], got {self.center}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the images come from."""

    root: Path | None = None
    """Folder of images, of class folders or of webdataset tars, or a folder with ``train/`` of that kind;
    or one tar."""
    digits: bool = False
    """Without a root: write out scikit-learn's handwritten digits, and train on them."""
    batch_size: int = 64
    """Images of one optimiser step."""
    threads: int = 2
    """Threads that decode."""
    loader: Literal["auto", "dali", "pil"] = "auto"
    """What decodes: NVIDIA DALI or PIL; ``auto`` is DALI where it is installed."""
    hardware_share: float = 0.65
    """Share of the images that a GPU's JPEG hardware decodes, where it has any."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Images that cannot be decoded: say which and stop before training, or leave them out."""
    max_broken: float = 0.01
    """With ``broken="skip"``: share of the images above which the run is refused all the same."""
    transforms: Transforms = field(default_factory=Transforms)

    def __post_init__(self) -> None:
        require(self.batch_size > 0, f"expected batch_size > 0, got {self.batch_size}")
        require(self.threads > 0, f"expected threads > 0, got {self.threads}")
        for name in ("hardware_share", "max_broken"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"expected {name} in 0..1, got {share}")
