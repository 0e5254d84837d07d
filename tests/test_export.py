"""Exports load in the libraries that they are for and come back as they were."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from stopfast import load_published
from stopfast.config import NoiseConfig
from stopfast.export import export_run, import_encoder, load_encoder
from stopfast.export.safetensors import read_tensors
from stopfast.trained import load_trained
from tests.small_runs import (
    GRIDS,
    HEADS,
    TEACHERS,
    assert_same,
    hugging_face,
    images,
    settings,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_checkpoint(folder / name, settings(name)) for name in HEADS}


def in_timm(folder: Path):
    timm = pytest.importorskip("timm")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def in_transformers(folder: Path):
    transformers = hugging_face()
    load = transformers.IJepaModel.from_pretrained
    if json.loads((folder / "config.json").read_text())["model_type"] == "vit":
        load = partial(transformers.ViTModel.from_pretrained, add_pooling_layer=False)
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def timm_features(path: Path, x: torch.Tensor) -> torch.Tensor:
    model = in_timm(path)
    features = model.forward_features(x)
    patches = features[:, model.num_prefix_tokens :]
    assert_same(model(x), patches.mean(1))  # the pooled features of the published probes
    return features


READERS = {
    "safetensors": lambda path, x, _: load_encoder(path).tokens(x),
    "timm": lambda path, x, _: timm_features(path, x),
    "hf": lambda path, x, _: in_transformers(path)(x).last_hidden_state,
    "pth": lambda path, x, name: import_encoder(
        path, num_heads=HEADS[name], grid_size=GRIDS.get(name)
    ).tokens(x),
}


@pytest.mark.parametrize("which", ["target_encoder", "encoder"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("format", READERS)
def test_features_in_the_other_library_and_back(format, name, which, checkpoints, tmp_path):
    if format == "pth" and which == "encoder":
        pytest.skip("the file holds both; see test_published_file")
    output = tmp_path / "new" / "export"
    with pytest.MonkeyPatch.context() as patch:  # no library is needed to write its files
        for library in ("timm", "transformers"):
            patch.setitem(sys.modules, library, None)
        assert export_run(checkpoints[name], output, format=format, which=which) == output
    assert [p.name for p in output.parent.iterdir()] == ["export"]
    x = images(name)
    run = load_trained(checkpoints[name])
    with torch.no_grad():
        expected, other = run.encoder.tokens(x), run.target_encoder.tokens(x)
        if which == "target_encoder":
            expected, other = other, expected
        if name in TEACHERS:
            assert (expected - other).abs().max() > 0.1
        else:
            assert run.target_encoder is run.encoder
        assert_same(READERS[format](output, x, name), expected)
        if format != "pth":
            imported = import_encoder(output)
            assert_same(imported.tokens(x), expected)
            assert torch.equal(imported.pos_embed, run.chosen(which).pos_embed)


@pytest.mark.parametrize("name", TEACHERS)
def test_published_file(name, checkpoints, tmp_path):
    path = export_run(checkpoints[name], tmp_path / "a.pth.tar", format="pth")
    grid = GRIDS.get(name)
    loaded = load_published(path, variant="stop", num_heads=HEADS[name], grid_size=grid)
    run = load_trained(checkpoints[name])
    x, seed = images(name), torch.tensor([3, 4])
    context, targets = [torch.arange(5).expand(2, -1)], [torch.arange(9, 13).expand(2, -1)] * 2
    with torch.no_grad():
        for part in ("encoder", "target_encoder"):
            assert torch.equal(getattr(loaded, part)(x), getattr(run, part)(x))
        features = run.encoder(x, context)
        got = loaded.predictor(features, context, targets, seed=seed)
        assert torch.equal(got, run.predictor(features, context, targets, seed=seed))
        imported = import_encoder(path, which="encoder", num_heads=HEADS[name], grid_size=grid)
        assert torch.equal(imported(x), run.encoder(x))
    content = torch.load(path, weights_only=True)
    entries = {"encoder", "predictor", "target_encoder", "opt", "scaler", "epoch", "loss"}
    assert content.keys() == entries | {"batch_size", "world_size", "lr", "stopfast"}
    assert all(key.startswith("module.") for key in content["predictor"])


@pytest.mark.parametrize("format", ["safetensors", "timm", "hf"])
def test_metadata_say_what_it_is(format, checkpoints, tmp_path):
    output = export_run(checkpoints["wide"], tmp_path / "a", format=format, which="encoder")
    file = output if format == "safetensors" else output / "model.safetensors"
    metadata = read_tensors(file)[1]
    assert metadata["format"] == "pt"
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode  # others can read it, too
    assert (metadata["stopfast.which"], metadata["stopfast.step"]) == ("encoder", "7")
    config = json.loads(metadata["stopfast.config"])
    assert config["model"]["depth"] == 2 and config["run"]["seed"] == 5
    assert str(Path.home()) not in json.dumps(config)  # no place on the machine of the run


def test_preprocessing_goes_along(checkpoints, tmp_path):
    transforms = settings("square").data.transforms
    timm_data = pytest.importorskip("timm.data")
    model = in_timm(export_run(checkpoints["square"], tmp_path / "timm", format="timm"))
    data = timm_data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert (tuple(data["mean"]), tuple(data["std"])) == (transforms.mean, transforms.std)
    assert (data["crop_pct"], data["interpolation"]) == (0.8, "bilinear")
    transformers = hugging_face()
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    for name, size in (("square", (32, 32)), ("wide", (32, 48))):
        folder = export_run(checkpoints[name], tmp_path / name, format="hf")
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert tuple(pixels.shape) == (1, 3, *size)
        expected = (0.5 - torch.tensor(transforms.mean)) / torch.tensor(transforms.std)
        assert (pixels[0].mean((1, 2)) - expected).abs().max() < 0.1


@pytest.mark.parametrize(
    ("size", "patch", "image", "name"),
    [
        ("base", 16, 224, "vit_base_patch16_224"),
        ("huge", 14, 224, "vit_huge_patch14_gap_224"),
        ("huge", 16, 448, "vit_huge_patch16_gap_448"),
        ("giant", 16, 224, "vit_giant_patch16_gap_224"),
        ("large", 8, 64, "vit_base_patch16_224"),
    ],
)
def test_timm_name_and_arguments_of_published_sizes(size, patch, image, name, tmp_path):
    """On the meta device: every weight has its place and shape in timm's model of that name."""
    timm = pytest.importorskip("timm")
    from stopfast.export.timm import timm_config
    from stopfast.models import encoder_of_size

    with torch.device("meta"):
        encoder = encoder_of_size(size, patch, img_size=[image])
        config = timm_config(encoder, settings("square").data.transforms)
        assert config["architecture"] == name
        model = timm.create_model(name, num_classes=0, weight_init="skip", **config["model_args"])
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in encoder.state_dict().items()
    }
    assert model.blocks[0].attn.num_heads == encoder.num_heads


@pytest.mark.parametrize("format", ["safetensors", "timm", "hf", "pth"])
def test_an_export_appears_whole_or_not_at_all(format, checkpoints, tmp_path, monkeypatch):
    module = "torch.save" if format == "pth" else "stopfast.checkpoint.save_file"

    def dies(tensors, path, *_):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(module, dies)
        export_run(checkpoints["square"], tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="which exists"):
        export_run(checkpoints["square"], tmp_path / "a", format=format)
    assert (tmp_path / "a").read_text() == "mine"


def test_requests_that_cannot_be_met(checkpoints, tmp_path):
    untied = NoiseConfig(variant="stop", tie=False)
    paper = NoiseConfig(variant="stop_paper")
    for name, noise in (("untied", untied), ("paper", paper)):
        write_checkpoint(tmp_path / name, replace(settings("square"), noise=noise))
    for checkpoint, given, message in (
        (tmp_path / "untied", {"format": "pth"}, "tie=False"),
        (tmp_path / "paper", {"format": "pth"}, "stop_paper"),
        (checkpoints["square"], {"format": "onnx"}, "onnx"),
        (checkpoints["square"], {"format": "timm", "which": "teacher"}, "teacher"),
        (tmp_path / "absent", {"format": "timm"}, "expected a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            export_run(checkpoint, tmp_path / "a", **given)
        assert not (tmp_path / "a").exists()
