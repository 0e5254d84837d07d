"""The demo's data: scikit-learn's handwritten digits, written out once as folders of JPEG files."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

_TEST_SHARE = 0.3
_SIDE = 32


def digits_folder(root: Path) -> Path:
    """Return ``root`` with ``train/`` and ``test/`` class folders of the 1,797 digits, making it once.

    Of every class the last 30 % of the images, in the data set's order, are the test split.
    """
    if root.is_dir():
        return root
    data: Any = load_digits()
    root.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there whole: an interruption leaves no half a data set.
    place = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    unfinished = place / root.name  # inside, since the place itself is for its owner's eyes only
    try:
        for digit in range(10):
            numbers = np.flatnonzero(data.target == digit)
            train = round(len(numbers) * (1 - _TEST_SHARE))
            for split, chosen in (("train", numbers[:train]), ("test", numbers[train:])):
                folder = unfinished / split / str(digit)
                folder.mkdir(parents=True)
                for number in chosen:
                    pixels = (data.images[number] * (255 / 16)).astype(np.uint8)
                    image = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
                    image.save(folder / f"{number:04d}.jpg", quality=95)
        os.replace(unfinished, root)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return root
