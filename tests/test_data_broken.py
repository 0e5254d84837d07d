"""Broken images: all are found, by one look at each; a run is refused, or goes on without them."""

import io
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from stopfast.config import DataConfig, Transforms
from stopfast.data import scan
from stopfast.data.images import open_images
from stopfast.data.scan import check_images, usable_images
from stopfast.env import dali_problem
from tests.small_photographs import encode, evaluate, pixels, write_photographs, write_tar

REFUSE = DataConfig(threads=2)
SKIP = replace(REFUSE, broken="skip", max_broken=0.5)


@pytest.fixture
def root(tmp_path):
    return write_photographs(tmp_path / "images")


def _broken_files():
    image = Image.fromarray(pixels(0))
    jpeg = encode(image, "JPEG")
    png = encode(image, "PNG")
    idat = png.index(b"IDAT")
    yield "empty.jpg", b"", "neither JPEG nor PNG"
    yield "text.jpg", b"no image at all", "neither JPEG nor PNG"
    yield "gif.png", encode(image, "GIF"), "neither JPEG nor PNG"
    yield "header.jpg", jpeg[:100], "Truncated"
    yield "half.jpg", jpeg[: len(jpeg) // 2], "truncated"
    progressive = encode(image, "JPEG", progressive=True)
    yield "half-progressive.jpg", progressive[: len(progressive) // 2], "truncated"
    yield "no-end.jpg", jpeg[:-2], "truncated"
    yield "stray.jpg", jpeg[:20] + b"\0\0" + jpeg[20:], "stray bytes .* at byte 20"
    yield "half.png", png[: len(png) // 2], "truncated"
    yield "no-end.png", png[:-12], "before its IEND"
    yield "half-end.png", png[:-5], "before its IEND"
    yield "sum.png", png[:-16] + b"\0\0\0\0" + png[-12:], "checksum"
    yield "flipped.png", png[: idat + 60] + b"\0\xff\0\xff" + png[idat + 64 :], "Error|checksum"
    yield "huge.png", encode(Image.new("1", (10_000, 9_000)), "PNG"), "more than PIL's limit"


def _write_broken(folder):
    folder.mkdir()
    for name, data, _ in _broken_files():
        (folder / name).write_bytes(data)
    (folder / "nowhere.jpg").symlink_to("absent.jpg")
    return {name: why for name, _, why in _broken_files()} | {"nowhere.jpg": "cannot be read"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_broken_image_is_found(root, tmp_path):
    reasons = _write_broken(root / "class3")
    images = open_images(root)
    verdict = check_images(images, threads=2, cache=tmp_path / "cache")
    assert verdict.checked == len(images) == 12 + len(reasons)
    assert verdict.broken.keys() == {f"class3/{name}" for name in reasons}
    for name, why in reasons.items():
        with pytest.raises(ValueError, match=why):
            raise ValueError(verdict.broken[f"class3/{name}"])
    if dali_problem() is None:  # what is good to the scan, DALI decodes
        good = usable_images(images, replace(SKIP, max_broken=1.0), cache=tmp_path / "cache")
        assert len(evaluate(good, Transforms(size=(8, 8)), "dali", batch_size=12)) == 1


@pytest.mark.skipif(dali_problem() is not None, reason="DALI is not installed")
def test_dali_decodes_what_the_scan_lets_pass(tmp_path):
    """Files damaged at random: those that were found good do not end a pipeline."""
    random = np.random.default_rng(0)
    whole = Image.fromarray(pixels(3))
    stored = [
        encode(whole, "JPEG"),
        encode(whole, "JPEG", progressive=True),
        encode(whole.convert("L"), "JPEG", restart_marker_rows=1),
        encode(whole, "PNG"),
        encode(whole.quantize(30), "PNG"),
    ]
    for number in range(600):
        data = bytearray(stored[number % len(stored)])
        # Headers are short, so half of the damage is aimed at them, and some at the end.
        place = int(
            random.choice([random.integers(2, 400), random.integers(2, len(data)), len(data) - 8])
        )
        length = int(random.integers(1, 20))
        match random.integers(4):
            case 0:
                data[place : place + length] = b""
            case 1:
                data[place:place] = random.bytes(length)
            case 2:
                data[place : place + length] = bytes(len(data[place : place + length]))
            case 3:
                data[place] = int(random.integers(256))
        (tmp_path / f"{number:03d}.jpg").write_bytes(data)
    images = open_images(tmp_path)
    good = usable_images(images, replace(SKIP, max_broken=1.0), cache=tmp_path / "cache")
    assert 100 < len(good) < 500
    seen = evaluate(good, Transforms(size=(8, 8)), "dali", batch_size=64)
    assert sum(len(batch.images) for batch in seen) == len(good)


def test_what_is_known_is_not_looked_at_again(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def check():
        verdict = check_images(open_images(root), threads=2, cache=cache)
        return verdict.checked, sorted(verdict.broken)

    assert check() == (12, []) and check() == (0, [])
    changed, renamed = root / "class0" / "00.jpg", root / "class1" / "01.jpg"
    changed.write_bytes(changed.read_bytes()[:-300])
    renamed.rename(root / "class1" / "02.jpg")
    assert check() == (2, ["class0/00.jpg"])
    assert check() == (1, ["class0/00.jpg"])  # it may have been repaired on the spot
    os.utime(root / "class2" / "05.jpg", ns=(1, 1))
    assert check() == (2, ["class0/00.jpg"])
    monkeypatch.setattr(scan, "_RULES", 0)
    assert check() == (12, ["class0/00.jpg"])
    (kept,) = cache.iterdir()
    for damaged in (b"", kept.read_bytes()[:-4], b"no array"):
        kept.write_bytes(damaged)
        assert check() == (12, ["class0/00.jpg"]) and check()[0] == 1
    other = write_photographs(tmp_path / "other")
    assert check_images(open_images(other), threads=1, cache=cache).checked == 12
    good = (root / "class1" / "02.jpg").read_bytes()
    tars = [open_images(write_tar(tmp_path / f"{i}.tar", [("a.jpg", good)])) for i in (1, 2)]
    looks = [check_images(tar, threads=1, cache=cache).checked for tar in (*tars, *tars)]
    assert looks == [1, 1, 0, 0]


def test_a_cache_that_cannot_be_written_costs_time_only(root, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_TASK", 2)
    monkeypatch.setattr(scan, "_KEEP", 4)
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="not kept") as caught:
        verdict = check_images(open_images(root), threads=1, cache=tmp_path / "file" / "cache")
    assert len(caught) == 1 and verdict.checked == 12 and not verdict.broken


def test_an_interrupted_look_goes_on(root, tmp_path, monkeypatch):
    """What was seen before the interruption is known, and the threads end."""
    monkeypatch.setattr(scan, "_TASK", 2)
    images = open_images(root)
    look = scan._look

    def interrupted(*arguments):
        for number, found in enumerate(look(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(scan, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_images(images, threads=2, cache=tmp_path / "cache")
    assert not [t for t in threading.enumerate() if t.name.startswith("stopfast")]
    monkeypatch.setattr(scan, "_look", look)
    assert check_images(images, threads=2, cache=tmp_path / "cache").checked == 6


def test_a_kill_loses_little(root, tmp_path, monkeypatch):
    """The cache is written on the way, each time two or half as many as it holds are good."""
    monkeypatch.setattr(scan, "_TASK", 1)
    monkeypatch.setattr(scan, "_KEEP", 2)
    monkeypatch.setattr(scan, "_KEEP_SHARE", 2)
    cache, look, written = tmp_path / "cache", scan._look, []

    def watched(*arguments):
        for found in look(*arguments):
            written.append(sum(len(scan._load(file)) for file in cache.glob("*")))
            yield found

    monkeypatch.setattr(scan, "_look", watched)
    first = root / "class0" / "00.jpg"  # it is not written down
    first.write_bytes(b"no image")
    images = open_images(root)
    assert check_images(images, threads=1, cache=cache).broken.keys() == {"class0/00.jpg"}
    assert written == [0, 0, 0, 2, 2, 4, 4, 6, 6, 6, 9, 9]
    (kept,) = cache.iterdir()
    assert set(scan._load(kept)) == set(scan._keys(images)[1:])


def test_an_interruption_does_not_wait_for_the_rest(root, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(scan, "_TASK", 1)
    monkeypatch.setattr(
        scan, "check_stored", lambda data: looked.append(threading.Event().wait(0.05))
    )
    parts = scan._look(open_images(root), np.arange(12), 1, None)
    next(parts)
    parts.close()
    assert len(looked) < 6


def test_refused_or_left_out(root, tmp_path):
    images = open_images(root)
    cache = tmp_path / "cache"
    assert usable_images(images, REFUSE, cache=cache) is images
    for name in ("class0/00.jpg", "class2/05.jpg"):
        (root / name).write_bytes(b"no image")
    images = open_images(root)
    with pytest.raises(ValueError, match=r"2 of 12 images in (?s:.*)--data\.broken skip") as caught:
        usable_images(images, REFUSE, cache=cache)
    assert "class0/00.jpg" in str(caught.value) and "class2/05.jpg" in str(caught.value)
    shown = io.StringIO()
    left = usable_images(images, SKIP, console=Console(file=shown), cache=cache)
    assert [n for n in images.names if n not in left.names] == ["class0/00.jpg", "class2/05.jpg"]
    assert left.classes == images.classes and len(left.labels) == 10
    text = shown.getvalue()
    assert text.count("class0/00.jpg") == 1 and "2 of 12 images" in text
    for share, message in ((0.1, "at most 10.00% broken"), (0.0, "at most 0.00%")):
        with pytest.raises(ValueError, match=message):
            usable_images(images, replace(SKIP, max_broken=share), cache=cache)
    assert len(usable_images(images, replace(SKIP, max_broken=2 / 12), cache=cache)) == 10


def test_many_are_counted_and_some_named(tmp_path):
    for number in range(13):
        (tmp_path / f"{number:02d}.jpg").write_bytes(b"no image")
    images = open_images(tmp_path)
    for data in (REFUSE, replace(SKIP, max_broken=1.0)):
        with pytest.raises(ValueError, match=r"13 of 13 images.*(?s:.*)and 3 more") as caught:
            usable_images(images, data, cache=tmp_path / "cache")
        assert "09.jpg" in str(caught.value) and "10.jpg" not in str(caught.value)
