"""Features of encoders and of raw pixels, and their cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stopfast.config import Config, DataConfig, ModelConfig, Transforms
from stopfast.data.images import open_images
from stopfast.encoder import VisionTransformer
from stopfast.evaluation import features
from stopfast.evaluation.features import (
    EncoderFeatures,
    Extraction,
    PixelFeatures,
    collect,
    extract,
)
from stopfast.networks import build_encoder

CPU = torch.device("cpu")


def interrupted(*_, **__):
    raise InterruptedError


def encoder(depth=2, class_token=False) -> VisionTransformer:
    model = ModelConfig(
        patch_size=4, embed_dim=16, depth=depth, num_heads=2, class_token=class_token
    )
    return build_encoder(
        Config(preset="test", model=model, data=DataConfig(transforms=Transforms(size=(16, 16))))
    ).eval()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """36 images of noise."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(36):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.jpg")
    return root


@pytest.mark.parametrize(
    ("depth", "levels", "class_token"), [(2, 2, False), (6, 4, False), (6, 4, True)]
)
def test_pooled_features_are_the_last_four_blocks(depth, levels, class_token):
    """From the encoder's average over its last K blocks: K * mean_K - (K - 1) * mean_(K-1) is block -K."""
    model = encoder(depth, class_token)
    torch.nn.init.normal_(model.norm.weight)
    source, images = EncoderFeatures(model), torch.randn(3, 3, 16, 16)
    seen = source(images)
    assert source.levels == levels and seen.pooled.shape == (3, levels * 16)
    with torch.no_grad():
        means = [0, *(model(images, K=k) * k for k in range(1, levels + 1))]
        blocks = [means[k] - means[k - 1] for k in range(levels, 0, -1)]
        expected = torch.cat([block.mean(1) for block in blocks], dim=1)
        assert torch.allclose(seen.pooled, expected, atol=1e-5)
        assert torch.equal(seen.patches, model(images))
    assert not any(block._forward_hooks for block in model.blocks)
    half = EncoderFeatures(model, "bf16")(images).pooled
    assert half.dtype == torch.float32 and not torch.equal(half, seen.pooled)
    assert torch.allclose(half, seen.pooled, atol=0.1)


def test_raw_pixels_are_at_most_32_a_side_and_patches_are_in_raster_order():
    images = torch.randn(2, 3, 64, 96)
    seen = PixelFeatures(16)(images)
    cells = images.unfold(2, 2, 2).unfold(3, 3, 3).mean((4, 5))
    assert torch.allclose(seen.pooled, cells.flatten(1), atol=1e-6)
    assert torch.equal(seen.patches[1, 7], images[1, :, 16:32, 16:32].flatten())
    small = torch.randn(2, 3, 8, 8)
    assert torch.equal(PixelFeatures(4)(small).pooled, small.flatten(1))
    sources = {"pixels": PixelFeatures(4)}
    with pytest.raises(ValueError, match="expected 5 images, got 4"):
        collect(sources, [small, small], 5)
    with pytest.raises(ValueError, match="expected finite features, got others from pixels"):
        collect(sources, [small, small / 0], 4)


def test_cached_features_are_read_and_only_for_the_same_question(
    photographs, tmp_path, monkeypatch
):
    """A second look decodes nothing; other weights, images, transforms, precision are another question."""
    images = open_images(photographs)
    sources = {
        "encoder": EncoderFeatures(encoder()),
        "pixels": PixelFeatures(4),
    }
    names = {"encoder": "weights", "pixels": "pixels"}
    transforms = Transforms(size=(16, 16))
    cached = Extraction(loader="pil", cache=tmp_path / "cache", batch_size=10)

    def look(images=images, transforms=transforms, extraction=cached, names=names):
        return extract(sources, images, transforms, CPU, extraction, names)

    first = look()
    decoded = []
    read = features.eval_batches
    monkeypatch.setattr(
        features, "eval_batches", lambda *a, **k: decoded.append(1) or read(*a, **k)
    )
    # Not the word "auto" is part of the question, but which decoder it comes to.
    monkeypatch.setattr(
        features, "resolve_loader", lambda loader: {"auto": "pil"}.get(loader, loader)
    )
    second = look(extraction=replace(cached, loader="auto"))
    assert not decoded
    for name in sources:
        assert torch.equal(first[name].pooled, second[name].pooled)
        assert first[name].levels == second[name].levels
    fresh = look(extraction=replace(cached, cache=None, batch_size=36))
    assert torch.allclose(fresh["encoder"].pooled, first["encoder"].pooled, atol=1e-6)
    others = [
        {"images": images.subset(range(12))},
        {"transforms": replace(transforms, center=0.5)},
        {"extraction": replace(cached, precision="bf16")},
        {"names": {**names, "encoder": "other weights"}},
    ]
    for number, other in enumerate(others, start=2):
        look(**other)
        assert len(decoded) == number
    monkeypatch.setattr(features, "resolve_loader", lambda loader: "dali")
    monkeypatch.setattr(features, "eval_batches", interrupted)
    with pytest.raises(InterruptedError):
        look(extraction=replace(cached, loader="auto"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".safetensors"]


def test_fewer_levels_are_kept_and_read(photographs, tmp_path, monkeypatch):
    """The last level of four serves who asks for it alone; the other way round is computed."""
    images, transforms = open_images(photographs), Transforms(size=(16, 16))
    model = encoder(6)

    def look(cache, levels):
        sources = {"encoder": EncoderFeatures(model, last_blocks=levels)}
        extraction = Extraction(loader="pil", cache=tmp_path / cache)
        return extract(sources, images, transforms, CPU, extraction, {"encoder": "it"})["encoder"]

    last, four = look("first", 1), look("second", 4)
    assert last.pooled.shape == (36, 16) and four.pooled.shape == (36, 64)
    assert torch.equal(last.pooled, four.last)
    assert torch.equal(look("first", 4).pooled, four.pooled)
    monkeypatch.setattr(features, "eval_batches", interrupted)
    for cache in ("first", "second"):
        assert torch.equal(look(cache, 1).pooled, last.pooled)
        assert torch.equal(look(cache, 2).pooled, four.pooled[:, 32:])
