"""Real photographs: DALI, PIL and torchvision show the same for the same draws.

Always on scikit-learn's two, cut and reduced to 24; where they are, also on every eighth of 334 that are
not in the repository. The bounds are the same.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from stopfast.config import DataConfig, Transforms
from stopfast.data.draws import random_draws
from stopfast.data.images import open_images
from stopfast.data.loader import eval_batches
from stopfast.data.pixels import cut, open_stored
from stopfast.data.scan import check_images
from stopfast.env import dali_problem
from tests.small_photographs import CPU, plan_for, train

PHOTOGRAPHS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "photos.tar"
EVERY = 8
TURNED = "turned.JPEG"

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="DALI is not installed")


def _write_shipped(root):
    """The two photographs (640 x 427) whole and in parts, each at three sizes."""
    for number, array in enumerate(load_sample_images().images):
        whole = Image.fromarray(array)
        width, height = whole.size
        boxes = {
            "whole": (0, 0, width, height),
            "left": (0, 0, width // 2, height),
            "middle": (width // 4, height // 4, 3 * width // 4, 3 * height // 4),
            "strip": (0, height // 3, width, 2 * height // 3),
        }
        for name, box in boxes.items():
            for reduction in (1, 2, 3):
                file = root / f"{number}-{name}-{reduction}.JPEG"
                whole.crop(box).reduce(reduction).save(file, quality=95)


def _write_tar(root):
    """Every eighth of the 334, so that it takes seconds."""
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        for member in members[::EVERY]:
            file = archive.extractfile(member)
            assert file is not None
            (root / member.name).write_bytes(file.read())


not_here = pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"no {PHOTOGRAPHS}")


@pytest.fixture(
    scope="module",
    params=[_write_shipped, pytest.param(_write_tar, marks=not_here)],
    ids=["2", "334"],
)
def photographs(tmp_path_factory, request):
    """Photographs as files, and the first again with an EXIF orientation."""
    root = tmp_path_factory.mktemp("photographs")
    request.param(root)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(min(root.iterdir())) as first:
        first.save(root / TURNED, "JPEG", quality="keep", exif=exif)
    return open_images(root)


def _difference(images, transforms):
    """Mean |DALI - PIL| of each photograph, of 255, by name."""
    plan = plan_for(images, transforms, len(images))
    ((ours,), (theirs,)) = (train(images, plan, loader, threads=2) for loader in ("pil", "dali"))
    assert torch.equal(ours.samples, theirs.samples)
    scale = torch.tensor(transforms.std)[:, None, None] * 255
    errors = ((ours.images - theirs.images) * scale).abs().mean((1, 2, 3))
    return dict(zip((images.names[s] for s in ours.samples), errors.tolist(), strict=True))


@needs_dali
@pytest.mark.parametrize(
    ("changes", "mean", "worst"),
    [
        ({}, 0.25, 0.3),
        ({"flip": 0.5, "gray": 1.0}, 0.35, 0.5),
        # PIL's blur is a sum of boxes and continues the last pixel, DALI's mirrors the image at its edge.
        ({"flip": 0.5, "gray": 0.2, "blur": 0.5}, 0.5, 2.0),
    ],
    ids=["crop", "gray", "all"],
)
def test_dali_agrees_with_pil(photographs, changes, mean, worst):
    errors = _difference(photographs, Transforms(**changes))
    assert sum(errors.values()) / len(errors) <= mean
    assert max(errors.values()) <= worst, max(errors, key=errors.__getitem__)
    assert errors[TURNED] <= worst


@needs_dali
def test_dali_agrees_with_pil_on_whole_photographs(photographs):
    """As evaluation sees them; a large reduction, so that antialiasing matters."""
    transforms = Transforms(size=(32, 32))
    shown = []
    for loader in ("pil", "dali"):
        data = DataConfig(loader=loader)
        batches = eval_batches(photographs, transforms, batch_size=16, device=CPU, data=data)
        shown.append(torch.cat([batch.images for batch in batches]))
    scale = torch.tensor(transforms.std)[:, None, None] * 255
    errors = ((shown[0] - shown[1]) * scale).abs().mean((1, 2, 3))
    # Where the triangle reaches over the edge, DALI repeats the last pixel and PIL cuts the triangle off:
    # at a reduction by ten that is much of a small image, and its outermost row only.
    assert errors.mean() <= 0.3 and errors.max() <= 1.0
    inner = ((shown[0] - shown[1]) * scale)[..., 1:-1, 1:-1].abs().mean((1, 2, 3))
    assert inner.max() <= 0.2


def test_pil_agrees_with_torchvision(photographs):
    """Crop and resize, flip and grayscale to the pixel: they are the same functions of PIL."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    size = (96, 128)
    for sample in range(0, len(photographs), 4):
        image = open_stored(photographs.read(sample))
        sizes = np.array([image.size[::-1]])
        transforms = Transforms(size=size, flip=0.5, gray=0.5)
        drawn = random_draws(1, 0, np.array([sample]), sizes, transforms)
        ours = torch.from_numpy(cut(image, drawn, 0, transforms).copy()).permute(2, 0, 1)
        (top, left), (height, width) = drawn.top_left[0].tolist(), drawn.size[0].tolist()
        raw = Image.open(io.BytesIO(photographs.read(sample))).convert("RGB")

        def finish(seen, drawn=drawn):
            seen = functional.hflip(seen) if drawn.flip[0] else seen
            return functional.rgb_to_grayscale(seen, 3) if drawn.gray[0] else seen

        theirs = finish(functional.resized_crop(raw, top, left, height, width, list(size)))
        assert torch.equal(ours, functional.pil_to_tensor(theirs))
        tensor = functional.resized_crop(
            functional.pil_to_tensor(raw), top, left, height, width, list(size), antialias=True
        )
        assert (ours.float() - finish(tensor).float()).abs().mean() <= 0.6


def test_photographs_are_good(photographs, tmp_path):
    assert not check_images(photographs, threads=2, cache=tmp_path).broken
