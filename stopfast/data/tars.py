"""Webdataset shards: what lies where in an uncompressed tar, so that it is read in place."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_LABEL = "cls"
_LONGEST_LABEL = 256  # bytes


class TarImage(NamedTuple):
    """An image inside a tar."""

    name: str
    """Its path in the tar."""
    offset: int
    """Where its bytes begin, in bytes from the tar's begin."""
    size: int
    """Bytes."""
    label: str | None
    """What ``<key>.cls`` says, without white space around it; None without such a file."""


def hidden(name: str) -> bool:
    """Whether a part of a path is hidden, or the folder of macOS's shadow files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def index_tar(path: Path, extensions: frozenset[str]) -> list[TarImage]:
    """List the images of an uncompressed tar, in its order.

    Names of other extensions, hidden ones, links and devices are passed over; nothing is unpacked. As in
    webdataset, the key of ``a/b.c.jpg`` is ``a/b``: its label is that of ``a/b.cls``.

    Args:
        path: the tar.
        extensions: of images, in lower case and with the dot.

    Raises:
        ValueError: no tar, a compressed one, one that ends early or goes on after its end, a sparse member,
            the same name twice, or a label that is no short text.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                is_image = PurePosixPath(name).suffix.lower() in extensions
                key, kind = _key(name)
                if hidden(name) or not member.isreg() or not (is_image or kind == _LABEL):
                    continue
                if member.issparse():
                    raise ValueError(f"expected plain files in {path}, got {name}, which is sparse")
                if is_image:
                    if name in images:
                        raise ValueError(f"expected each name once in {path}, got {name} twice")
                    images[name] = (member.offset_data, member.size)
                else:
                    labels[key] = _label(file, member, path)
            _check_end(file, archive.offset, path)
    except tarfile.TarError as error:
        raise ValueError(
            f"expected a whole, uncompressed tar, got {path}: {error}; a compressed one must be "
            "unpacked first, since images are read from their places in it"
        ) from None
    return [
        TarImage(name, offset, size, labels.get(_key(name)[0]))
        for name, (offset, size) in images.items()
    ]


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Return ``size`` bytes of a file; any number of threads may do so at once.

    Raises:
        OSError: the file cannot be read, or has become shorter.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) < size:
        raise OSError(f"expected {size} bytes at {offset} of {path}, got {len(data)}")
    return data


def _key(name: str) -> tuple[str, str]:
    """Split a path at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


def _label(file: BinaryIO, member: tarfile.TarInfo, path: Path) -> str:
    """Read a label without moving where the archive is read next."""
    if member.size > _LONGEST_LABEL:
        raise ValueError(
            f"expected labels of at most {_LONGEST_LABEL} bytes in {path}, got {member.name} "
            f"of {member.size}"
        )
    data = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        label = data.decode().strip()
    except UnicodeDecodeError:
        label = ""
    if not label:
        raise ValueError(f"expected a label as text in {path}, got {member.name}: {data[:20]!r}")
    return label


def _check_end(file: BinaryIO, end: int, path: Path) -> None:
    """Check that zeros follow: tarfile takes a damaged or missing header for the end of the archive."""
    file.seek(end)
    seen = 0
    for data in _chunks(file):
        if data.count(0) != len(data):
            raise ValueError(
                f"expected the end of {path} at byte {end}, got more data; it is damaged, or several "
                "tars one behind the other"
            )
        seen += len(data)
    if seen < _BLOCK:
        raise ValueError(f"expected zeros at the end of {path}, got none; it was cut off")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(1 << 20):
        yield data
