"""From settings to the objects they describe."""

import dataclasses
from dataclasses import replace
from typing import Any, Literal

import torch

from stopfast.block import Block
from stopfast.config import Config, DropPosConfig, JepaConfig, ReconstructionConfig, Transforms
from stopfast.degradations import Degradation, degradation
from stopfast.kernels.ops import PatchTarget
from stopfast.masking import MultiBlockMasks
from stopfast.networks import (
    build_encoder,
    build_pixel_decoder,
    build_position_decoder,
    build_predictor,
    model_grid,
    seeded,
    step_ops,
)
from stopfast.objectives import Objective
from stopfast.objectives.droppos import DropPos
from stopfast.objectives.jepa import Jepa
from stopfast.objectives.reconstruction import Reconstruction
from stopfast.optim import UpdateRule
from stopfast.schedules import Cosine, LinearMomentum
from stopfast.step import TrainStep

TargetNorm = Literal["none", "patch", "channel"]


def choose_device(name: str) -> torch.device:
    """Return the device that a setting names; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for device='cuda', found none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


_BUCKET = 8
"""Lengths in multiples of this: 8 shapes on a grid of 14 x 14, for 6 % more tokens."""


def fastest(config: Config, device: torch.device) -> Config:
    """Return settings with every switch on that makes a step faster on a device at equal numbers.

    On a GPU: the update in one kernel; compiled blocks, which fuse what lies between the products; masks
    drawn ahead; steps as CUDA graphs (unless in fp16, whose loss scaler no graph holds); in bf16 compute
    copies of the weights; and for I-JEPA and StoP, whose lengths change and which have a teacher, buckets
    of lengths, our attention, which takes padded ones, and the target encoder on a stream of its own. On
    the CPU nothing is launch-bound, and what leaves out unused work is all that helps.
    """
    step = replace(config.step, fast=True, skip_unused=True, ahead=True)
    if device.type != "cuda":
        return replace(config, step=step)
    step = replace(
        step,
        ops="auto",
        compile=True,
        copies=step.precision == "bf16",
        graphs=step.precision != "fp16",
    )
    if isinstance(config.objective, JepaConfig):
        step = replace(step, attention="triton", bucket=_BUCKET, target_stream=True)
    return replace(config, step=step, optim=replace(config.optim, optimizer="adamw_ema"))


def build_masks(config: Config) -> MultiBlockMasks:
    """Return the mask sampler of these settings."""
    return MultiBlockMasks(
        grid=model_grid(config),
        seed=config.run.seed,
        ops=step_ops(config),
        **dataclasses.asdict(config.jepa.mask),
    )


def check_settings(config: Config, device: torch.device) -> None:
    """Refuse settings that no images could make work, without their memory or their initialisation.

    Raises:
        ValueError: sizes that do not fit, masks that cannot be drawn, or operations that are not there.
    """
    if config.step.ops == "fused":
        row = torch.zeros(1, 8, device=device)
        try:
            step_ops(config).layer_norm(row, row[0], row[0], 1e-5, None)
        except ValueError as error:
            raise ValueError(f"--step.ops fused cannot run on {device}: {error}") from None
    for name in ("graphs", "target_stream"):
        if getattr(config.step, name) and device.type != "cuda":
            flag = name.replace("_", "-")
            raise ValueError(f"expected a CUDA device for --step.{flag}, got {device}")
    for name in ("graphs", "copies"):
        if getattr(config.step, name) and config.optim.optimizer != "adamw_ema":
            raise ValueError(
                f"expected --optim.optimizer adamw_ema with --step.{name}, got {config.optim.optimizer}"
            )
    with torch.device("meta"):
        build_objective(config, steps_per_epoch=1000)


def build_objective(config: Config, steps_per_epoch: int) -> Objective[Any]:
    """Return the objective of these settings, its weights drawn from the run's seed.

    Raises:
        ValueError: settings that do not fit each other.
    """
    if isinstance(config.objective, JepaConfig):
        return build_jepa(config, steps_per_epoch)
    if isinstance(config.objective, DropPosConfig):
        return build_droppos(config, steps_per_epoch)
    return build_reconstruction(config, steps_per_epoch)


def build_update(config: Config, steps_per_epoch: int) -> UpdateRule:
    """Return the schedules and constants of the optimiser of these settings."""
    optim = config.optim
    total = int(optim.ipe_scale * optim.epochs * steps_per_epoch)

    def threshold(epochs: float) -> int | None:
        return None if epochs < 0 else int(epochs * steps_per_epoch)

    counted_before = 0 if optim.schedule == "ijepa" else 1
    return UpdateRule(
        lr=Cosine(
            start=optim.start_lr,
            reference=optim.lr,
            final=optim.final_lr,
            warmup_steps=int(optim.warmup * steps_per_epoch),
            total_steps=total,
            fix_step=threshold(optim.fix_lr_thres),
            fix_strategy=optim.fix_lr_strategy,
            counted_before=counted_before,
            warmup_arrives=optim.schedule == "beit",
        ),
        weight_decay=Cosine(
            reference=optim.weight_decay,
            final=optim.final_weight_decay,
            total_steps=total,
            fix_step=threshold(optim.fix_wd_thres),
            fix_strategy=optim.fix_wd_strategy,
            counted_before=counted_before,
        ),
        momentum=LinearMomentum(start=optim.ema[0], end=optim.ema[1], total_steps=total)
        if isinstance(config.objective, JepaConfig)
        else None,
        betas=optim.betas,
        clip=optim.clip,
        clip_norm=optim.clip_norm,
        decay_tokens=optim.decay_tokens,
    )


def build_degradation(config: Config, target_norm: TargetNorm = "none") -> Degradation:
    """Return the degradation of these settings; its targets are normalised as named.

    Raises:
        ValueError: sizes that do not fit, or an objective that degrades nothing.
    """
    if isinstance(config.objective, DropPosConfig):
        raise ValueError("expected an objective with a degradation, got 'droppos'")
    transforms = config.data.transforms
    return degradation(
        config.objective.degrade,
        transforms.size,
        patch_target(config.model.patch_size, target_norm, transforms.std),
        config.run.seed,
    )


def patch_target(patch_size: int, norm: TargetNorm, std: tuple[float, ...] = (1.0,)) -> PatchTarget:
    """Return how pixels are normalised before they are predicted.

    MAE adds 1e-6 to the variance of all numbers of a patch. Beyond Masking adds 1e-6 to each channel's
    deviation, of pixels in 0..1: what the images were divided by comes back in here.
    """
    eps = {"none": (), "patch": (1e-6,), "channel": tuple(1e-6 / each for each in std)}
    return PatchTarget(patch_size, norm, eps[norm])


def build_jepa(config: Config, steps_per_epoch: int) -> Jepa:
    """As :func:`build_objective`, of settings of I-JEPA or StoP."""
    settings = config.jepa
    degraded = None if settings.degrade.kind == "none" else build_degradation(config)
    with seeded(config.run.seed):
        encoder = build_encoder(config)
        predictor = build_predictor(config)
    return Jepa(
        encoder,
        predictor,
        build_masks(config),
        transforms=_transforms(config, degraded),
        update=build_update(config, steps_per_epoch),
        degradation=degraded,
        target_blocks=settings.target_blocks,
        seed=config.run.seed,
        clip_encoder_only=config.optim.clip_encoder_only,
        skip_unused=config.step.skip_unused,
        bucket=config.step.bucket,
        target_stream=config.step.target_stream,
        ops=step_ops(config),
    )


def build_droppos(config: Config, steps_per_epoch: int) -> DropPos:
    """As :func:`build_objective`, of settings of DropPos."""
    settings = config.objective
    if not isinstance(settings, DropPosConfig):
        raise ValueError(f"expected DropPos, got the objective {settings.name!r}")
    with seeded(config.run.seed):
        encoder = build_encoder(config)
        decoder = build_position_decoder(config)
        pixel_decoder = build_pixel_decoder(config) if settings.multi_task else None
    return DropPos(
        encoder,
        decoder,
        pixel_decoder,
        settings=settings,
        noise=config.noise,
        transforms=config.data.transforms,
        update=build_update(config, steps_per_epoch),
        epochs=config.optim.epochs,
        steps_per_epoch=steps_per_epoch,
        seed=config.run.seed,
        ops=step_ops(config),
    )


def build_reconstruction(config: Config, steps_per_epoch: int) -> Reconstruction:
    """As :func:`build_objective`, of settings of MAE or Beyond Masking."""
    settings = config.objective
    if not isinstance(settings, ReconstructionConfig):
        raise ValueError(f"expected MAE or Beyond Masking, got the objective {settings.name!r}")
    degraded = build_degradation(config, settings.target_norm)
    with seeded(config.run.seed):
        encoder = build_encoder(config)
        decoder = build_pixel_decoder(config)
    return Reconstruction(
        encoder,
        decoder,
        degraded,
        mask_ratio=settings.mask_ratio,
        transforms=_transforms(config, degraded),
        update=build_update(config, steps_per_epoch),
        seed=config.run.seed,
        ops=step_ops(config),
    )


def _transforms(config: Config, degraded: Degradation | None) -> Transforms:
    """How photographs become the images that the objective takes, of which the encoder may see a part."""
    transforms = config.data.transforms
    return transforms if degraded is None else replace(transforms, size=degraded.source)


def build_step(config: Config, objective: Objective[Any], device: torch.device) -> TrainStep:
    """Return the optimiser step of these settings for an objective, which moves to ``device``."""
    if config.step.compile:
        for module in objective.modules().values():
            for block in module.modules():
                if isinstance(block, Block):
                    block.compile_parts()
    return TrainStep(
        objective,
        config.step,
        device=device,
        optimizer=config.optim.optimizer,
        ops=step_ops(config),
    )
