"""From settings to the networks that they describe."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stopfast.config import Config, DegradeConfig, DropPosConfig
from stopfast.decoder import PositionDecoder
from stopfast.encoder import VisionTransformer, image_grid
from stopfast.kernels.ops import Ops, resolve_ops
from stopfast.models import published_norm
from stopfast.pos_embed import Grid
from stopfast.predictor import Predictor


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


def model_grid(config: Config) -> Grid:
    """Return rows and columns of patches.

    Raises:
        ValueError: images that are not whole patches.
    """
    return image_grid(config.data.transforms.size, config.model.patch_size)


def build_encoder(config: Config) -> VisionTransformer:
    """Return the encoder of these settings, initialised from torch's generator."""
    model = config.model
    return VisionTransformer(
        img_size=list(config.data.transforms.size),
        patch_size=model.patch_size,
        in_chans=_channels(config),
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        qkv_bias=True if model.qkv_bias == "qkv" else "qv",
        norm_layer=published_norm,
        class_token=model.class_token,
        positions=model.positions,
        init=model.init,
        init_rescale=model.init_rescale,
        checkpointing=config.step.checkpointing,
        skip_unused=config.step.skip_unused,
        ops=step_ops(config),
    )


def build_predictor(config: Config, out_dim: int | None = None) -> Predictor:
    """Return the predictor of these settings, initialised from torch's generator.

    Args:
        config: the settings.
        out_dim: width of its predictions, the encoder's by default.
    """
    model = config.model
    grid = model_grid(config)
    return Predictor(
        num_patches=grid[0] * grid[1],
        embed_dim=model.embed_dim,
        predictor_embed_dim=model.predictor_embed_dim,
        depth=model.predictor_depth,
        num_heads=model.predictor_num_heads or model.num_heads,
        mlp_ratio=model.predictor_mlp_ratio,
        qkv_bias=True if model.qkv_bias == "qkv" else "qv",
        norm_layer=published_norm,
        grid_size=grid,
        out_dim=out_dim,
        class_token=model.class_token,
        positions=model.positions,
        embed_bias=model.predictor_embed_bias,
        init=model.init,
        init_rescale=model.init_rescale,
        checkpointing=config.step.checkpointing,
        skip_unused=config.step.skip_unused,
        ops=step_ops(config),
        **dataclasses.asdict(config.noise),
    )


def build_pixel_decoder(config: Config) -> Predictor:
    """Return the decoder of MAE and Beyond Masking: a predictor of the pixels of patches."""
    return build_predictor(config, out_dim=3 * config.model.patch_size**2)


def build_position_decoder(config: Config) -> PositionDecoder:
    """Return the decoder of DropPos, initialised from torch's generator.

    Raises:
        ValueError: settings of another objective.
    """
    model = config.model
    if not isinstance(config.objective, DropPosConfig):
        raise ValueError(f"expected DropPos, got the objective {config.objective.name!r}")
    rows, columns = model_grid(config)
    return PositionDecoder(
        num_patches=rows * columns,
        embed_dim=model.embed_dim,
        decoder_embed_dim=model.predictor_embed_dim,
        depth=model.predictor_depth,
        num_heads=model.predictor_num_heads or model.num_heads,
        mlp_ratio=model.predictor_mlp_ratio,
        qkv_bias=True if model.qkv_bias == "qkv" else "qv",
        norm_layer=published_norm,
        class_token=model.class_token,
        learned_token=config.objective.position_token == "param",
        init=model.init,
        init_rescale=model.init_rescale,
        checkpointing=config.step.checkpointing,
        ops=step_ops(config),
    )


def _channels(config: Config) -> int:
    """Channels of what the encoder sees."""
    if isinstance(config.objective, DropPosConfig):
        return 3
    degrade: DegradeConfig = config.objective.degrade
    return degrade.gray_channels if degrade.kind == "decolorized" else 3
