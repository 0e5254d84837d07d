"""Which two splits of a folder are evaluated."""

from pathlib import Path

import pytest
from PIL import Image

from stopfast.evaluation.rows import labelled_splits, open_splits


def folders(root: Path, *names: str) -> Path:
    """One image in each; a name that ends in a slash stays empty."""
    for name in names:
        (root / name).mkdir(parents=True)
        if not name.endswith("/"):
            Image.new("RGB", (8, 8)).save(root / name / "1.png")
    return root


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("train/a", "train/b", "test/a", "test/b"), "test"),
        (("train/a", "train/b", "test", "val/a", "val/b"), "val"),  # ImageNet's layout
        (("train/a", "train/b", "test/a", "test/b", "val/a", "val/b"), "val"),
        (("train/a", "train/b", "val", "test/a", "test/b"), "test"),
        (("train/a", "train/b", "val/", "test/a", "test/b"), "test"),
    ],
)
def test_the_first_split_with_the_training_classes(names, chosen, tmp_path):
    found = labelled_splits(folders(tmp_path, *names))
    assert found is not None
    assert [images.root.name for images in found] == ["train", chosen]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a", "b"), "got one set of images"),
        (("train/a", "train/b"), "got one set of images"),
        (("train/a", "val/a"), r"got 1 classes \(a\) in .*train"),
        (("train", "val"), r"got 1 classes \(.\) in .*train"),
        (
            ("train/a", "train/b", "test"),
            r"got 2 classes \(a, b\) in .*, 1 classes \(.\) in .*test",
        ),
        (("train/a", "train/b", "val/a", "val/c"), r"2 classes \(a, c\) in .*val"),
        (("train/a", "train/b", "val/"), "nothing in .*val"),
    ],
)
def test_no_two_such_splits(names, told, tmp_path):
    """Whoever asked for them is told what there is; whoever did not gets none."""
    root = folders(tmp_path, *names)
    assert labelled_splits(root) is None
    with pytest.raises(ValueError, match=told):
        open_splits(root)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="which is not there"):
        labelled_splits(tmp_path / "absent")
