"""A dozen small photographs, made here, and tars of them."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image

from stopfast.config import DataConfig
from stopfast.data.loader import TrainPlan, eval_batches, train_batches

CPU = torch.device("cpu")
COUNT = 12
TURNED = 4
"""The one with an EXIF orientation."""


def pixels(number):
    """Smooth but for stripes of a few pixels, which a resize without antialiasing turns into others."""
    height, width = 40 + 3 * number, 64 - 2 * number
    row, column = np.mgrid[0:height, 0:width] / 64
    waves = [np.sin(3 * row + number), np.cos(4 * column), np.sin(2 * (row + column))]
    stripes = 40 * np.sin(64 * (row + 2 * column) * 0.9)
    return np.stack([127 + 80 * wave + stripes for wave in waves], axis=-1).astype(np.uint8)


def encode(image, kind, **settings):
    """The bytes of an image in one of PIL's formats."""
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def write_photographs(root):
    """Three classes of four files each, JPEG and PNG, of several sizes."""
    for number in range(COUNT):
        exif = Image.Exif()
        if number == TURNED:
            exif[0x0112] = 6
        kind, ending = ("PNG", "png") if number % 5 == 3 else ("JPEG", "jpg")
        data = encode(Image.fromarray(pixels(number)), kind, quality=95, exif=exif)
        folder = root / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.{ending}").write_bytes(data)
    return root


def write_tar(path, members, kind="w"):
    """A tar of (name, bytes), where a name alone is a link to nowhere."""
    with tarfile.open(path, kind) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
            else:
                member.size = len(data)
            archive.addfile(member, None if data is None else io.BytesIO(data))
    return path


def train(images, plan, loader, steps=(1, 1), threads=1):
    """The batches of these steps, first and last, on the CPU."""
    first, last = steps
    data = DataConfig(loader=loader, threads=threads)
    batches = train_batches(images, plan, first_step=first, last_step=last, device=CPU, data=data)
    return list(batches)


def evaluate(images, transforms, loader, batch_size=5):
    """Every image once, on the CPU."""
    data = DataConfig(loader=loader, threads=1)
    return list(eval_batches(images, transforms, batch_size=batch_size, device=CPU, data=data))


def plan_for(images, transforms, batch_size, seed=7):
    """A plan over all images."""
    return TrainPlan(len(images), batch_size, transforms, seed)
