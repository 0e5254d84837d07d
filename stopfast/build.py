"""From settings to the objects they describe."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from stopfast.block import Block
from stopfast.config import Config
from stopfast.encoder import VisionTransformer, image_grid
from stopfast.kernels.ops import Ops, resolve_ops
from stopfast.masking import MultiBlockMasks
from stopfast.models import published_norm
from stopfast.objectives.jepa import Jepa
from stopfast.predictor import Predictor
from stopfast.schedules import Cosine, LinearMomentum
from stopfast.step import TrainStep


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

    On a GPU: our attention, which takes padded lengths; the update in one kernel; compiled blocks, which
    fuse what lies between the products; buckets of lengths; masks drawn ahead; the target encoder on a
    stream of its own; steps as CUDA graphs (unless in fp16, whose loss scaler no graph holds); and in
    bf16 compute copies of the weights. On the CPU nothing is launch-bound, and what leaves out
    unused work is all that helps.
    """
    step = replace(config.step, fast=True, skip_unused=True, ahead=True)
    if device.type != "cuda":
        return replace(config, step=step)
    step = replace(
        step,
        ops="auto",
        attention="triton",
        compile=True,
        bucket=_BUCKET,
        copies=step.precision == "bf16",
        target_stream=True,
        graphs=step.precision != "fp16",
    )
    return replace(config, step=step, optim=replace(config.optim, optimizer="adamw_ema"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed inside, and leave torch's generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def step_ops(config: Config) -> Ops:
    """Return the operations of these settings.

    Raises:
        ValueError: an attention backend that is not there.
    """
    return resolve_ops(config.step.ops, config.step.attention)


def build_encoder(config: Config) -> VisionTransformer:
    """Return the encoder of these settings, initialised from torch's generator."""
    model = config.model
    return VisionTransformer(
        img_size=list(config.data.transforms.size),
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        norm_layer=published_norm,
        init_rescale=model.init_rescale,
        checkpointing=config.step.checkpointing,
        skip_unused=config.step.skip_unused,
        ops=step_ops(config),
    )


def build_predictor(config: Config) -> Predictor:
    """Return the predictor of these settings, initialised from torch's generator."""
    model = config.model
    grid = image_grid(config.data.transforms.size, model.patch_size)
    return Predictor(
        num_patches=grid[0] * grid[1],
        embed_dim=model.embed_dim,
        predictor_embed_dim=model.predictor_embed_dim,
        depth=model.predictor_depth,
        num_heads=model.num_heads,
        mlp_ratio=model.predictor_mlp_ratio,
        norm_layer=published_norm,
        grid_size=grid,
        init_rescale=model.init_rescale,
        checkpointing=config.step.checkpointing,
        skip_unused=config.step.skip_unused,
        ops=step_ops(config),
        **dataclasses.asdict(config.noise),
    )


def build_masks(config: Config) -> MultiBlockMasks:
    """Return the mask sampler of these settings."""
    return MultiBlockMasks(
        grid=image_grid(config.data.transforms.size, config.model.patch_size),
        seed=config.run.seed,
        ops=step_ops(config),
        **dataclasses.asdict(config.mask),
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
    build_masks(config)
    with torch.device("meta"):
        build_encoder(config)
        build_predictor(config)


def build_objective(config: Config, steps_per_epoch: int) -> Jepa:
    """Return the objective of these settings, its weights drawn from the run's seed."""
    model, optim = config.model, config.optim
    with seeded(config.run.seed):
        encoder = build_encoder(config)
        predictor = build_predictor(config)
    masks = build_masks(config)
    total = int(optim.ipe_scale * optim.epochs * steps_per_epoch)

    def threshold(epochs: float) -> int | None:
        return None if epochs < 0 else int(epochs * steps_per_epoch)

    return Jepa(
        encoder,
        predictor,
        masks,
        transforms=config.data.transforms,
        lr=Cosine(
            start=optim.start_lr,
            reference=optim.lr,
            final=optim.final_lr,
            warmup_steps=int(optim.warmup * steps_per_epoch),
            total_steps=total,
            fix_step=threshold(optim.fix_lr_thres),
            fix_strategy=optim.fix_lr_strategy,
        ),
        weight_decay=Cosine(
            reference=optim.weight_decay,
            final=optim.final_weight_decay,
            total_steps=total,
            fix_step=threshold(optim.fix_wd_thres),
            fix_strategy=optim.fix_wd_strategy,
        ),
        momentum=LinearMomentum(start=optim.ema[0], end=optim.ema[1], total_steps=total),
        target_blocks=model.target_blocks,
        seed=config.run.seed,
        clip=optim.clip,
        clip_norm=optim.clip_norm,
        clip_encoder_only=optim.clip_encoder_only,
        skip_unused=config.step.skip_unused,
        bucket=config.step.bucket,
        target_stream=config.step.target_stream,
        ops=step_ops(config),
    )


def build_step(config: Config, objective: Jepa, device: torch.device) -> TrainStep:
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
