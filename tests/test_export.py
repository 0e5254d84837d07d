"""Exports load in the libraries that they are for, and imports compute what their sources compute."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stopfast import VisionTransformer, load_published
from stopfast.build import build_objective
from stopfast.checkpoint import CheckpointError, save_checkpoint
from stopfast.config import (
    DataConfig,
    DegradeConfig,
    DropPosConfig,
    ModelConfig,
    MonitorConfig,
    NoiseConfig,
    ReconstructionConfig,
    RunConfig,
    Transforms,
    to_document,
)
from stopfast.export import export_run, import_encoder, load_encoder
from stopfast.export.safetensors import read_tensors
from stopfast.networks import seeded
from stopfast.presets import demo
from stopfast.trained import load_trained

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
HEADS = {"square": 4, "wide": 2, "token": 4, "gray": 4}
GRIDS = {"wide": (4, 6), "gray": (8, 8)}
TEACHERS = ("square", "wide")


def settings(name: str):
    """The demo's size; an image that is not square, a head of 24 channels, an odd hidden width; an encoder
    with a class token; one without biases of keys, that sees one channel and numbers its patches."""
    model = ModelConfig(
        patch_size=4,
        embed_dim=96,
        depth=2,
        num_heads=4,
        predictor_embed_dim=48,
        predictor_depth=1,
    )
    size = (32, 32)
    if name == "wide":
        model = replace(model, patch_size=8, embed_dim=48, num_heads=2, mlp_ratio=48 / 11)
        size = (32, 48)
    objective, noise = demo().objective, NoiseConfig(variant="stop")
    if name == "token":
        model, noise = replace(model, class_token=True), NoiseConfig()
        objective = DropPosConfig(multi_task=True)
    elif name == "gray":
        model = replace(model, positions="1d", qkv_bias="qv", predictor_embed_bias=False)
        degrade = DegradeConfig(kind="decolorized", gray_channels=1)
        objective, noise = ReconstructionConfig(mask_ratio=0.0, degrade=degrade), NoiseConfig()
    transforms = Transforms(size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), center=0.8)
    here = Path.home() / "mine"
    return replace(
        demo(),
        model=model,
        data=DataConfig(transforms=transforms, root=here),
        noise=noise,
        objective=objective,
        monitor=MonitorConfig(labelled=here),
        run=RunConfig(output=here, seed=5),
    )


def write_checkpoint(folder: Path, config, seed: int = 1) -> Path:
    """A checkpoint whose networks have random weights in every place, all different."""
    weights = {}
    numbered = config.model.positions == "1d"
    with seeded(seed):
        for name, network in build_objective(config, steps_per_epoch=1).modules().items():
            for key, value in network.state_dict().items():
                fixed = key == "predictor_pos_embed" or (numbered and key == "pos_embed")
                noise = 0 if fixed else 0.05 * torch.randn_like(value)
                weights[f"{name}.{key}"] = value + noise
    state = {"step": 7, "optimizer": {}}
    save_checkpoint(folder, {"model": weights}, {"config": to_document(config), "state": state})
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_checkpoint(folder / name, settings(name)) for name in HEADS}


def images(name: str) -> torch.Tensor:
    return torch.randn(2, 3, *settings(name).data.transforms.size)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()


def in_timm(folder: Path):
    timm = pytest.importorskip("timm")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def hugging_face():
    """transformers, imported where this repository's folder ``kernels`` does not pass for theirs."""
    elsewhere = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", elsewhere)
        transformers = pytest.importorskip("transformers")
        assert transformers.IJepaModel and transformers.AutoImageProcessor  # loaded on first use
    return transformers


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


def test_models_of_other_libraries(tmp_path):
    """Fresh models with tables of positions that are learned: kept as they are."""
    timm, transformers = pytest.importorskip("timm"), hugging_face()
    arguments = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
    model = timm.models.VisionTransformer(
        **arguments, class_token=False, global_pool="avg", fc_norm=False, num_classes=0
    ).eval()
    token = timm.models.VisionTransformer(**arguments, class_token=True, num_classes=0).eval()
    config = transformers.IJepaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=100,
        image_size=[16, 24],
        patch_size=4,
        layer_norm_eps=1e-3,
        qkv_bias=False,
    )
    hugging = transformers.IJepaModel(config).eval()
    hugging.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    x = torch.randn(2, 3, 16, 24)
    half = {"num_heads": 2, "grid_size": (4, 6)}
    with torch.no_grad():
        for source, given in (
            (model, {}),
            (model.state_dict(), half),
            (tmp_path / "timm.pth", half),
        ):
            assert_same(import_encoder(source, **given)(x), model.forward_features(x))
        assert torch.equal(import_encoder(model).pos_embed, model.pos_embed)
        assert_same(import_encoder(token).tokens(x), token.forward_features(x))
        told = {"num_heads": 3, "grid_size": (4, 6), "norm_eps": 1e-3}
        for source, given in (
            (hugging, {}),
            (tmp_path / "hf", {}),
            (hugging.state_dict(), told),
        ):
            assert_same(import_encoder(source, **given)(x), hugging(x).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": True, "no_embed_class": True}, r"pos_embed \(1, 16, 48\) instead"),
        ({"reg_tokens": 2}, "unknown: reg_token"),
        ({"init_values": 0.1}, r"unknown: blocks\.\*\.ls1\.gamma, blocks\.\*\.ls2\.gamma"),
        ({"qk_norm": True}, r"unknown: blocks\.\*\.attn\.k_norm"),
        ({"fc_norm": True}, "unknown: fc_norm"),
        ({"num_classes": 10}, r"unknown: head\.bias, head\.weight"),
        ({"pos_embed": "none"}, "missing: pos_embed"),
        ({"act_layer": "gelu_tanh"}, "computes something else"),
        ({"norm_layer": "rmsnorm"}, r"missing: .*norm\.bias"),
    ],
)
def test_what_our_encoder_does_not_have_is_refused_by_name(changes, message):
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
    arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    with pytest.raises(CheckpointError, match=message):
        import_encoder(timm.models.VisionTransformer(**{**arguments, **changes}))


STATE = VisionTransformer(
    img_size=[16], patch_size=4, embed_dim=24, depth=1, num_heads=2
).state_dict()


@pytest.mark.parametrize(
    ("change", "given", "error", "message"),
    [
        ({"norm.weight": None}, {}, CheckpointError, r"missing: norm\.weight"),
        ({"patch_embed.proj.weight": None}, {}, CheckpointError, "missing: patch_embed"),
        ({"norm.bias": torch.ones(3)}, {}, CheckpointError, r"norm\.bias \(3,\)"),
        ({"patch_embed.proj.weight": torch.ones(24, 48)}, {}, CheckpointError, r"\(24, 48\)"),
        ({"epoch": 3}, {}, CheckpointError, "epoch"),
        ({}, {"num_heads": None}, ValueError, "num_heads"),
        ({}, {"grid_size": (2, 7)}, CheckpointError, "pos_embed"),
    ],
)
def test_state_that_does_not_fit(change, given, error, message):
    state = {k: v for k, v in {**STATE, **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        import_encoder(state, **{"num_heads": 2, **given})


def test_files_that_cannot_be_imported(checkpoints, tmp_path):
    hf = export_run(checkpoints["square"], tmp_path / "hf", format="hf")
    config = json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    (tmp_path / "cut").write_bytes((hf / "model.safetensors").read_bytes()[:-8])
    foreign = dict(tensors)
    save_file(foreign, tmp_path / "foreign")
    cases = [
        (lambda: import_encoder(tmp_path / "cut"), "expected a safetensors file"),
        (lambda: load_encoder(tmp_path / "foreign"), "stopfast.encoder"),
        (lambda: import_encoder(tmp_path), "config.json"),
        (lambda: import_encoder(hf, num_heads=6), "num_heads=4"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for key, message in (
        ("embeddings.mask_token", "unknown: embeddings.mask_token"),
        ("encoder.layer.0.attention.attention.key.bias", "missing for blocks.0.attn.qkv.bias"),
    ):
        changed = {k: v for k, v in tensors.items() if k != key}
        if key not in tensors:
            changed[key] = torch.ones(1, 1, 96)
        save_file(changed, hf / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            import_encoder(hf)
    for change, message in (({"hidden_act": "relu"}, "relu"), ({"model_type": "bert"}, "bert")):
        (hf / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            import_encoder(hf)
    timm = export_run(checkpoints["square"], tmp_path / "timm", format="timm")
    document = json.loads((timm / "config.json").read_text())
    document["model_args"]["act_layer"] = "quick_gelu"
    (timm / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="act_layer"):
        import_encoder(timm)


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
