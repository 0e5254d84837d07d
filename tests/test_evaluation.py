"""Whole evaluations of small checkpoints on made photographs."""

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

from stopfast.checkpoint import CheckpointError, save_checkpoint
from stopfast.config import (
    Config,
    DataConfig,
    DegradeConfig,
    JepaConfig,
    MaskConfig,
    ModelConfig,
    ReconstructionConfig,
    Transforms,
    to_document,
)
from stopfast.evaluation import features, telling
from stopfast.evaluation.counting import CountingSettings
from stopfast.evaluation.evaluate import (
    EvaluationSettings,
    evaluate_checkpoint,
    evaluate_checkpoints,
    load_evaluation,
    print_evaluation,
    save_evaluation,
)
from stopfast.evaluation.features import Extraction
from stopfast.evaluation.probes import LinearSettings
from stopfast.evaluation.propagation import PropagationSettings
from stopfast.networks import build_encoder, build_predictor, seeded
from stopfast.report.results import evaluation_section
from tests.small_runs import write_checkpoint

CPU = torch.device("cpu")
CLASSES = ("blue", "green", "red")
SETTINGS = EvaluationSettings(
    extraction=Extraction(batch_size=16, loader="pil"),
    linear=LinearSettings(rates=(0.01, 0.1, 1.0), epochs=10),
    share=0.1,
    seeds=2,
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
        objective=JepaConfig(mask=MaskConfig(min_keep=1)),
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


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    """What is known of images that were looked at stays in the tests' folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


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


@pytest.mark.parametrize(
    ("probes", "pixels", "widths"),
    [
        (["knn"], True, {"raw pixels": 768, "untrained": 16, "trained": 16}),
        (["logistic", "linear"], False, {"untrained": 32, "trained": 32}),
    ],
)
def test_only_what_a_probe_needs_is_kept(probes, pixels, widths, photographs, runs, monkeypatch):
    kept = []
    gather = features.collect
    monkeypatch.setattr(features, "collect", lambda *a: kept.append(gather(*a)) or kept[-1])
    settings = replace(SETTINGS, pixels=pixels)
    found = evaluate_checkpoint(runs["a"], photographs, probes=probes, settings=settings)
    assert list(found.figures) == list(widths)
    for split in kept:
        assert {name: table.pooled.shape[1] for name, table in split.items()} == widths


def test_an_interrupted_evaluation_goes_on(photographs, runs, tmp_path, monkeypatch):
    """With a cache, a split that was done is not decoded again; a folder that is none is told first."""
    read, decoded = features.eval_batches, []

    def look(cache, stop=()):
        def batches(images, *rest, **named):
            decoded.append(images.root.name)
            if images.root.name in stop:
                raise InterruptedError
            return read(images, *rest, **named)

        monkeypatch.setattr(features, "eval_batches", batches)
        extraction = replace(SETTINGS.extraction, cache=cache)
        settings = replace(SETTINGS, extraction=extraction)
        return evaluate_checkpoint(runs["a"], photographs, probes=["knn"], settings=settings)

    with pytest.raises(InterruptedError):
        look(tmp_path / "cache", stop=["test"])
    assert look(tmp_path / "cache") == look(None)
    assert decoded == ["train", "test", "test", "train", "test"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        look(tmp_path / "file")
    assert len(decoded) == 5


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("long", [10, 1000])
def test_progress_on_terminals_where_there_is_much_to_do(
    terminal, long, photographs, runs, monkeypatch
):
    monkeypatch.setattr(telling, "_LONG", long)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    probes = ["knn", "propagation"]
    evaluate_checkpoint(runs["a"], photographs, probes=probes, settings=SETTINGS, console=console)
    shown = console.file.getvalue()
    for split, count in (("train", 60), ("test", 36)):
        bar = f"features of {photographs / split}" in shown and f"{count}/{count}" in shown
        assert bar == (terminal and long == 10)
    assert (terminal and "propagating labels" in shown and "trained: kNN" in shown) or not shown


def test_broken_images_are_refused_or_left_out_as_in_training(photographs, runs, tmp_path):
    """As the run was trained, or as it is asked; counted in both splits."""
    data = shutil.copytree(photographs, tmp_path / "data")
    for split in ("train", "test"):
        (data / split / "red" / "0.jpg").write_bytes(b"no image")
    skipping = config()
    skipping = replace(skipping, data=replace(skipping.data, broken="skip", max_broken=0.1))
    run = checkpoint(tmp_path / "skipping", skipping, 1)

    def look(run, console=None, **asked):
        settings = replace(SETTINGS, **asked)
        return evaluate_checkpoint(run, data, probes=["knn"], settings=settings, console=console)

    console = Console(file=io.StringIO(), width=200)
    found = look(run, console)
    assert (found.train_images, found.test_images) == (59, 35)
    assert console.file.getvalue().count("red/0.jpg") == 2
    assert (
        look(runs["a"], broken="skip", max_broken=0.1).figures["raw pixels"]
        == (found.figures["raw pixels"])
    )
    for refused, asked, told in (
        (runs["a"], {}, "can be decoded, got 1 of 60 images"),
        (run, {"broken": "refuse"}, "can be decoded, got 1 of 60 images"),
        (run, {"max_broken": 0.02}, "at most 2.00% broken images.* got 1 of 36 images"),
    ):
        with pytest.raises(ValueError, match=told):
            look(refused, **asked)


def test_whole_evaluation(photographs, runs, tmp_path):
    """All probes, three rows; the same twice; what is planted in pixels is found; saved and printed."""
    found = evaluate_checkpoint(runs["a"], photographs, settings=SETTINGS, device="cpu")
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
    assert found == evaluate_checkpoint(runs["a"], photographs, settings=SETTINGS, device="cpu")
    save_evaluation(found, tmp_path / "new" / "result.json")
    assert load_evaluation(tmp_path / "new" / "result.json") == found
    (tmp_path / "other.json").write_text("{}")
    for other in ("other.json", "absent.json"):
        with pytest.raises(ValueError, match=f"expected a file of evaluate --save, got .*{other}"):
            load_evaluation(tmp_path / other)
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
        "pre-training again with another seed would change is in none of these intervals",
    ):
        assert text in printed
    differences = evaluation_section(found).parts[-1]
    assert "another seed would change is in none of these intervals" in differences.caption


def test_test_labels_change_accuracies_and_no_choice(photographs, runs, tmp_path):
    """The images of two classes of the test split change places."""
    shutil.copytree(photographs, tmp_path / "data")
    test = tmp_path / "data" / "test"
    (test / "red").rename(test / "other")
    (test / "green").rename(test / "red")
    (test / "other").rename(test / "green")
    right, wrong = (
        evaluate_checkpoint(runs["a"], data, probes=["linear"], settings=SETTINGS)
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
    assert context.encoders == "encoder" and found.encoders == "target encoder"
    assert list(context.figures) == ["raw pixels", "untrained", "I-JEPA", "StoP"]
    assert context.figures["untrained"] == found.figures["untrained"]
    assert context.figures["I-JEPA"] != found.figures["a"]


def test_objectives_beside_each_other(photographs, runs, tmp_path):
    """An encoder with a class token and no teacher, and one of one channel, beside I-JEPA's."""
    small = config()
    gray = DegradeConfig(kind="decolorized", gray_channels=1)
    mae = replace(
        small,
        model=replace(small.model, class_token=True),
        objective=ReconstructionConfig(mask_ratio=0.5),
    )
    decolorized = replace(small, objective=ReconstructionConfig(mask_ratio=0.0, degrade=gray))
    named = {
        "I-JEPA": runs["a"],
        "MAE": write_checkpoint(tmp_path / "mae", mae),
        "gray": write_checkpoint(tmp_path / "gray", decolorized),
    }
    found = evaluate_checkpoints(named, photographs, probes=["knn"], settings=SETTINGS)
    assert found.untaught == ["MAE", "gray"]
    assert found.encoders == "target encoder (encoder, where there is no teacher)"
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(found, console)
    printed = console.file.getvalue()
    assert "I-JEPA: target encoder of" in printed and "MAE: encoder of" in printed
    again = evaluate_checkpoints(
        named, photographs, which="encoder", probes=["knn"], settings=SETTINGS
    )
    assert again.figures["MAE"] == found.figures["MAE"]


def test_drawn_pictures_need_no_data(runs):
    found = evaluate_checkpoint(runs["c"], None, probes=["propagation"], settings=SETTINGS)
    assert found.data is None and list(found.over) == ["propagation"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"probes": []}, r"expected probes among \['knn'"),
        ({"probes": ["knn", "svm"]}, r"got \['knn', 'svm'\]"),
        ({"data": None}, "(?i)a folder of images,? for .*knn, linear"),
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
    rest = {name: asked[name] for name in ("probes",) if name in asked}
    with pytest.raises((ValueError, CheckpointError), match=told):
        evaluate_checkpoints(chosen, data, **rest)
