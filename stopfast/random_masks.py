"""Random masks of patches, the same number in every image (MAE, DropPos, Beyond Masking)."""

from torch import Tensor

from stopfast.kernels.ops import uniform


def visible_count(patches: int, mask_ratio: float) -> int:
    """Return how many of the patches are left, as all published programs round it.

    Raises:
        ValueError: none are left.
    """
    count = int(patches * (1 - mask_ratio))
    if count < 1:
        raise ValueError(
            f"expected a mask_ratio of at most {1 - 1 / patches:.6g}, which leaves one of "
            f"{patches} patches, got {mask_ratio}"
        )
    return count


def random_order(seed: Tensor, sample_ids: Tensor, count: int, stream: int) -> Tensor:
    """Return a random order of ``count`` things for each image, int64 [B, count]; the first are kept.

    Args:
        seed: int64 [2], the run's seed and the step, on the device of the result.
        sample_ids: int64 [B], places in the step's global batch.
        count: how many things.
        stream: which independent set of draws.
    """
    return ranked(uniform(seed, sample_ids, count, stream))


def ranked(uniforms: Tensor) -> Tensor:
    """Return the order of numbers [B, count] from the smallest up, int64, as published."""
    return uniforms.argsort(dim=1, stable=True)
