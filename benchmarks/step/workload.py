"""The training problem that every arm of the step benchmarks solves: weights, images, masks, noise."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from platformdirs import user_cache_path
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stopfast.build import build_masks
from stopfast.config import (
    Config,
    DataConfig,
    JepaConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    StepConfig,
    Transforms,
)
from stopfast.kernels.noise import positional_noise
from stopfast.masking import Masks
from stopfast.networks import build_encoder, build_predictor, seeded
from stopfast.presets import PRESETS

Precision = Literal["fp32", "bf16"]
STEPS_PER_EPOCH = 625
"""Of ImageNet-1k in steps of 2,048 images, which the presets' schedules count in."""


def _toy() -> Config:
    """Seconds on a CPU; head dimension 24, as in the predictors of ViT-L and ViT-H."""
    return Config(
        preset="toy",
        data=DataConfig(transforms=Transforms(size=(32, 32))),
        model=ModelConfig(
            patch_size=4,
            embed_dim=48,
            depth=2,
            num_heads=2,
            predictor_embed_dim=48,
            predictor_depth=2,
        ),
        noise=NoiseConfig(variant="stop", noise_var=0.7),
        objective=JepaConfig(mask=MaskConfig(min_keep=4)),
        optim=OptimConfig(),
    )


def _small() -> Config:
    """ViT-Ti/16 at 160 pixels: a size whose steps a CPU takes in under a second."""
    base = PRESETS["stop-vit-b16"]()
    return replace(
        base,
        preset="small",
        data=replace(base.data, transforms=replace(base.data.transforms, size=(160, 160))),
        model=ModelConfig(
            patch_size=16,
            embed_dim=192,
            num_heads=3,
            predictor_embed_dim=192,
            predictor_depth=4,
        ),
    )


def _vit_h14() -> Config:
    """StoP's ViT-H, whose configuration was released for patches of 16, at I-JEPA's patches of 14."""
    base = PRESETS["stop-vit-h16"]()
    return replace(base, preset="stop-vit-h14", model=replace(base.model, patch_size=14))


MODELS: dict[str, Callable[[], Config]] = {
    "toy": _toy,
    "small": _small,
    "vit-b16": PRESETS["stop-vit-b16"],
    "vit-l16": PRESETS["stop-vit-l16"],
    "vit-h14": _vit_h14,
}


@dataclass(frozen=True)
class Workload:
    """One training problem that every arm solves: same weights, images, masks, noise."""

    model: str
    config: Config
    """Sizes, noise, masks and schedules; the switches of its step are the arms'."""
    images: int
    precision: Precision
    device: torch.device
    pixels: Tensor
    """[B, 3, H, W] fp32 on the device."""
    masks: list[Masks]
    """Of steps 1, 2, ...: exact lengths, int64 in the host's memory (pinned beside a GPU)."""
    weights: dict[str, dict[str, Tensor]]
    """Of "encoder", "predictor", "target_encoder": published keys, fp32 in the host's memory."""
    seed: int
    """Of the noise."""

    def masks_of(self, number: int) -> Masks:
        """Return the masks of optimiser step ``number`` = 1, 2, ...; after the last come the first."""
        return self.masks[(number - 1) % len(self.masks)]

    def noise_of(self, number: int) -> list[Tensor]:
        """Return the noise that stopfast draws in step ``number``, scaled by its standard deviation.

        One tensor [E * B, Ky, D] fp32 on the device for each target block.
        """
        masks, noise = self.masks_of(number), self.config.noise
        drawn = positional_noise(
            torch.tensor([self.seed, number], device=self.device),
            torch.arange(self.images, device=self.device),
            len(masks.target),
            len(masks.context),
            masks.target[0].shape[1],
            self.config.model.embed_dim,
        )
        return list((drawn * noise.noise_var).unbind(0))


def build_workload(
    model: str,
    images: int,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    *,
    steps: int = 500,
    seed: int = 0,
    masks: Path | None = None,
) -> Workload:
    """Return the problem of a size of :data:`MODELS`.

    Args:
        model: which size.
        images: batch of a step.
        precision: of every arm.
        device: where every arm runs.
        steps: how many steps' masks there are, before they repeat.
        seed: of weights, images, masks and noise.
        masks: file that the masks are replayed from, and written to where it is not there; default one
            for each problem under the user's cache folder.

    Raises:
        ValueError: an unknown model, or a file of masks drawn for another problem.
    """
    if model not in MODELS:
        raise ValueError(f"expected a model of {list(MODELS)}, got {model!r}")
    device = torch.device(device)
    config = MODELS[model]()
    config = replace(
        config,
        data=replace(config.data, batch_size=images),
        step=StepConfig(precision=precision),
        run=replace(config.run, seed=seed),
    )
    path = masks or _masks_path(config, steps)
    if not path.exists():
        sampler = build_masks(config)
        save_masks(path, [sampler(images, iteration) for iteration in range(steps)], config)
    replayed = load_masks(path, config)[:steps]
    if device.type == "cuda":
        replayed = [
            Masks([m.pin_memory() for m in pair.context], [m.pin_memory() for m in pair.target])
            for pair in replayed
        ]
    size = (images, 3, *config.data.transforms.size)
    pixels = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return Workload(
        model,
        config,
        images,
        precision,
        device,
        pixels.to(device),
        replayed,
        _weights(config),
        seed,
    )


def _weights(config: Config) -> dict[str, dict[str, Tensor]]:
    """Initial weights; biases and norms are drawn too, since zeros and ones would hide a lost one.

    The target encoder is not the encoder's copy either, as it never is after the first step.
    """
    with seeded(config.run.seed):
        modules = {
            "encoder": build_encoder(config),
            "predictor": build_predictor(config),
            "target_encoder": build_encoder(config),
        }
        with torch.no_grad():
            for module in modules.values():
                for parameter in module.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.02 * torch.randn_like(parameter))
    return {name: dict(module.state_dict()) for name, module in modules.items()}


def _identity(config: Config) -> dict[str, str]:
    """What a file of masks was drawn for, as text."""
    model = config.model
    what = {
        "size": config.data.transforms.size,
        "patch_size": model.patch_size,
        "images": config.data.batch_size,
        "seed": config.run.seed,
        "mask": asdict(config.jepa.mask),
    }
    return {"problem": json.dumps(what, sort_keys=True)}


def _masks_path(config: Config, steps: int) -> Path:
    name = f"{config.preset}-{config.data.batch_size}-{config.run.seed}-{steps}.safetensors"
    return user_cache_path("stopfast") / "benchmarks" / name


def save_masks(path: Path, masks: Sequence[Masks], config: Config) -> None:
    """Write the masks of steps 1, 2, ... and what they were drawn for."""
    # Positions fit 16 bits: a grid has at most 2^13 patches.
    tensors = {
        f"{number:06}.{name}": torch.stack(group).to(torch.int16)
        for number, pair in enumerate(masks, start=1)
        for name, group in (("context", pair.context), ("target", pair.target))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=_identity(config))
    partial.replace(path)


def load_masks(path: Path, config: Config) -> list[Masks]:
    """Read what :func:`save_masks` wrote, as int64.

    Raises:
        ValueError: masks that were drawn for another problem.
    """
    with safe_open(path, framework="pt") as file:
        found, expected = file.metadata() or {}, _identity(config)
        if found != expected:
            raise ValueError(f"{path}: expected masks for {expected}, got some for {found}")

        def group(number: int, name: str) -> list[Tensor]:
            return list(file.get_tensor(f"{number:06}.{name}").to(torch.int64).unbind(0))

        count = len(file.keys()) // 2
        return [
            Masks(group(number, "context"), group(number, "target"))
            for number in range(1, count + 1)
        ]
