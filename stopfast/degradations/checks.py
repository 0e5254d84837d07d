"""What degradations refuse."""

from torch import Tensor


def check_size(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the grid of patches of images of a size.

    Raises:
        ValueError: a height or width that is no positive multiple of the patch size.
    """
    if min(size) < 1 or size[0] % patch_size or size[1] % patch_size:
        raise ValueError(f"expected a size in multiples of {patch_size} pixels, got {size}")
    return size[0] // patch_size, size[1] // patch_size


def check_images(images: Tensor, source: tuple[int, int]) -> None:
    """Refuse images of another shape than [B, 3, *source].

    Raises:
        ValueError: the shape differs.
    """
    if images.ndim != 4 or images.shape[1:] != (3, *source):
        raise ValueError(
            f"expected images [B, 3, {source[0]}, {source[1]}], got {tuple(images.shape)}"
        )
