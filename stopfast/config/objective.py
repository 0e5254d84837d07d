"""What is learned, and its own settings."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from stopfast.config.checks import Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """The multi-block masks; see ``stopfast.MultiBlockMasks``."""

    enc_mask_scale: Range = (0.85, 1.0)
    """Area of a context block, as a share of the image, before the targets are cut out of it."""
    pred_mask_scale: Range = (0.15, 0.2)
    """Area of a target block."""
    aspect_ratio: Range = (0.75, 1.5)
    """Height over width of a target block."""
    nenc: int = 1
    """Context blocks of an image."""
    npred: int = 4
    """Target blocks of an image."""
    min_keep: int = 10
    """A context keeps more patches than this."""
    allow_overlap: bool = False
    """Whether targets stay in the context."""
    edge_inclusive: bool = False
    """Whether blocks reach the last row and column; the published ones never do."""
    truncate: Literal["first", "random"] = "first"
    """Which patches a context keeps when it is cut to the shortest; the published ones keep the first."""
    truncate_over: Literal["local", "global"] = "local"
    """Whether the shortest is that of the micro-batch or of the step's whole batch."""


Degradation = Literal["none", "zoomed-in", "zoomed-out", "distorted", "blurred", "decolorized"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DegradeConfig:
    """What is taken from the image that the encoder sees; see ``stopfast.degradations``."""

    kind: Degradation = "none"
    """A degradation of Beyond Masking (Tian et al., 2022)."""
    margin: int = 32
    """zoomed-in, zoomed-out: pixels on each side that the encoder does not see, or sees mirrored."""
    edge_weight: float = 0.2
    """zoomed-in: share of the loss that is of the unseen margin."""
    strength: Range = (0.15, 0.25)
    """distorted: range of the magnitude."""
    blur_std: float = 0.02
    """blurred: standard deviation of the weights of the 7 x 7 kernel, around 1/49."""
    mix_channels: bool = True
    """blurred: whether a blurred channel is a sum over all three, as in our
    reconstruction of what is published."""
    gray_channels: Literal[1, 3] = 1
    """decolorized: channels of the encoder's input; 1 as published, 3 for the same gray in each."""

    def __post_init__(self) -> None:
        require(self.margin > 0, f"expected margin > 0, got {self.margin}")
        require(0 <= self.edge_weight <= 1, f"expected edge_weight in 0..1, got {self.edge_weight}")
        require(
            0 <= self.strength[0] <= self.strength[1],
            f"expected strength 0 <= low <= high, got {self.strength}",
        )
        require(self.blur_std >= 0, f"expected blur_std >= 0, got {self.blur_std}")


@dataclass(frozen=True, kw_only=True, slots=True)
class JepaConfig:
    """I-JEPA and StoP: predict a slow copy's features of masked blocks; see
    ``stopfast.objectives.jepa``."""

    name: Annotated[Literal["jepa"], tyro.conf.Suppress] = "jepa"
    mask: MaskConfig = field(default_factory=MaskConfig)
    target_blocks: int = 1
    """Average the target encoder's last this many blocks."""
    degrade: DegradeConfig = field(default_factory=DegradeConfig)
    """What the context encoder sees; the target encoder sees the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropPosConfig:
    """DropPos: tell where patches belong whose positions were dropped; see
    ``stopfast.objectives.droppos``."""

    name: Annotated[Literal["droppos"], tyro.conf.Suppress] = "droppos"
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    position_mask_ratio: float = 0.75
    """Share of the visible patches whose position it is not told."""
    position_token: Literal["param", "zeros", "wrong"] = "param"
    """What stands in for a dropped position: a learned token, nothing, or another dropped position."""
    shuffle: bool = False
    """Permute the visible patches, with all that is theirs, before the encoder, which sees
    no order."""
    sigma: float = 1.0
    """Width of the smoothing of the target positions, in patches; 0 for none."""
    sigma_decay: bool = True
    """Let it fall to 0 in a straight line, epoch by epoch."""
    smoothing_grid: Literal["released", "corrected"] = "corrected"
    """Grid that distances are measured on: the patches', or the released scripts' of 14-pixel patches."""
    smoothing_norm: Literal["released", "corrected"] = "corrected"
    """Whether each target sums to 1, or each column of the table of targets."""
    attentive: bool = True
    """Weight a patch by its similarity to the class token of the whole image."""
    temperature: float = 0.1
    """Of these weights' softmax."""
    ignore_confident: bool = False
    """Leave out patches whose true position is as probable as the target has it."""
    multi_task: bool = False
    """Reconstruct the masked patches' pixels as well, with a decoder of its own."""
    position_weight: float = 0.05
    """multi_task: weight of the loss of positions beside that of pixels."""

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "position_mask_ratio"):
            share = getattr(self, name)
            require(0 <= share < 1, f"expected {name} in 0..1, 1 excluded, got {share}")
        require(self.sigma >= 0, f"expected sigma >= 0, got {self.sigma}")
        require(self.temperature > 0, f"expected temperature > 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """MAE and Beyond Masking: predict the pixels of the image from a masked or degraded one; see
    ``stopfast.objectives.reconstruction``."""

    name: Annotated[Literal["reconstruction"], tyro.conf.Suppress] = "reconstruction"
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see; where it is not 0, the loss is theirs."""
    target_norm: Literal["none", "patch", "channel"] = "patch"
    """Normalise the pixels of each patch, all together (MAE) or each channel (Beyond Masking), or not."""
    degrade: DegradeConfig = field(default_factory=DegradeConfig)

    def __post_init__(self) -> None:
        require(
            0 <= self.mask_ratio < 1,
            f"expected mask_ratio in 0..1, 1 excluded, got {self.mask_ratio}",
        )
        require(
            self.mask_ratio > 0 or self.degrade.kind != "none",
            "expected mask_ratio > 0 or a degradation, got neither: there is nothing to reconstruct",
        )


ObjectiveConfig = JepaConfig | DropPosConfig | ReconstructionConfig
