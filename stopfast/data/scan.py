"""Images that cannot be decoded, found before they stop a run; what was found good stays known."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stopfast.config import DataConfig
from stopfast.data.images import Images
from stopfast.data.pixels import check_stored

_RULES = 1
"""Counts the changes of ``check_stored``, so that verdicts of older rules are not used."""
_LONG = 2000  # images above which progress is shown
_TASK = 32  # images a thread looks at in one go
_KEEP = 4096  # images found good, at least, that the cache is written for
_KEEP_SHARE = 16  # or one for so many in it, since it is written whole: 17 times its size in all
_NAMED = 10  # broken images that a message names


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a look at all images found."""

    broken: dict[str, str]
    """Why it cannot be decoded, by the image's name."""
    checked: int
    """Images that were looked at now; the others were known."""


def check_images(
    images: Images, *, threads: int, console: Console | None = None, cache: Path | None = None
) -> Verdict:
    """Decode every image, but for those known to be good by name, size and time of writing.

    What is found good is written to ``cache`` every few thousand images and at the end, so that whatever
    ends the look, a signal too, the next one goes on; what is broken is looked at again each time, for it
    may be readable by then.

    Args:
        images: what to look at.
        threads: that decode; decoding releases Python's lock.
        console: where progress is shown, if there is much to look at.
        cache: folder of what is known, one file for each root; default: the user's cache folder.
    """
    folder = cache or Path(platformdirs.user_cache_dir("stopfast")) / "images"
    file = folder / f"{hashlib.sha256(os.fsencode(images.root.resolve())).hexdigest()[:32]}.npy"
    keys = _keys(images)
    known = np.isin(keys, _load(file))
    unknown = np.flatnonzero(~known)
    broken: dict[str, str] = {}
    kept, good = keys[known], list[int]()
    keeps = True  # until the cache cannot be written, which is said once
    try:
        for part, found in _look(images, unknown, threads, console):
            good += [int(i) for i, reason in zip(part, found, strict=True) if not reason]
            broken |= {images.names[i]: r for i, r in zip(part, found, strict=True) if r}
            if keeps and len(good) >= max(_KEEP, len(kept) // _KEEP_SHARE):
                kept, good = np.concatenate([kept, keys[good]]), []
                keeps = _save(file, kept)
    finally:
        if keeps and good:
            _save(file, np.concatenate([kept, keys[good]]))
    return Verdict(broken=broken, checked=len(unknown))


def usable_images(
    images: Images, data: DataConfig, *, console: Console | None = None, cache: Path | None = None
) -> Images:
    """Return the images that can be decoded, which are all of them with ``data.broken="refuse"``.

    Raises:
        ValueError: broken images that may not be left out, or more than ``data.max_broken`` of all.
    """
    broken = check_images(images, threads=data.threads, console=console, cache=cache).broken
    if not broken:
        return images
    count = f"{len(broken):,} of {len(images):,} images in {images.root}"
    listed = "".join(f"\n  {name}: {why}" for name, why in list(broken.items())[:_NAMED])
    more = f"\n  and {len(broken) - _NAMED:,} more" if len(broken) > _NAMED else ""
    if data.broken == "refuse":
        raise ValueError(
            f"expected images that can be decoded, got {count} that cannot:{listed}{more}\n"
            "repair or remove them, or leave them out with --data.broken skip (evaluate: --broken skip)"
        )
    if len(broken) > data.max_broken * len(images) or len(broken) == len(images):
        raise ValueError(
            f"expected at most {data.max_broken:.2%} broken images (--data.max-broken), got {count}:"
            f"{listed}{more}"
        )
    if console is not None:
        text = f"left out, since they cannot be decoded: {count}:{listed}{more}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return images.subset([i for i, name in enumerate(images.names) if name not in broken])


def _look(
    images: Images, unknown: np.ndarray, threads: int, console: Console | None
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield the numbers of images and why each cannot be decoded, empty where it can, in order."""

    def judge(part: np.ndarray) -> list[str]:
        return [_reason(images, int(sample)) for sample in part]

    parts = [unknown[start : start + _TASK] for start in range(0, len(unknown), _TASK)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = console is not None and len(unknown) > _LONG
    with (
        Progress(*columns, console=console, transient=True, disable=not shown) as progress,
        ThreadPoolExecutor(threads, "stopfast-scan") as pool,
    ):
        task = progress.add_task("looking for broken images, once", total=len(unknown))
        try:
            for part, found in zip(parts, pool.map(judge, parts), strict=True):
                yield part, found
                progress.advance(task, len(part))
        finally:  # an interruption does not wait for the rest
            pool.shutdown(cancel_futures=True)


def _reason(images: Images, sample: int) -> str:
    try:
        check_stored(images.read(sample))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return str(error) or "cannot be decoded"
    return ""


def _keys(images: Images) -> np.ndarray:
    """Return uint64 [N], what each image is known by."""
    stamps = zip(images.names, images.sizes.tolist(), images.modified.tolist(), strict=True)
    digests = (
        hashlib.blake2b(
            b"%d\0%d\0%d\0%s" % (_RULES, size, written, os.fsencode(name)), digest_size=8
        )
        for name, size, written in stamps
    )
    return np.frombuffer(b"".join(digest.digest() for digest in digests), dtype=np.uint64)


def _load(file: Path) -> np.ndarray:
    """Return the keys of good images; none from a file that is absent or damaged."""
    try:
        good = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.empty(0, dtype=np.uint64)
    return good if good.dtype == np.uint64 else np.empty(0, dtype=np.uint64)


def _save(file: Path, good: np.ndarray) -> bool:
    """Write the keys, all or nothing; a cache that cannot be written costs time, not the run.

    Returns:
        Whether they were written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=file.parent, suffix=".npy")
        try:
            with os.fdopen(descriptor, "wb") as out:
                np.save(out, good)
            os.replace(unfinished, file)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        warnings.warn(
            f"which images are good is not kept for the next run: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
