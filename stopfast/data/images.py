"""Which images there are, and which class each belongs to: folders of files, or tars read in place."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stopfast.data.tars import hidden, index_tar, read_at

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})
_SPLITS = frozenset({"train", "test", "val", "valid", "validation"})
_KINDS = "JPEG and PNG files (.jpg, .jpeg, .png)"


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """Images in a fixed order, each with the number of its class; their bytes are read when asked for."""

    root: Path
    """What was opened: a folder or a tar."""
    names: tuple[str, ...]
    """Path below the root, or ``shard.tar/path``; each once."""
    labels: tuple[int, ...]
    """Index into ``classes``."""
    classes: tuple[str, ...]
    """Names of the classes, sorted; ``(".",)`` where there are none."""
    sizes: np.ndarray
    """int64 [N], bytes."""
    modified: np.ndarray
    """int64 [N], when the file (or its shard) was last written, in nanoseconds since 1970."""
    shards: tuple[Path, ...] = ()
    """The tars; none for a folder of files."""
    places: np.ndarray | None = None
    """int64 [N, 2], shard and offset in bytes; None for a folder of files."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> bytes:
        """Return an image's bytes as stored; any number of threads may do so at once.

        Raises:
            OSError: it cannot be read any more.
        """
        if self.places is None:
            return (self.root / self.names[sample]).read_bytes()
        shard, offset = self.places[sample]
        return read_at(self.shards[shard], int(offset), int(self.sizes[sample]))

    def subset(self, keep: Sequence[int] | np.ndarray) -> "Images":
        """Return the images of these numbers, in this order, with all the classes."""
        chosen = np.asarray(keep, dtype=np.int64)
        return Images(
            root=self.root,
            names=tuple(self.names[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            classes=self.classes,
            sizes=self.sizes[chosen],
            modified=self.modified[chosen],
            shards=self.shards,
            places=None if self.places is None else self.places[chosen],
        )

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, over names, sizes, labels and classes, in order.

        It holds wherever the images lie; their bytes are not read.
        """
        digest = hashlib.sha256()
        for name in self.classes:
            digest.update(os.fsencode(name) + b"\0")
        for name, size, label in zip(self.names, self.sizes.tolist(), self.labels, strict=True):
            digest.update(b"%s\0%d\0%d\n" % (os.fsencode(name), size, label))
        return digest.hexdigest()


def open_images(root: Path) -> Images:
    """List the JPEG and PNG images of a folder or of tars; hidden files and ``__MACOSX`` are passed over.

    * A folder whose images all lie in folders of it: those folders are the classes.
    * A folder with images right in it: one class, of all that is in it and below.
    * A folder with ``*.tar`` right in it, or one tar: uncompressed webdataset shards. The label is the text
      of ``<key>.cls``; numbers are sorted as numbers.

    The order is that of the paths, and in tars that of the shards' names and then the tar's own.

    Raises:
        ValueError: nothing there, no image there, images and tars side by side, a tar that cannot be read
            in place, or labels for some images of tars only.
    """
    if root.is_file():
        if root.suffix.lower() != ".tar":
            raise ValueError(f"expected a folder of images or a .tar, got the file {root}")
        return _open_tars(root, (root,))
    if not root.is_dir():
        raise ValueError(f"expected a folder of images or a .tar, got {root}, which is not there")
    shards = tuple(sorted(p for p in root.glob("*.tar") if p.is_file() and not hidden(p.name)))
    files = sorted(_walk(root, ""), key=lambda file: file.name.split("/"))
    if files and shards:
        raise ValueError(
            f"expected images or tars in {root}, got both: {files[0].name} and {shards[0].name}"
        )
    if shards:
        return _open_tars(root, shards)
    if not files:
        raise ValueError(f"expected {_KINDS} or uncompressed tars under {root}, found none")
    flat = any("/" not in file.name for file in files)
    tops = ["." if flat else file.name.partition("/")[0] for file in files]
    classes, labels = _number(tops)
    return Images(
        root=root,
        names=tuple(file.name for file in files),
        labels=labels,
        classes=classes,
        sizes=np.array([file.size for file in files], dtype=np.int64),
        modified=np.array([file.modified for file in files], dtype=np.int64),
    )


def split_folder(root: Path, *names: str) -> Path:
    """Return the first of ``root/<name>`` or ``root/<name>.tar`` that exists, or ``root`` itself.

    Raises:
        ValueError: ``root`` is not there; or the split may be a class (or a shard) like others beside it,
            since ``root`` has but one of train, test, val, valid and validation.
    """
    if not root.exists():
        raise ValueError(f"expected a folder of images or a .tar, got {root}, which is not there")
    for name in names:
        folder, tar = root / name, root / f"{name}.tar"
        if folder.is_dir() or tar.is_file():
            split = folder if folder.is_dir() else tar
            _check_split(split)
            return split
    return root


def _check_split(split: Path) -> None:
    """Refuse what may be a class, or a shard: alone, it would be opened and the others passed over."""
    tar = split.is_file()
    beside = [path for path in sorted(split.parent.iterdir()) if not hidden(path.name)]
    # Two of such names are splits, whatever else there is: no one has classes of both.
    if len({path.name.removesuffix(".tar") for path in beside} & _SPLITS) > 1:
        return
    for path in beside:
        if path == split or path.is_file() != tar:
            continue
        if path.suffix.lower() == ".tar" if tar else _holds_images(path):
            raise ValueError(
                f"expected no images beside {split} but in other splits (test, val), got {path.name}: "
                f"if {split.name} is the split, name {split} itself; if it is "
                f"{'a shard' if tar else 'a class'} like {path.name}, rename it"
            )


def _holds_images(folder: Path) -> bool:
    try:
        return any(True for _ in _walk(folder, ""))
    except OSError:  # lost+found, say, which is for the system's eyes only
        return False


class _File(NamedTuple):
    name: str
    size: int
    modified: int


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[_File]:
    """Yield the image files below a folder, through links too, but never in circles."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if hidden(entry.name):
                continue
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{name}/", (*above, here))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                try:
                    found = entry.stat()
                    yield _File(name, found.st_size, found.st_mtime_ns)
                except OSError:  # a link to nowhere: the scan says that it cannot be read
                    yield _File(name, 0, 0)


def _open_tars(root: Path, shards: tuple[Path, ...]) -> Images:
    names, texts, sizes, modified, places = [], [], [], [], []
    for number, shard in enumerate(shards):
        written = shard.stat().st_mtime_ns
        for image in index_tar(shard, EXTENSIONS):
            names.append(f"{shard.name}/{image.name}")
            texts.append(image.label)
            sizes.append(image.size)
            modified.append(written)
            places.append((number, image.offset))
    if not names:
        raise ValueError(f"expected {_KINDS} in {root}, found none")
    bare = [name for name, text in zip(names, texts, strict=True) if text is None]
    if bare and len(bare) < len(names):
        raise ValueError(
            f"expected a .cls for each image of {root} or for none, got none for {len(bare)} of "
            f"{len(names)}, {bare[0]} first"
        )
    classes, labels = _number(["." if text is None else text for text in texts], _by_number)
    return Images(
        root=root,
        names=tuple(names),
        labels=labels,
        classes=classes,
        sizes=np.array(sizes, dtype=np.int64),
        modified=np.array(modified, dtype=np.int64),
        shards=shards,
        places=np.array(places, dtype=np.int64),
    )


def _number(
    texts: list[str], key: Callable[[str], tuple[int, str]] | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the sorted classes, and the number of each text's."""
    classes = tuple(sorted(set(texts), key=key))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, tuple(numbers[text] for text in texts)


def _by_number(text: str) -> tuple[int, str]:
    return int(text) if text.isascii() and text.isdigit() else -1, text
