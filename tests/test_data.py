"""Which images there are, in what order, and what is drawn for each."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from stopfast.config import Transforms
from stopfast.data.digits import digits_folder
from stopfast.data.draws import center_draws, epoch_order, random_draws
from stopfast.data.images import open_images, split_folder
from stopfast.data.loader import TrainPlan
from tests.small_photographs import write_photographs, write_tar


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


def test_class_folders(photographs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    images = open_images(root)
    (root / "class1" / ".hidden.jpg").write_bytes(b"")
    (root / "class1" / "notes.txt").write_text("no image")
    (root / "__MACOSX" / "class1").mkdir(parents=True)
    (root / "__MACOSX" / "class1" / "01.jpg").write_bytes(b"")
    (root / "empty").mkdir()
    (root / "class2" / "round").symlink_to(root)
    again = open_images(root)
    assert again.names == images.names == tuple(sorted(images.names)) and len(images) == 12
    assert images.classes == ("class0", "class1", "class2")
    assert images.labels == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert images.read(5) == (root / images.names[5]).read_bytes()
    assert images.sizes.tolist() == [len(images.read(i)) for i in range(12)]
    flat = open_images(root / "class1")
    assert flat.classes == (".",) and flat.names == ("01.jpg", "04.jpg", "07.jpg", "10.jpg")
    (root / "own.JPEG").write_bytes(images.read(0))
    mixed = open_images(root)
    assert mixed.classes == (".",) and len(mixed) == 13 and set(mixed.labels) == {0}


def test_order_of_nested_folders(tmp_path):
    """By the parts of the path: a run that was begun on a list goes on with the same list."""
    for name in ("b/x/1.jpg", "b/x-1.jpg", "a b/1.jpg", "a/1.jpg", "10/1.jpg", "9/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = open_images(tmp_path)
    assert images.names == tuple(
        path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.jpg"))
    )
    assert images.classes == ("10", "9", "a", "a b", "b")


def _shards(root, photographs, labels=lambda number: str(number % 11)):
    root.mkdir(exist_ok=True)
    files = sorted(photographs.rglob("*.*"))
    for shard in range(2):
        members = [("notes.json", b"{}"), ("run.pkl", b"no"), ("._0.jpg", b"x"), ("link.jpg", None)]
        for number in range(6 * shard, 6 * shard + 6):
            file = files[number]
            # The dot in the middle: a key ends at the first one.
            members.append((f"./d/{number}.view{file.suffix}", file.read_bytes()))
            if labels(number):
                members.append((f"./d/{number}.cls", labels(number).encode() + b"\n"))
        write_tar(root / f"part-{shard}.tar", members)
    return root, [file.read_bytes() for file in files]


def test_tars(photographs, tmp_path):
    root, stored = _shards(tmp_path / "shards", photographs)
    images = open_images(root)
    assert images.names[:2] == ("part-0.tar/d/0.view.jpg", "part-0.tar/d/1.view.png")
    assert [images.read(i) for i in range(12)] == stored
    assert images.classes == (*map(str, range(11)),)
    assert images.labels == (*range(11), 0)
    single = open_images(root / "part-1.tar")
    assert single.names == images.names[6:] and single.read(2) == stored[8]
    chosen = images.subset([7, 2])
    assert [chosen.read(0), chosen.read(1)] == [stored[7], stored[2]]
    assert (chosen.names[0], chosen.labels) == (images.names[7], (7, 2))
    assert chosen.classes == images.classes
    unlabelled, _ = _shards(tmp_path / "unlabelled", photographs, lambda number: "")
    assert open_images(unlabelled).classes == (".",)
    named, _ = _shards(tmp_path / "named", photographs, lambda number: "ab"[number % 2])
    assert open_images(named).classes == ("a", "b")


def test_fingerprint(photographs, tmp_path):
    """It is that of the list, not of the place; and of every name, size, label and class."""
    images = open_images(photographs)
    moved = tmp_path / "moved"
    shutil.copytree(photographs, moved)
    assert open_images(moved).fingerprint() == images.fingerprint()
    prints = {images.fingerprint(), images.subset(range(11)).fingerprint()}
    prints.add(images.subset([1, 0, *range(2, 12)]).fingerprint())
    for change in (
        lambda: (moved / "class1").rename(moved / "class1b"),
        lambda: os.truncate(moved / "class0" / "00.jpg", 100),
        lambda: (moved / "class0" / "00.jpg").rename(moved / "class0" / "01.jpg"),
    ):
        change()
        prints.add(open_images(moved).fingerprint())
    assert len(prints) == 6
    tars = [
        _shards(tmp_path / texts, photographs, lambda n, t=texts: t[n % 2])[0]
        for texts in ("ab", "ac")
    ]
    assert open_images(tars[0]).labels == open_images(tars[1]).labels
    assert open_images(tars[0]).fingerprint() != open_images(tars[1]).fingerprint()


def _bad(tmp_path, kind):
    image = (b"\xff\xd8", b"\xff\xd9")
    if kind == "absent":
        return tmp_path / "absent"
    if kind == "no images":
        (tmp_path / "notes.txt").write_text("no image")
    elif kind == "a file":
        (tmp_path / "one.jpg").write_bytes(b"".join(image))
        return tmp_path / "one.jpg"
    elif kind == "images and tars":
        (tmp_path / "one.jpg").write_bytes(b"")
        write_tar(tmp_path / "one.tar", [])
    elif kind == "compressed":
        write_tar(tmp_path / "one.tar", [("a.jpg", b"x")], "w:gz")
    elif kind == "no image in it":
        write_tar(tmp_path / "one.tar", [("a.txt", b"x")])
    elif kind == "labels for some":
        write_tar(tmp_path / "one.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")])
    elif kind == "twice":
        write_tar(tmp_path / "one.tar", [("a.jpg", b"x"), ("a.jpg", b"y")])
    elif kind in ("no text", "long"):
        label = b"\xff\xfe" if kind == "no text" else b"1" * 300
        write_tar(tmp_path / "one.tar", [("a.jpg", b"x"), ("a.cls", label)])
    else:
        tar = write_tar(tmp_path / "one.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(9)])
        whole = tar.read_bytes()
        if kind == "two tars":
            tar.write_bytes(whole + whole)
        elif kind == "damaged header":
            tar.write_bytes(whole[: 4 * 1536] + b"?" * 512 + whole[4 * 1536 + 512 :])
        else:
            tar.write_bytes(whole[: 4 * 1536 + int(kind)])
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "which is not there"),
        ("empty", "found none"),
        ("no images", "found none"),
        ("a file", "got the file"),
        ("images and tars", r"got both: one\.jpg and one\.tar"),
        ("compressed", "unpacked first"),
        ("no image in it", "found none"),
        ("labels for some", r"got none for 1 of 2, one\.tar/a\.jpg first"),
        ("twice", r"a\.jpg twice"),
        ("no text", r"a label as text in .*a\.cls"),
        ("long", "of 300"),
        ("two tars", "several tars"),
        ("damaged header", "it is damaged"),
        ("0", "it was cut off"),  # a tar of nine, cut so many bytes into the fifth
        ("100", "damaged|cut off"),
        ("512", "unexpected end of data"),
        ("800", "unexpected end of data"),
    ],
)
def test_bad_sources(tmp_path, kind, message):
    root = tmp_path if kind == "empty" else _bad(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as caught:
        open_images(root)
    assert str(root) in str(caught.value)


def test_splits(tmp_path):
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "val.tar", [])
    assert split_folder(tmp_path, "train") == tmp_path / "train"
    assert split_folder(tmp_path, "test", "val") == tmp_path / "val.tar"
    assert split_folder(tmp_path / "train", "train") == tmp_path / "train"
    assert split_folder(tmp_path / "val.tar", "train") == tmp_path / "val.tar"
    with pytest.raises(ValueError, match="not there"):
        split_folder(tmp_path / "absent", "train")


def _folders(root, *names):
    for name in names:
        if name.endswith(".tar"):
            write_tar(root / name, [])
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("others", "opened"),
    [
        (("car/1.jpg",), None),
        (("car/deep/1.PNG", "test.txt"), None),
        (("car/1.jpg", "train.tar"), None),
        ((".hidden/1.jpg", "__MACOSX/1.jpg", "notes/1.xml", "logo.png", "car.tar"), "train"),
        (("test/1.jpg",), "train"),
        (("validation/1.jpg", "unlabelled/1.jpg"), "train"),
        (("val.tar", "unlabelled/1.jpg"), "train"),
    ],
)
def test_a_class_is_no_split(tmp_path, others, opened):
    """One folder of a split's name beside others with images: neither guess is made."""
    _folders(tmp_path, "train/1.jpg", *others)
    if opened is None:
        with pytest.raises(ValueError, match=r"got car: .* a class like car, rename it") as caught:
            split_folder(tmp_path, "train")
        assert f"name {tmp_path / 'train'} itself" in str(caught.value)
        with pytest.raises(ValueError, match="got car"):  # not the whole, with the class in it
            split_folder(tmp_path, "test", "val", "train")
    else:
        assert split_folder(tmp_path, "train") == tmp_path / opened
    assert split_folder(tmp_path / "train", "train") == tmp_path / "train"  # as the message says


def test_a_shard_is_no_split(tmp_path):
    _folders(tmp_path, "train.tar", "images/1.jpg", "unpacked.tar/1.jpg")
    assert split_folder(tmp_path, "train") == tmp_path / "train.tar"
    _folders(tmp_path, "more.tar")
    with pytest.raises(ValueError, match=r"got more\.tar: .* a shard like more\.tar"):
        split_folder(tmp_path, "train")
    _folders(tmp_path, "test.tar")
    assert split_folder(tmp_path, "train") == tmp_path / "train.tar"


def test_what_cannot_be_read_is_no_class(tmp_path, monkeypatch):
    """A disk's lost+found, which is there beside train on a disk of its own."""
    _folders(tmp_path, "train/1.jpg", "lost+found/1.jpg")
    whole = os.scandir

    def scandir(folder):
        if folder == tmp_path / "lost+found":
            raise PermissionError(folder)
        return whole(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert split_folder(tmp_path, "train") == tmp_path / "train"


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
    samples, sizes = np.arange(4), np.tile([300, 500], (4, 1))
    drawn = [plan.draws(step, samples, sizes).size for step in (1, 2, 3)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="at least one batch of 11"):
        TrainPlan(10, 11, Transforms(), seed=0)


def test_draws_stay_what_they_were():
    """Runs that are resumed, and results that were published, depend on these very numbers."""
    sizes = np.array([[300, 500], [32, 32], [480, 640], [1000, 20], [375, 500]])
    transforms = Transforms(flip=0.5, gray=0.5, blur=0.5)
    drawn = random_draws(7, 3, np.array([0, 1, 5, 1000, 1281166]), sizes, transforms)
    assert drawn.top_left.tolist() == [[20, 77], [6, 4], [23, 43], [486, 0], [39, 57]]
    assert drawn.size.tolist() == [[247, 295], [21, 24], [416, 390], [27, 20], [320, 298]]
    assert drawn.flip.tolist() == [0, 0, 0, 1, 0]
    assert drawn.gray.tolist() == [1, 0, 1, 0, 1]
    assert np.allclose(drawn.sigma, [0.772536, 0.0, 1.334946, 0.0, 0.183323], atol=1e-6)
    order = [0, 11, 10, 1, 13, 3, 9, 14, 12, 17, 8, 19, 18, 16, 4, 7, 6, 5, 15, 2]
    assert epoch_order(7, 3, 20).tolist() == order


def test_crops():
    """Inside the photograph, of the asked area and shape, uniform in place, and each sample's own."""
    transforms = Transforms(crop_scale=(0.3, 1.0))
    count = 4000
    sizes = np.tile([300, 500], (count, 1))
    drawn = random_draws(1, 2, np.arange(count), sizes, transforms)
    assert (drawn.top_left >= 0).all() and (drawn.top_left + drawn.size <= sizes).all()
    area = drawn.size.prod(1) / sizes.prod(1)
    ratio = drawn.size[:, 1] / drawn.size[:, 0]
    assert area.min() >= 0.29 and area.max() > 0.7
    assert ratio.min() >= 0.74 and ratio.max() <= 1.35
    fitting = Transforms(crop_scale=(0.1, 0.4))  # every draw fits, so nothing favours a shape
    shapes = random_draws(1, 2, np.arange(count), sizes, fitting).size
    areas, ratios = shapes.prod(1) / sizes.prod(1), np.log(shapes[:, 1] / shapes[:, 0])
    assert abs(ratios.mean()) < 5 * 0.166 / count**0.5
    assert abs(areas.mean() - 0.25) < 0.01
    assert abs(np.corrcoef(areas, ratios)[0, 1]) < 5 / count**0.5
    middle = (drawn.top_left + drawn.size / 2).mean(0)
    assert np.allclose(middle, [150, 250], atol=5)
    narrow = random_draws(1, 2, np.arange(1), np.array([[10, 1000]]), transforms)
    assert (narrow.size == [10, 13]).all()
    tiny = random_draws(1, 2, np.arange(1), np.array([[1, 1]]), Transforms(crop_ratio=(3, 4)))
    assert (tiny.size == 1).all() and (tiny.top_left == 0).all()
    square = center_draws(np.array([[300, 500]]), Transforms(center=0.5))
    assert (square.size == 150).all() and (square.top_left == [75, 175]).all()
    assert not any(values.any() for values in square[2:])


def test_decisions():
    """Flip, grayscale and blur as often as asked, independent of each other, radii uniform."""
    transforms = Transforms(flip=0.25, gray=0.2, blur=0.5, blur_radius=(0.5, 2.0))
    count = 4000
    sizes = np.tile([30, 50], (count, 1))
    drawn = random_draws(1, 2, np.arange(count), sizes, transforms)
    blurred = drawn.sigma > 0
    for chosen, share in ((drawn.flip, 0.25), (drawn.gray, 0.2), (blurred, 0.5)):
        assert abs(chosen.mean() - share) < 5 * (share * (1 - share) / count) ** 0.5
    radii = drawn.sigma[blurred]
    assert radii.min() >= 0.5 and radii.max() <= 2.0
    assert abs(radii.mean() - 1.25) < 5 * 1.5 / 12**0.5 / len(radii) ** 0.5
    dependence = np.corrcoef([drawn.flip, drawn.gray, blurred, drawn.top_left[:, 0]])
    assert (np.abs(dependence - np.eye(4)) < 5 / count**0.5).all()
    part = random_draws(1, 2, np.arange(50, 60), sizes[:10], transforms)
    assert all(np.array_equal(whole[50:60], own) for whole, own in zip(drawn, part, strict=True))
    for other in ((2, 2), (1, 3)):
        for whole, own in zip(
            drawn, random_draws(*other, np.arange(count), sizes, transforms), strict=True
        ):
            assert not np.array_equal(whole, own)
    never = random_draws(1, 2, np.arange(count), sizes, Transforms())
    assert not never.flip.any() and not never.gray.any() and not never.sigma.any()


def test_digits(tmp_path):
    root = digits_folder(tmp_path / "digits")
    train, test = open_images(root / "train"), open_images(root / "test")
    assert (len(train), len(test)) == (1258, 539) and train.classes == tuple("0123456789")
    first = root / "train" / train.names[0]
    with Image.open(first) as image:
        assert image.size == (32, 32) and image.format == "JPEG"
    stamp = first.stat().st_mtime_ns
    assert digits_folder(root) == root and first.stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
