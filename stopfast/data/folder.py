"""Folders of JPEG files: which images there are, and which class each belongs to."""

from dataclasses import dataclass
from pathlib import Path

EXTENSIONS = frozenset({".jpg", ".jpeg"})


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Images in a fixed order (sorted by path), each with the number of its class."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


def scan_folder(root: Path) -> ImageFolder:
    """List the JPEG files of ``root/<class>/``, or of ``root`` itself as one class.

    Raises:
        ValueError: ``root`` is missing, is no folder, or holds no JPEG file.
    """
    if not root.is_dir():
        raise ValueError(
            f"expected a folder of class folders of JPEG files, got {root}, which is not a folder"
        )
    classes = sorted(p.name for p in root.iterdir() if p.is_dir()) or ["."]
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(
            f"expected JPEG files ({', '.join(sorted(EXTENSIONS))}) under {root}, found none"
        )
    return ImageFolder(tuple(files), tuple(labels), tuple(classes))


def split_folder(root: Path, *names: str) -> Path:
    """Return the first of ``root/<name>`` that exists, or ``root`` where it has no such split.

    Raises:
        ValueError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"expected a folder of images, got {root}, which is not a folder")
    return next((root / name for name in names if (root / name).is_dir()), root)
