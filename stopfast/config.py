"""The settings of a run, as frozen dataclasses."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

Range = tuple[float, float]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transforms:
    """How a photograph becomes a training image."""

    size: tuple[int, int] = (224, 224)
    """Height and width of a training image, in pixels."""
    crop_scale: Range = (0.3, 1.0)
    """Area of the random crop, as a share of the photograph."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
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
        _require(
            0 < low <= high <= 1, f"expected crop_scale 0 < low <= high <= 1, got {self.crop_scale}"
        )
        _require(
            0 < self.crop_ratio[0] <= self.crop_ratio[1],
            f"expected crop_ratio 0 < low <= high, got {self.crop_ratio}",
        )
        for name in ("flip", "gray", "blur"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"expected {name} in 0..1, got {share}")
        _require(
            0 < self.blur_radius[0] <= self.blur_radius[1],
            f"expected blur_radius 0 < low <= high, got {self.blur_radius}",
        )
        _require(0 < self.center <= 1, f"expected center in (0, 1], got {self.center}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the images come from."""

    root: Path | None = None
    """Folder of images, of class folders or of webdataset tars, or a folder with ``train/`` of that kind;
    or one tar."""
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
        _require(self.batch_size > 0, f"expected batch_size > 0, got {self.batch_size}")
        _require(self.threads > 0, f"expected threads > 0, got {self.threads}")
        for name in ("hardware_share", "max_broken"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"expected {name} in 0..1, got {share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Encoder and predictor."""

    patch_size: int = 16
    """Side of a patch, in pixels."""
    embed_dim: int = 768
    """Width of the encoder."""
    depth: int = 12
    num_heads: int = 12
    """Heads of the encoder, and of the predictor as published."""
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = 384
    predictor_depth: int = 6
    predictor_mlp_ratio: float = 4.0
    target_blocks: int = 1
    """Average the target encoder's last this many blocks."""
    init_rescale: bool = False
    """Divide the residual projections of block l by sqrt(2 l) at the start."""

    def __post_init__(self) -> None:
        _require(self.depth > 0, f"expected depth > 0, got {self.depth}")
        _require(
            self.predictor_depth >= 0, f"expected predictor_depth >= 0, got {self.predictor_depth}"
        )
        _require(
            1 <= self.target_blocks <= self.depth,
            f"expected target_blocks in 1..{self.depth}, got {self.target_blocks}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig:
    """What the predictor's queries are made of; see ``stopfast.Predictor``."""

    variant: Literal["ijepa", "stop", "stop_off", "stop_paper"] = "ijepa"
    """``ijepa``: mask token and position; ``stop``: position and projected noise; ``stop_off``: position
    alone; ``stop_paper``: the paper's own form of ``stop``."""
    noise_var: float = 0.25
    """Standard deviation of the noise (published name), or its variance with ``stop_paper``."""
    apply_to: Literal["masked", "context", "both"] = "masked"
    """Which tokens are noisy."""
    cov: Literal["learned", "fixed"] = "learned"
    """Whether the noise is projected, or added to the position as it is."""
    noise_dim: Literal["encoder", "predictor"] | None = None
    """Width that the noise is drawn in; default: the one that ``cov`` needs."""
    tie: bool = True
    """Whether the noise shares the projection of the context."""
    learned_pos_emb: bool = False
    """Learn the predictor's positions, from random ones."""


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
    """Momentum at the first step, and at the end of the schedule."""
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
    optimizer: Literal["auto", "adamw_ema", "torch", "apex"] = "auto"
    """Implementation of AdamW and of the average; see ``stopfast.optim.build_optimizer``."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"expected epochs > 0, got {self.epochs}")
        _require(
            0 <= self.warmup < self.epochs * self.ipe_scale,
            f"expected warmup in 0..epochs * ipe_scale, got {self.warmup}",
        )
        _require(
            0 <= self.ema[0] <= self.ema[1] <= 1,
            f"expected ema 0 <= start <= end <= 1, got {self.ema}",
        )
        _require(self.clip_norm > 0, f"expected clip_norm > 0, got {self.clip_norm}")


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
        _require(self.accumulate > 0, f"expected accumulate > 0, got {self.accumulate}")
        _require(self.bucket > 0, f"expected bucket > 0, got {self.bucket}")
        _require(
            not self.copies or self.precision == "bf16",
            f"expected precision bf16 with copies, got {self.precision}",
        )
        _require(
            not self.graphs or self.precision != "fp16",
            "expected precision fp32 or bf16 with graphs, got fp16, whose loss scaler no graph holds",
        )


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
        _require(self.every >= 0, f"expected every >= 0, got {self.every}")
        for name in ("images", "labelled_images"):
            count = getattr(self, name)
            _require(count > 1, f"expected {name} > 1, got {count}")


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
        _require(0 <= self.seed < 2**63, f"expected seed in 0..2**63-1, got {self.seed}")
        _require(self.log_every > 0, f"expected log_every > 0, got {self.log_every}")
        _require(
            self.checkpoint_every > 0,
            f"expected checkpoint_every > 0, got {self.checkpoint_every}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run depends on."""

    preset: Annotated[str, tyro.conf.Suppress]
    """Name of the preset that these settings began as; no flag, since it says where they came from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _require(
            self.data.batch_size % self.step.accumulate == 0,
            f"expected a batch_size that accumulate={self.step.accumulate} divides, "
            f"got {self.data.batch_size}",
        )


T = TypeVar("T")


def to_document(config: object) -> dict[str, Any]:
    """Return settings as what JSON can hold."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return [plain(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in asdict(config).items()}  # type: ignore[call-overload]


def from_document(cls: type[T], document: dict[str, Any]) -> T:
    """Undo :func:`to_document` for the settings class ``cls``.

    Raises:
        ValueError: a setting that this version does not know, or a value that it refuses.
    """
    hints = get_type_hints(cls)
    unknown = document.keys() - hints.keys()
    _require(not unknown, f"expected settings of {cls.__name__}, got also {sorted(unknown)}")
    values = {}
    for entry in fields(cls):  # type: ignore[arg-type]
        if entry.name not in document:
            continue
        value, hint = document[entry.name], hints[entry.name]
        if is_dataclass(hint):
            value = from_document(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and hint == Path | None:
            value = Path(value)
        values[entry.name] = value
    return cls(**values)
