"""Decoding: what both loaders make of an image, in any order, and how they begin, fail and end."""

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from stopfast.config import Transforms
from stopfast.data import loader as loader_module
from stopfast.data import pil
from stopfast.data.ahead import read_ahead
from stopfast.data.images import open_images
from stopfast.data.loader import eval_batches, resolve_loader
from stopfast.env import dali_problem
from tests.small_photographs import (
    COUNT,
    CPU,
    encode,
    evaluate,
    pixels,
    plan_for,
    train,
    write_photographs,
    write_tar,
)

dali = pytest.param(
    "dali", marks=pytest.mark.skipif(dali_problem() is not None, reason="DALI is not installed")
)
both = pytest.mark.parametrize("loader", [dali, "pil"])
AUGMENTED = Transforms(size=(12, 16), crop_scale=(0.5, 1.0), flip=0.5, gray=0.4, blur=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def images(root):
    return open_images(root)


def _shown(images, transforms):
    """Normalised images as 0..255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (transforms.mean, transforms.std))
    return (images * std + mean) * 255


def _tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


OTHER = {"bilinear": "bicubic", "bicubic": "bilinear"}


@both
@pytest.mark.parametrize("interpolation", OTHER)
def test_steps_of_decoding(images, loader, interpolation):
    """Crop, antialiased resize, flip, grayscale, blur: each as PIL does it, alone and all together."""
    plan = plan_for(images, replace(AUGMENTED, interpolation=interpolation), COUNT)
    (batch,) = train(images, plan, loader)
    assert batch.images.shape == (COUNT, 3, 12, 16) and batch.images.is_contiguous()
    assert batch.images.dtype == torch.float32 and batch.samples.dtype == torch.int64
    assert sorted(batch.samples.tolist()) == list(range(COUNT))
    raw = [Image.open(images.root / images.names[s]).convert("RGB") for s in batch.samples]
    sizes = np.array([image.size[::-1] for image in raw])
    drawn = plan.draws(1, batch.samples.numpy(), sizes)
    assert all(0 < chosen.sum() < COUNT for chosen in (drawn.flip, drawn.gray, drawn.sigma > 0))
    shown = _shown(batch.images, AUGMENTED)
    distances = []
    for image, decoded, (top, left), (height, width), flip, gray, sigma in zip(
        raw, shown, *drawn, strict=True
    ):
        crop = image.crop((left, top, left + width, top + height))
        own, other = (
            crop.resize((16, 12), Image.Resampling[name.upper()])
            for name in (interpolation, OTHER[interpolation])
        )
        if not flip and not gray and sigma == 0:
            distances.append([(decoded - _tensor(x)).abs().mean().item() for x in (own, other)])
        seen = own
        seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else seen
        seen = seen.convert("L").convert("RGB") if gray else seen
        seen = seen.filter(ImageFilter.GaussianBlur(float(sigma))) if sigma > 0 else seen
        expected = _tensor(seen)
        # The edges of a blur are continued otherwise by DALI, and these images are little but edge.
        allowed = 4.0 if loader == "dali" and sigma > 0 else 0.8 if loader == "dali" else 1e-3
        assert (decoded - expected).abs().mean() < allowed
    near, far = np.mean(distances, axis=0)
    assert near < far


@both
def test_batches_do_not_depend_on_where_they_begin(root, images, loader, tmp_path):
    """Nor on threads, nor on whether the same files lie in a tar."""
    plan = plan_for(images, AUGMENTED, 5)
    whole = train(images, plan, loader, steps=(1, 5), threads=2)
    later = train(images, plan, loader, steps=(4, 5))
    members = [(name, (root / name).read_bytes()) for name in images.names]
    tar = open_images(write_tar(tmp_path / "one.tar", members))
    packed = train(tar, plan, loader, steps=(4, 5), threads=3)
    assert len(whole) == 5
    for first, second, third in zip(whole[3:], later, packed, strict=True):
        for other in (second, third):
            assert torch.equal(first.images, other.images)
            assert torch.equal(first.samples, other.samples)


@both
def test_evaluation_sees_every_image_once(images, loader):
    transforms = replace(AUGMENTED, flip=1.0, gray=1.0, blur=1.0, center=0.5)
    batches = evaluate(images, transforms, loader)
    assert [len(batch.images) for batch in batches] == [5, 5, 2]
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(COUNT))
    with Image.open(images.root / images.names[0]) as image:
        seen = image.crop((22, 10, 42, 30)).resize((16, 12), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(seen)).permute(2, 0, 1)
    shown = _shown(batches[0].images[0], transforms)
    assert images.names[0].endswith("00.jpg") and (shown - expected).abs().mean() < 0.8


def _png16(color):
    """A 16-bit PNG, which PIL does not write: grayscale (0), RGB (2), with alpha (4, 6)."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    values = (np.resize(pixels(0), (40, 64, channels)).astype(np.uint32) * 257 + 100) % 65536
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 64, 40, 16, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _kinds() -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(pixels(0))
    alpha = np.dstack([pixels(0), np.resize(pixels(1), (40, 64))])
    palette = image.quantize(40)
    stored = encode(image, "JPEG")
    yield "cmyk.jpg", encode(image.convert("CMYK"), "JPEG", quality=95)
    yield "gray.jpg", encode(image.convert("L"), "JPEG")
    yield "progressive.jpg", encode(image, "JPEG", progressive=True)
    yield "trailing.jpg", stored + b"more"
    yield "fill.jpg", stored[:2] + b"\xff\xff" + stored[2:]
    yield "really-png.jpg", encode(image, "PNG")
    yield "really-jpeg.png", stored
    yield "alpha.png", encode(Image.fromarray(alpha), "PNG")
    yield "gray-alpha.png", encode(Image.fromarray(alpha).convert("LA"), "PNG")
    yield "palette.png", encode(palette, "PNG")
    yield "palette-transparent.png", encode(palette, "PNG", transparency=bytes(range(40)))
    yield "one-bit.png", encode(image.convert("1"), "PNG")
    for color in (0, 2, 4, 6):
        yield f"16-bit-{color}.png", _png16(color)
    yield "one-pixel.jpg", encode(Image.fromarray(pixels(0)[:1, :1]), "JPEG")


@pytest.mark.skipif(dali_problem() is not None, reason="DALI is not installed")
def test_kinds_of_files(tmp_path):
    """Whatever is stored, both loaders show the same, or neither shows anything."""
    for name, data in _kinds():
        (tmp_path / name).write_bytes(data)
    images = open_images(tmp_path)
    transforms = Transforms(size=(40, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = (
            torch.cat(
                [_shown(batch.images, transforms) for batch in evaluate(images, transforms, name)]
            )
            for name in ("pil", "dali")
        )
    worst = (ours - theirs).abs().mean((1, 2, 3))
    for name, error, shown in zip(images.names, worst.tolist(), ours, strict=True):
        # Of 16 bits PIL keeps the upper 8, where DALI rounds.
        assert error < (1.0 if name.startswith("16-bit") else 1e-3), name
        assert shown.std() > 20 or name == "one-pixel.jpg", name


@both
@pytest.mark.parametrize("damage", ["header", "stream", "stray bytes", "gone"])
def test_a_file_that_breaks_is_named(root, loader, damage, tmp_path):
    """It and no other, whenever it broke; and no thread stays."""
    images = open_images(write_photographs(tmp_path))
    assert images.names[5] == "class1/04.jpg"
    file = tmp_path / images.names[5]
    stored = file.read_bytes()
    if damage == "header":
        file.write_bytes(b"no image")
    elif damage == "stream":
        file.write_bytes(stored[:-400])
    elif damage == "stray bytes":  # PIL passes over them
        file.write_bytes(stored[:20] + b"\0\0" + stored[20:])
    else:
        file.unlink()
    plan = plan_for(images, Transforms(size=(16, 16)), 4, seed=1)
    if damage == "stray bytes" and loader == "pil":
        assert len(train(images, plan, loader, steps=(1, 3))) == 3
        return
    expected = FileNotFoundError if damage == "gone" else ValueError
    with pytest.raises(expected, match=r"04\.jpg") as caught:
        train(images, plan, loader, steps=(1, 3), threads=2)
    text = str(caught.value)
    assert sum(name.rpartition("/")[2] in text for name in images.names) == 1
    assert damage == "gone" or "--data.broken skip" in text
    assert damage != "stream" or "truncated" in text
    assert not _our_threads()


def test_pil_does_not_wait_for_one_image(images, monkeypatch):
    """While one takes long, images of later batches are decoded."""
    plan = plan_for(images, AUGMENTED, 4)
    expected = train(images, plan, "pil", steps=(1, 3))
    decode, later, seen = pil.cut, threading.Event(), []

    def slow(image, draws, *settings):
        seen.append(draws)
        if len(seen) == 1:
            assert later.wait(20), "no later batch was begun"
        elif draws is not seen[0]:
            later.set()
        return decode(image, draws, *settings)

    monkeypatch.setattr(pil, "cut", slow)
    batches = train(images, plan, "pil", steps=(1, 3), threads=3)
    for batch, same in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, same.images)


@pytest.mark.parametrize("damage", [b"no image", None], ids=["header", "stream"])
def test_batches_before_a_broken_image_come(root, damage, tmp_path):
    images = open_images(write_photographs(tmp_path))
    plan = plan_for(images, Transforms(size=(16, 16)), 4, seed=1)
    last = int(list(plan.batches(1, 3))[2][0])
    file = tmp_path / images.names[last]
    file.write_bytes(damage or file.read_bytes()[:-400])
    data = loader_module.DataConfig(loader="pil", threads=3)
    batches = loader_module.train_batches(
        images, plan, first_step=1, last_step=3, device=CPU, data=data
    )
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(ValueError, match=file.name):
        next(batches)
    assert not _our_threads()


@both
def test_what_a_reader_raises_is_raised(images, loader):
    class Failing(type(images)):
        def read(self, sample):
            if sample == 7:
                raise RuntimeError("the disk is on fire")
            return super().read(sample)

    failing = Failing(**images.__dict__)
    with pytest.raises(RuntimeError, match="on fire"):
        evaluate(failing, AUGMENTED, loader, batch_size=2)
    assert not _our_threads()


def _our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("stopfast")]


@both
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_consumer_may_stop_early(images, loader, taken):
    plan = plan_for(images, AUGMENTED, 2)
    data = loader_module.DataConfig(loader=loader, threads=2)
    batches = loader_module.train_batches(
        images, plan, first_step=1, last_step=10**6, device=CPU, data=data
    )
    for _ in range(taken):
        next(batches)
    assert bool(_our_threads()) == (taken > 0)
    batches.close()
    assert not _our_threads()


def test_read_ahead():
    """Ahead by the depth and no more, in another thread; what fails comes after what did not."""
    made, done = [], threading.Event()

    def numbers():
        try:
            for number in range(6):
                made.append((number, threading.current_thread().name))
                if number == 3:
                    done.set()
                yield number
            raise ValueError("no more")
        finally:
            made.append(("closed", threading.current_thread().name))

    ahead = read_ahead(numbers(), 2)
    assert next(ahead) == 0
    assert done.wait(5)  # 1 and 2 wait in the queue, 3 to get into it
    assert [number for number, _ in made] == [0, 1, 2, 3]
    assert {name for _, name in made} == {"stopfast-ahead"}
    rest = []
    with pytest.raises(ValueError, match="no more"):
        for number in ahead:
            rest.append(number)
    assert rest == [1, 2, 3, 4, 5] and made[-1] == ("closed", "stopfast-ahead")
    made.clear()
    done.clear()
    ahead = read_ahead(numbers(), 1)
    next(ahead)
    ahead.close()
    assert made[-1] == ("closed", "stopfast-ahead") and not _our_threads()


def test_choice_of_loader(images, monkeypatch):
    monkeypatch.setattr(loader_module, "dali_problem", lambda: None)
    assert [resolve_loader(name) for name in ("auto", "dali", "pil")] == ["dali", "dali", "pil"]
    problem = "nvidia-dali: pip install 'stopfast[dali-cuda13]'"
    monkeypatch.setattr(loader_module, "dali_problem", lambda: problem)
    with pytest.warns(RuntimeWarning, match=r"so PIL decodes.*pip install"):
        assert resolve_loader("auto") == "pil"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_loader("pil") == "pil"
    with pytest.raises(ValueError, match=r"--data\.loader dali, got .*pip install"):
        # At once, not when the first batch is asked for.
        eval_batches(
            images,
            AUGMENTED,
            batch_size=2,
            device=CPU,
            data=loader_module.DataConfig(loader="dali"),
        )
