"""Images: which, in what order, and how they are cut and decoded."""

import numpy as np
import pytest
import torch
from PIL import Image

from stopfast.config import Transforms
from stopfast.data.digits import digits_folder
from stopfast.data.draws import center_boxes, epoch_order, random_boxes
from stopfast.data.folder import scan_folder, split_folder
from stopfast.data.loader import TrainPlan, eval_batches, train_batches
from stopfast.env import dali_problem

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="NVIDIA DALI is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve images of several sizes in three classes, one of them with an EXIF orientation.

    Smooth but for stripes of a few pixels, which a resize without antialiasing turns into others.
    """
    root = tmp_path_factory.mktemp("photographs")
    for number in range(12):
        height, width = 40 + 3 * number, 64 - 2 * number
        row, column = np.mgrid[0:height, 0:width] / 64
        waves = [np.sin(3 * row + number), np.cos(4 * column), np.sin(2 * (row + column))]
        stripes = 40 * np.sin(64 * (row + 2 * column) * 0.9)
        pixels = np.stack([127 + 80 * wave + stripes for wave in waves], axis=-1).astype(np.uint8)
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        exif = Image.Exif()
        if number == 4:
            exif[0x0112] = 6
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", quality=95, exif=exif)
    return root


def test_folder(photographs, tmp_path):
    folder = scan_folder(photographs)
    assert folder.classes == ("class0", "class1", "class2") and len(folder) == 12
    assert (
        list(folder.files) == sorted(folder.files)
        and folder.labels == (0,) * 4 + (1,) * 4 + (2,) * 4
    )
    assert scan_folder(photographs / "class1").classes == (".",)
    (tmp_path / "train").mkdir()
    assert split_folder(tmp_path, "train") == tmp_path / "train"
    assert split_folder(photographs, "train") == photographs
    (tmp_path / "train" / "notes.txt").write_text("no image")
    for bad, message in ((tmp_path / "absent", "not a folder"), (tmp_path, "found none")):
        with pytest.raises(ValueError, match=message):
            scan_folder(bad)


def test_order():
    first, again, second = (epoch_order(3, epoch, 100) for epoch in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert sorted(first) == list(range(100))
    assert not np.array_equal(first, epoch_order(4, 0, 100))
    plan = TrainPlan(10, 4, Transforms(), seed=3)
    whole = list(plan.batches(1, 6))
    assert plan.steps_per_epoch == 2 and all(len(batch) == 4 for batch in whole)
    assert all(map(np.array_equal, whole[3:], plan.batches(4, 6)))
    assert len(set(np.concatenate(whole[:2]))) == 8
    with pytest.raises(ValueError, match="at least one batch of 11"):
        TrainPlan(10, 11, Transforms(), seed=0)


def test_crops():
    """Inside the photograph, of the asked area and shape, uniform in place, and each sample's own."""
    transforms = Transforms(crop_scale=(0.3, 1.0), flip=0.25)
    count = 4000
    sizes = np.tile([300, 500], (count, 1))
    boxes = random_boxes(1, 2, np.arange(count), sizes, transforms)
    assert (boxes.top_left >= 0).all() and (boxes.top_left + boxes.size <= sizes).all()
    area = boxes.size.prod(1) / sizes.prod(1)
    ratio = boxes.size[:, 1] / boxes.size[:, 0]
    assert area.min() >= 0.29 and area.max() > 0.7
    assert ratio.min() >= 0.74 and ratio.max() <= 1.35
    fitting = Transforms(crop_scale=(0.1, 0.4))  # every draw fits, so nothing favours a shape
    shapes = random_boxes(1, 2, np.arange(count), sizes, fitting).size
    assert abs(np.log(shapes[:, 1] / shapes[:, 0]).mean()) < 5 * 0.166 / count**0.5
    areas, ratios = shapes.prod(1) / sizes.prod(1), np.log(shapes[:, 1] / shapes[:, 0])
    assert abs(areas.mean() - 0.25) < 0.01
    assert abs(np.corrcoef(areas, ratios)[0, 1]) < 5 / count**0.5
    middle = (boxes.top_left + boxes.size / 2).mean(0)
    assert np.allclose(middle, [150, 250], atol=5)
    assert abs(boxes.flip.mean() - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    part = random_boxes(1, 2, np.arange(50, 60), sizes[:10], transforms)
    assert all(np.array_equal(whole[50:60], own) for whole, own in zip(boxes, part, strict=True))
    assert not np.array_equal(
        boxes.size, random_boxes(1, 3, np.arange(count), sizes, transforms).size
    )
    narrow = random_boxes(1, 2, np.arange(1), np.array([[10, 1000]]), transforms)
    assert (narrow.size == [10, 13]).all()
    square = center_boxes(np.array([[300, 500]]), Transforms(center=0.5))
    assert (square.size == 150).all() and (square.top_left == [75, 175]).all()


@needs_dali
def test_decoding_agrees_with_pil(photographs):
    """Crop, antialiased resize, mirror and normalisation, the EXIF-turned photograph among them."""
    folder = scan_folder(photographs)
    transforms = Transforms(size=(12, 16), crop_scale=(0.5, 1.0), flip=0.5)
    plan = TrainPlan(12, 12, transforms, seed=7)
    (batch,) = train_batches(folder, plan, first_step=1, last_step=1, device=CPU, threads=1)
    assert batch.images.shape == (12, 3, 12, 16) and sorted(batch.samples.tolist()) == list(
        range(12)
    )
    raw = [Image.open(folder.files[sample]).convert("RGB") for sample in batch.samples]
    sizes = np.array([image.size[::-1] for image in raw])
    boxes = plan.boxes(1, batch.samples.numpy(), sizes)
    assert 0 < boxes.flip.sum() < 12
    mean, std = (torch.tensor(v)[:, None, None] for v in (transforms.mean, transforms.std))
    errors = []
    for image, decoded, (top, left), (height, width), flip in zip(
        raw, batch.images, *boxes, strict=True
    ):
        cut = image.resize(
            (16, 12), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
        expected = expected.flip(-1) if flip else expected
        errors.append(((decoded * std + mean - expected).abs().mean() * 255).item())
    assert max(errors) < 1.0, errors


@needs_dali
def test_batches_do_not_depend_on_where_they_begin(photographs):
    folder = scan_folder(photographs)
    plan = TrainPlan(12, 5, Transforms(size=(16, 16)), seed=1)
    whole = list(train_batches(folder, plan, first_step=1, last_step=5, device=CPU, threads=2))
    later = list(train_batches(folder, plan, first_step=4, last_step=5, device=CPU, threads=1))
    assert len(whole) == 5
    for first, second in zip(whole[3:], later, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(
            first.samples, second.samples
        )


@needs_dali
def test_evaluation_sees_every_image_once(photographs):
    batches = list(
        eval_batches(
            scan_folder(photographs), Transforms(size=(16, 16)), batch_size=5, device=CPU, threads=1
        )
    )
    assert [len(b.images) for b in batches] == [5, 5, 2]
    assert torch.cat([b.samples for b in batches]).tolist() == list(range(12))


@needs_dali
def test_unreadable_file_is_named(photographs, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(Exception, match=r"broken\.jpg"):
        list(
            eval_batches(
                scan_folder(tmp_path),
                Transforms(size=(16, 16)),
                batch_size=1,
                device=CPU,
                threads=1,
            )
        )


@needs_dali
def test_truncated_file_is_named(photographs, tmp_path):
    """Its header is whole, so only decoding finds it; the message names it, not the good ones."""
    (tmp_path / "a").mkdir()
    for source in scan_folder(photographs).files:
        (tmp_path / "a" / source.name).write_bytes(source.read_bytes())
    cut = tmp_path / "a" / "05.jpg"
    cut.write_bytes(cut.read_bytes()[:-400])
    plan = TrainPlan(12, 4, Transforms(size=(16, 16)), seed=1)
    with pytest.raises(ValueError, match=r"decoded, got [^,]*05\.jpg; repair"):
        list(
            train_batches(
                scan_folder(tmp_path), plan, first_step=1, last_step=3, device=CPU, threads=1
            )
        )


def test_digits(tmp_path):
    root = digits_folder(tmp_path / "digits")
    train, test = scan_folder(root / "train"), scan_folder(root / "test")
    assert (len(train), len(test)) == (1258, 539) and train.classes == tuple("0123456789")
    with Image.open(train.files[0]) as image:
        assert image.size == (32, 32) and image.format == "JPEG"
    stamp = train.files[0].stat().st_mtime_ns
    assert digits_folder(root) == root and train.files[0].stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
