"""Features of images: what probes see of an encoder, and of raw pixels beside it; computed once, cached."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from stopfast.config import DataConfig, Transforms
from stopfast.data.images import Images
from stopfast.data.loader import eval_batches, resolve_loader
from stopfast.encoder import VisionTransformer, image_grid
from stopfast.evaluation.telling import image_bar
from stopfast.pos_embed import Grid

Precision = Literal["fp32", "bf16"]
LAST_BLOCKS = 4
PIXEL_SIDE = 32
_CACHE_FORMAT = 1  # part of every key: raised when the same key would come to mean other numbers


class Seen(NamedTuple):
    """Features of a batch of B images."""

    pooled: Tensor
    """fp32 [B, k * D]: of each of k levels D columns, the last level last."""
    patches: Tensor
    """fp32 [B, N, D] of the last level, in raster order over the grid of patches."""


class Representation(Protocol):
    """What turns images fp32 [B, 3, H, W] into features, on their device."""

    @property
    def levels(self) -> int:
        """How many levels the pooled features have, k."""
        ...

    def grid(self, images: Tensor) -> Grid:
        """Return (rows, columns) of the patches of a batch."""
        ...

    def __call__(self, images: Tensor) -> Seen:
        """Return the features of a batch."""
        ...


@dataclass(frozen=True)
class EncoderFeatures:
    """Features of a frozen encoder.

    A level is the output of one block through the encoder's final norm; pooled, averaged over the
    patches, without a class token.
    """

    encoder: VisionTransformer
    precision: Precision = "fp32"
    """``bf16`` computes the blocks under autocast; averages are fp32."""
    last_blocks: int = LAST_BLOCKS
    """How many blocks the pooled features are of; all where there are fewer."""

    @property
    def levels(self) -> int:
        """One of each of the last blocks."""
        return min(self.last_blocks, len(self.encoder.blocks))

    def grid(self, images: Tensor) -> Grid:
        """Return (rows, columns) of the patches of a batch."""
        return self.encoder.patch_embed.image_grid(images)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Seen:
        """Return the features of a batch."""
        outputs: list[Tensor] = []
        first = int(self.encoder.cls_token is not None)

        def keep(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output[:, first:])

        earlier = list(self.encoder.blocks)[-self.levels : -1]
        hooks = [block.register_forward_hook(keep) for block in earlier]
        try:
            with torch.autocast(
                images.device.type, torch.bfloat16, enabled=self.precision == "bf16"
            ):
                last = self.encoder(images).float()
                tokens = [*(self.encoder.norm(output).float() for output in outputs), last]
        finally:
            for hook in hooks:
                hook.remove()
        return Seen(torch.cat([level.mean(1) for level in tokens], dim=1), last)


@dataclass(frozen=True)
class PixelFeatures:
    """Raw pixels: of an image averaged down to at most 32 a side, of a patch as they are."""

    patch_size: int

    @property
    def levels(self) -> int:
        """One."""
        return 1

    def grid(self, images: Tensor) -> Grid:
        """Return (rows, columns) of the patches of a batch."""
        return image_grid(images.shape[2:], self.patch_size)

    def __call__(self, images: Tensor) -> Seen:
        """Return the pixels of a batch; D is 3 * patch_size squared for a patch."""
        # Large photographs would make more columns than a classifier of images can learn from.
        height, width = (min(PIXEL_SIDE, side) for side in images.shape[2:])
        patches = nn.functional.unfold(images, self.patch_size, stride=self.patch_size).mT
        return Seen(adaptive_avg_pool2d(images, (height, width)).flatten(1), patches)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a split of images."""

    pooled: Tensor
    """fp32 (fp16 where encoders compute in bf16) [n, k * D], see :class:`Seen`."""
    levels: int
    """k."""

    @property
    def last(self) -> Tensor:
        """Return those of the last block, [n, D]: a view."""
        return self.pooled[:, -(self.pooled.shape[1] // self.levels) :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """How images become features."""

    batch_size: int = 256
    threads: int = 2
    """Threads that decode."""
    loader: Literal["auto", "dali", "pil"] = "auto"
    """What decodes; see ``DataConfig.loader``."""
    precision: Precision = "fp32"
    """Of the encoders; features of bf16 are kept in fp16."""
    cache: Path | None = None
    """Folder to keep features in, and to take them from; None for neither."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {self.batch_size}")


def extract(
    sources: Mapping[str, Representation],
    images: Images,
    transforms: Transforms,
    device: torch.device,
    extraction: Extraction,
    identities: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, Features]:
    """Decode a split once and return the features of every source, in the order of the images.

    Args:
        sources: by name; encoders on ``device``.
        images: the split.
        transforms: size, centred crop, mean and deviation of what the encoders see.
        device: of the decoded images and of the encoders.
        extraction: how.
        identities: what each source's features depend on beside the images and the transforms
            (an encoder: the SHA-256 of its checkpoint's manifest, and which encoder of it). Only a
            source with an identity is cached.
        console: where a bar shows how many images are done, if it is a terminal and they are many.

    Raises:
        ValueError: an image that cannot be decoded, or features that are not finite.
        OSError: a cache that cannot be written, before anything is computed.
    """
    found: dict[str, Features] = {}
    files: dict[str, Path] = {}
    extraction = replace(extraction, loader=resolve_loader(extraction.loader))
    if extraction.cache is not None:
        _require_writable(extraction.cache)
        for name, identity in (identities or {}).items():
            key = _key(identity, images, transforms, device, extraction)
            files[name] = extraction.cache / f"{key}.safetensors"
            known = _read(files[name], sources[name].levels)
            if known is not None:
                found[name] = known
    wanted = {name: source for name, source in sources.items() if name not in found}
    if wanted:
        batches = eval_batches(
            images,
            transforms,
            batch_size=extraction.batch_size,
            device=device,
            data=DataConfig(threads=extraction.threads, loader=extraction.loader),
        )
        with closing(batches), image_bar(console, images) as count:
            rows = (count(batch.images) for batch in batches)
            collected = collect(wanted, rows, len(images), extraction.precision)
        for name, features in collected.items():
            found[name] = features
            if name in files:
                _write(features, files[name])
    return {name: found[name] for name in sources}


def _key(
    identity: str,
    images: Images,
    transforms: Transforms,
    device: torch.device,
    extraction: Extraction,
) -> str:
    parts = {
        "format": _CACHE_FORMAT,
        "identity": identity,
        "images": images.fingerprint(),
        "transforms": asdict(transforms),
        "precision": extraction.precision,
        "decoder": [extraction.loader, device.type],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def collect(
    sources: Mapping[str, Representation],
    batches: Iterable[Tensor],
    count: int,
    precision: Precision = "fp32",
) -> dict[str, Features]:
    """Return each source's features of ``count`` images, which come as batches fp32 [B, 3, H, W].

    Raises:
        ValueError: another number of images, or features that are not finite.
    """
    tables: dict[str, Tensor] = {}
    done = 0
    for images in batches:
        for name, source in sources.items():
            rows = source(images).pooled
            if not bool(rows.isfinite().all()):
                raise ValueError(f"expected finite features, got others from {name}")
            if name not in tables:
                # Filled in place: a list of parts would need the memory twice when it is joined.
                kind = torch.float16 if precision == "bf16" else torch.float32
                tables[name] = torch.empty(count, rows.shape[1], dtype=kind)
            tables[name][done : done + len(rows)] = rows
        done += len(images)
    if done != count:
        raise ValueError(f"expected {count} images, got {done}")
    return {
        name: Features(pooled=tables[name], levels=source.levels)
        for name, source in sources.items()
    }


def _require_writable(folder: Path) -> None:
    """Make sure of it now, and not after hours."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _write(features: Features, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"pooled": features.pooled}, unfinished, {"levels": str(features.levels)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path, levels: int) -> Features | None:
    """Return the last levels of what is kept there; None where nothing is, or fewer levels."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        kept = int(file.metadata()["levels"])
        if kept < levels:
            return None
        pooled = file.get_slice("pooled")
        width = pooled.get_shape()[1]
        return Features(pooled=pooled[:, width - width // kept * levels :], levels=levels)
