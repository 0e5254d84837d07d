"""What an evaluation compares: raw pixels, untrained encoders, trained encoders; and on which images."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from stopfast.checkpoint import MANIFEST
from stopfast.config import Transforms
from stopfast.data.images import Images, open_images, split_folder
from stopfast.encoder import VisionTransformer
from stopfast.evaluation.features import (
    LAST_BLOCKS,
    EncoderFeatures,
    PixelFeatures,
    Precision,
    Representation,
)
from stopfast.trained import TrainedRun, Which

_PIXELS, _UNTRAINED = "raw pixels", "untrained"
_ASKED = ("val", "test")
"""In this order: the ``test/`` of ImageNet's layout has no labels."""


class Rows(NamedTuple):
    """The representations."""

    sources: dict[str, Representation]
    identities: dict[str, str]
    """What the features of each depend on, for the cache."""
    pairs: list[tuple[str, str]]
    """Which are compared."""


class _Found(NamedTuple):
    splits: tuple[Images, Images] | None
    instead: str
    """What there is where there are no two such splits."""


def name_checkpoints(checkpoints: Sequence[Path] | Mapping[str, Path]) -> dict[str, Path]:
    """Return names for the table: the run's folder, or the whole path where two have one name.

    Raises:
        ValueError: no checkpoint, one twice, or a name that another row has.
    """
    if isinstance(checkpoints, Mapping):
        named = dict(checkpoints)
    else:
        paths = [path.resolve() for path in checkpoints]
        names = [(p.parent if (p / MANIFEST).is_file() else p).name for p in paths]
        if len(set(names)) < len(names):
            names = [str(path) for path in checkpoints]
        named = dict(zip(names, checkpoints, strict=True))
        if len(named) < len(checkpoints):
            raise ValueError(f"expected each checkpoint once, got {names}")
    taken = {_PIXELS, *(n for n in named if n == _UNTRAINED or n.endswith(f", {_UNTRAINED}"))}
    if not named or taken & named.keys():
        raise ValueError(
            f"expected checkpoints by names other than {_PIXELS!r} and {_UNTRAINED!r}, "
            f"got {list(named)}"
        )
    return named


def labelled_splits(root: Path) -> tuple[Images, Images] | None:
    """Return the training images, and those of the first of ``val`` and ``test`` that has their classes.

    Each a folder below ``root`` or a tar, as :func:`stopfast.data.images.split_folder` finds them.

    Returns:
        None where there are no two such splits with at least two classes.

    Raises:
        ValueError: ``root`` is not there, or its training images cannot be listed.
    """
    return _find_splits(root).splits


def open_splits(root: Path) -> tuple[Images, Images]:
    """Return :func:`labelled_splits`.

    Raises:
        ValueError: as there, or there are none.
    """
    splits, instead = _find_splits(root)
    if splits is None:
        raise ValueError(
            f"expected {root} with train/ of at least two classes, and val/ or test/ of the same "
            f"classes, got {instead}"
        )
    return splits


def common_transforms(runs: Mapping[str, TrainedRun]) -> Transforms:
    """Return what is common to all: size, centred crop and normalisation of evaluation images.

    Raises:
        ValueError: it is not.
    """
    seen = {
        name: (t.size, t.center, t.mean, t.std)
        for name, t in ((name, run.config.data.transforms) for name, run in runs.items())
    }
    if len(set(seen.values())) > 1:
        raise ValueError(
            f"expected checkpoints of one size, center, mean and std of images, got {seen}"
        )
    size, center, mean, std = next(iter(seen.values()))
    return Transforms(size=size, center=center, mean=mean, std=std)


def build_rows(
    runs: Mapping[str, TrainedRun],
    which: Which,
    device: torch.device,
    *,
    precision: Precision = "fp32",
    last_blocks: int = LAST_BLOCKS,
    pixels: bool = True,
) -> Rows:
    """Return raw pixels, the untrained encoders (each once: runs may share one), the trained encoders.

    Args:
        runs: by name.
        which: of a run's two encoders.
        device: where the encoders are moved.
        precision: that they compute in.
        last_blocks: how many blocks their pooled features are of.
        pixels: whether raw pixels are a row, in patches as large as those of the first run.
    """
    rows = Rows({}, {}, [])
    if pixels:
        first = next(iter(runs.values()))
        rows.sources[_PIXELS] = PixelFeatures(first.config.model.patch_size)
        rows.identities[_PIXELS] = _PIXELS
    manifests = {
        name: hashlib.sha256((run.checkpoint / MANIFEST).read_bytes()).hexdigest()
        for name, run in runs.items()
    }
    beginnings: dict[str, VisionTransformer] = {}
    beginning: dict[str, str] = {}
    for name, run in runs.items():
        fresh = run.untrained()
        same = (known for known, other in beginnings.items() if _equal(fresh, other))
        beginning[name] = next(same, name)
        beginnings.setdefault(beginning[name], fresh)
    for name, encoder in beginnings.items():
        label = _UNTRAINED if len(beginnings) == 1 else f"{name}, {_UNTRAINED}"
        rows.sources[label] = EncoderFeatures(encoder.to(device), precision, last_blocks)
        rows.identities[label] = f"{manifests[name]}, {_UNTRAINED}"
        rows.pairs.extend((run, label) for run in runs if beginning[run] == name)
    for name, run in runs.items():
        rows.sources[name] = EncoderFeatures(run.chosen(which).to(device), precision, last_blocks)
        rows.identities[name] = f"{manifests[name]}, {which}"
    others = list(runs)
    rows.pairs.extend((name, others[0]) for name in others[1:])
    return rows


def _equal(one: VisionTransformer, other: VisionTransformer) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return (
        mine.keys() == theirs.keys()
        and one.num_heads == other.num_heads
        and all(torch.equal(value, theirs[key]) for key, value in mine.items())
    )


def _find_splits(root: Path) -> _Found:
    folder = split_folder(root, "train")
    others = [other for name in _ASKED if (other := split_folder(root, name)) != root]
    if folder == root or not others:
        return _Found(None, "one set of images")
    train = open_images(folder)
    if len(train.classes) < 2:
        return _Found(None, f"{_told(train)} in {folder}")
    instead = [f"{_told(train)} in {folder}"]
    for other in others:
        try:
            images = open_images(other)
        except ValueError as error:  # an empty one, say: the next may do
            instead.append(f"nothing in {other} ({error})")
            continue
        if images.classes == train.classes:
            return _Found((train, images), "")
        instead.append(f"{_told(images)} in {other}")
    return _Found(None, ", ".join(instead))


def _told(images: Images) -> str:
    """How many classes there are, and which come first."""
    shown = ", ".join(images.classes[:3]) + (", ..." if len(images.classes) > 3 else "")
    return f"{len(images.classes):,} classes ({shown})"
