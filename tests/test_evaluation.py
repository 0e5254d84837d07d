"""Features of encoders, their cache, and whole evaluations of small checkpoints on made photographs."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from stopfast.build import build_encoder, build_predictor, seeded
from stopfast.checkpoint import CheckpointError, save_checkpoint
from stopfast.config import Config, DataConfig, ModelConfig, Transforms, to_document
from stopfast.data.images import open_images
from stopfast.evaluation import features
from stopfast.evaluation.counting import CountingSettings
from stopfast.evaluation.evaluate import (
    EvaluationSettings,
    evaluate_checkpoint,
    evaluate_checkpoints,
    print_evaluation,
    save_evaluation,
)
from stopfast.evaluation.features import (
    EncoderFeatures,
    Extraction,
    PixelFeatures,
    collect,
    extract,
)
from stopfast.evaluation.probes import LinearSettings
from stopfast.evaluation.propagation import PropagationSettings

CPU = torch.device("cpu")
CLASSES = ("blue", "green", "red")
SETTINGS = EvaluationSettings(
    extraction=Extraction(batch_size=16, loader="pil"),
    linear=LinearSettings(rates=(0.01, 0.1, 1.0), epochs=10),
    share=0.1,
    subsets=2,
    counting=CountingSettings(train=80, test=20),
    propagation=PropagationSettings(clips=2, frames=3),
)


def config(depth=2, seed=0, size=(16, 16)) -> Config:
    return Config(
        preset="test",
        data=DataConfig(transforms=Transforms(size=size)),
        model=ModelConfig(
            patch_size=4, embed_dim=16, depth=depth, num_heads=2, predictor_embed_dim=16, predictor_depth=1
        ),
    )  # fmt: skip


def checkpoint(folder: Path, settings: Config, seed: int) -> Path:
    """A run's folder with weights of two seeds for the two encoders."""
    state = {}
    for number, name in enumerate(("encoder", "target_encoder", "predictor")):
        build = build_predictor if name == "predictor" else build_encoder
        with seeded(100 * seed + number):
            state |= {f"{name}.{k}": v for k, v in build(settings).state_dict().items()}
    documents = {"config": to_document(settings), "state": {"step": 3}}
    save_checkpoint(folder / "step-0000003", {"model": state}, documents)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Three classes that differ in one colour, under noise; 20 training and 12 test images each."""
    root = tmp_path_factory.mktemp("photographs")
    draws = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        for channel, name in enumerate(reversed(CLASSES)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 180, (20, 20, 3))
                pixels[..., channel] += 50
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{number}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs ``a`` and ``b`` began with the same weights, ``c`` has another size of images."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "a": checkpoint(root / "a", config(), 1),
        "b": checkpoint(root / "b", config(), 2),
        "c": checkpoint(root / "c", config(size=(24, 24)), 1),
    }


@pytest.mark.parametrize(("depth", "levels"), [(2, 2), (6, 4)])
def test_pooled_features_are_the_last_four_blocks(depth, levels):
    """From the encoder's average over its last K blocks: K * mean_K - (K - 1) * mean_(K-1) is block -K."""
    encoder = build_encoder(config(depth)).eval()
    torch.nn.init.normal_(encoder.norm.weight)
    source, images = EncoderFeatures(encoder), torch.randn(3, 3, 16, 16)
    seen = source(images)
    assert source.levels == levels and seen.pooled.shape == (3, levels * 16)
    with torch.no_grad():
        means = [0, *(encoder(images, K=k) * k for k in range(1, levels + 1))]
        blocks = [means[k] - means[k - 1] for k in range(levels, 0, -1)]
        expected = torch.cat([block.mean(1) for block in blocks], dim=1)
        assert torch.allclose(seen.pooled, expected, atol=1e-5)
        assert torch.equal(seen.patches, encoder(images))
    assert not any(block._forward_hooks for block in encoder.blocks)
    half = EncoderFeatures(encoder, "bf16")(images).pooled
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
    images = open_images(photographs / "test")
    sources = {
        "encoder": EncoderFeatures(build_encoder(config()).eval()),
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
    second = look()
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
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".safetensors"]


def test_whole_evaluation(photographs, runs, tmp_path):
    """All probes, three rows; the same twice; what is planted in pixels is found; saved and printed."""
    found = evaluate_checkpoint(runs["a"], photographs, settings=SETTINGS, seeds=2, device="cpu")
    assert list(found.figures) == ["raw pixels", "untrained", "trained"]
    assert list(found.differences) == ["trained less untrained"]
    assert (found.train_images, found.test_images, found.labelled_images) == (60, 36, 6)
    everything = [
        "knn",
        "linear",
        "linear_last4",
        "logistic",
        "counting",
        "location",
        "propagation",
    ]
    assert list(found.figures["trained"]) == everything == list(found.over)
    assert set(found.figures["raw pixels"]) == set(everything) - {"linear_last4"}
    assert found.figures["raw pixels"]["linear"].value > 0.8
    for by in (*found.figures.values(), *found.differences.values()):
        assert all(figure.low <= figure.value <= figure.high for figure in by.values())
    for measure, gain in found.differences["trained less untrained"].items():
        figures = [found.figures[name][measure].value for name in ("trained", "untrained")]
        assert gain.value == pytest.approx(figures[0] - figures[1])
    assert {len(rates) for by in found.rates.values() for rates in by.values()} == {2}
    assert found == evaluate_checkpoint(
        runs["a"], photographs, settings=SETTINGS, seeds=2, device="cpu"
    )
    save_evaluation(found, tmp_path / "new" / "result.json")
    saved = json.loads((tmp_path / "new" / "result.json").read_text())
    assert saved["which"] == "target_encoder"
    assert saved["figures"]["trained"]["knn"]["value"] == found.figures["trained"]["knn"].value
    console = Console(file=io.StringIO(), width=100)
    print_evaluation(found, console)
    printed = console.file.getvalue()
    value = 100 * found.figures["trained"]["knn"].value
    for text in (
        "target encoder of",
        "step-0000003",
        "6 labels",
        "36 test images",
        f"{value:.1f} % ±",
    ):
        assert text in printed


def test_test_labels_change_accuracies_and_no_choice(photographs, runs, tmp_path):
    """The images of two classes of the test split change places."""
    shutil.copytree(photographs, tmp_path / "data")
    test = tmp_path / "data" / "test"
    (test / "red").rename(test / "other")
    (test / "green").rename(test / "red")
    (test / "other").rename(test / "green")
    right, wrong = (
        evaluate_checkpoint(runs["a"], data, probes=["linear"], seeds=2, settings=SETTINGS)
        for data in (photographs, tmp_path / "data")
    )
    assert right.rates == wrong.rates
    assert right.figures["raw pixels"]["linear"].value > 0.8
    assert wrong.figures["raw pixels"]["linear"].value < 0.5


def test_several_checkpoints_in_one_table(photographs, runs):
    """Shared beginnings are one row; the encoder that is asked for is the one that is looked at."""
    both = [runs["a"] / "step-0000003", runs["b"]]
    probes = ["knn", "propagation"]
    found = evaluate_checkpoints(both, photographs, probes=probes, settings=SETTINGS)
    assert list(found.figures) == ["raw pixels", "untrained", "a", "b"]
    assert list(found.differences) == ["a less untrained", "b less untrained", "b less a"]
    assert list(found.over) == probes
    named = {"I-JEPA": runs["a"], "StoP": runs["b"]}
    context = evaluate_checkpoints(
        named, photographs, which="encoder", probes=probes, settings=SETTINGS
    )
    assert context.which == "encoder"
    assert list(context.figures) == ["raw pixels", "untrained", "I-JEPA", "StoP"]
    assert context.figures["untrained"] == found.figures["untrained"]
    assert context.figures["I-JEPA"] != found.figures["a"]


def test_drawn_pictures_need_no_data(runs):
    found = evaluate_checkpoint(runs["c"], None, probes=["propagation"], settings=SETTINGS)
    assert found.data is None and list(found.over) == ["propagation"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"probes": []}, r"expected probes among \['knn'"),
        ({"probes": ["knn", "svm"]}, r"got \['knn', 'svm'\]"),
        ({"seeds": 0}, "seeds >= 1, got 0"),
        ({"data": None}, "expected a folder of images for kNN"),
        ({"data": "train"}, "val/ or test/.* got one set of images"),
        ({"runs": []}, "expected checkpoints"),
        ({"runs": ["a", "a"]}, "each checkpoint once"),
        ({"runs": ["a", "c"]}, "one size, center, mean and std"),
        ({"runs": ["absent"]}, "absent"),
        ({"names": ["raw pixels"]}, "names other than 'raw pixels'"),
    ],
)
def test_bad_input_is_refused(asked, told, photographs, runs, tmp_path):
    chosen = [runs.get(name, tmp_path / name) for name in asked.get("runs", ["a"])]
    if "names" in asked:
        chosen = dict(zip(asked["names"], chosen, strict=True))
    data = {"train": photographs / "train", "": photographs, None: None}[asked.get("data", "")]
    rest = {name: asked[name] for name in ("probes", "seeds") if name in asked}
    with pytest.raises((ValueError, CheckpointError), match=told):
        evaluate_checkpoints(chosen, data, **rest)
