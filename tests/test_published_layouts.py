"""Files of the published DropPos, MAE and Beyond Masking programs, read and written."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast import import_encoder, load_published, load_published_objective
from stopfast.checkpoint import CheckpointError
from stopfast.config import Config, NoiseConfig
from stopfast.export import export_run
from stopfast.objectives.droppos import DropPosDraws
from stopfast.objectives.reconstruction import ReconstructionDraws
from stopfast.presets import PRESETS
from stopfast.published_layouts import to_published, told_layout
from stopfast.random_masks import ranked
from stopfast.trained import load_trained
from tests.golden_files import TOLERANCE, golden, under
from tests.small_runs import settings, write_checkpoint

State = dict[str, Tensor]
FILES = {
    "droppos": "droppos-vit-b16",
    "droppos_multitask": "droppos-vit-b16",
    "beyond_zoomed-in_mask0.75": "beyond-zoomed-in-mask",
    "beyond_zoomed-out_mask0.75": "beyond-zoomed-out",
}
_TOP = {
    "encoder": "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias",
    "decoder": "mask_token decoder_pos_embed decoder_embed.weight decoder_embed.bias "
    "decoder_norm.weight decoder_norm.bias decoder_pred.weight decoder_pred.bias",
}
_BLOCK = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2"


def mae_names(depth: int, decoder_depth: int) -> set[str]:
    """Of the published MAE, written out: there is no golden file of it."""
    names = set(" ".join(_TOP.values()).split())
    for prefix, count in (("blocks", depth), ("decoder_blocks", decoder_depth)):
        for number in range(count):
            for part in _BLOCK.split():
                names |= {f"{prefix}.{number}.{part}.{kind}" for kind in ("weight", "bias")}
    return names


def golden_case(name: str) -> tuple[State, dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The state of a file, what its loading has to be told, its settings, and all its tensors."""
    case, tensors = golden(name)
    config = PRESETS[FILES[name]]()
    objective = replace(config.objective, mask_ratio=case["mask_ratio"])
    beyond = name.startswith("beyond")
    if not beyond:
        objective = replace(objective, sigma=case["sigma"], smoothing_grid="corrected")
    given = {
        "config": replace(config, objective=objective),
        "num_heads": case["encoder_num_heads" if beyond else "num_heads"],
        "decoder_num_heads": case["decoder_num_heads"],
    }
    return under(tensors, "state."), given, case, tensors


def small_config(preset: str) -> Config:
    """A published preset whose networks are small, and of the sizes that weights have to tell."""
    config = PRESETS[preset]()
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2.5}
    narrow = {"predictor_embed_dim": 32, "predictor_depth": 1, "predictor_num_heads": 4}
    return replace(config, model=replace(config.model, **sizes, **narrow))


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def modules_of(objective: Any) -> dict[str, State]:
    return {name: module.state_dict() for name, module in objective.modules().items()}


@pytest.mark.parametrize("name", FILES)
def test_golden_states_come_back_as_they_were_and_give_the_published_loss(name, tmp_path):
    state, given, case, tensors = golden_case(name)
    wrapped = {f"module.{key}": value for key, value in state.items()}
    arguments = Namespace(model="small", lr=0.1)  # of a command line, as such programs save them
    torch.save({"model": wrapped, "epoch": 3, "args": arguments}, tmp_path / "a.pth")
    loaded = load_published_objective(tmp_path / "a.pth", **given)
    assert loaded.epoch == 3
    assert_equal(
        {**to_published(loaded.layout, modules_of(loaded.objective)), **loaded.unread}, state
    )
    assert loaded.unread.keys() == ({"encoder.cls_token"} if "zoomed-in" in name else set())
    objective: Any = loaded.objective
    seed, ids = torch.tensor([0, 1]), torch.arange(2)
    if loaded.layout == "droppos":
        images = tensors["imgs"]
        orders = [ranked(tensors[f"uniform.{number}"]) for number in (0, 1)]
        sigma = torch.tensor(case["sigma"])
        draws = DropPosDraws(*orders, sigma, seed, torch.arange(3))
        expected = tensors["loss_position"]
        if "loss_mae" in tensors:
            expected = 0.05 * expected + tensors["loss_mae"]
    else:
        images = tensors["image_288" if "zoomed-in" in name else "image_160"]
        shift = torch.tensor([case["left"], case["top"]]) if "left" in case else None
        draws = ReconstructionDraws(ranked(tensors["uniform.0"]), shift, seed, ids)
        expected = tensors.get("loss")
        if expected is None:
            expected = 0.8 * tensors["loss_center"] + 0.2 * tensors["loss_edge"]
    assert relative_error(objective.loss(images, draws), expected) < TOLERANCE


@pytest.mark.parametrize(
    "preset",
    ["mae-vit-b16", "droppos-vit-b16", "beyond-decolorized", "beyond-zoomed-in", "beyond-blurred"],
)
def test_exported_runs_have_the_published_names_and_load_again(preset, tmp_path):
    config = small_config(preset)
    run = load_trained(write_checkpoint(tmp_path / "run", config))
    path = export_run(tmp_path / "run", tmp_path / "a.pth", format="pth")
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"model", "stopfast"} and content["stopfast"]["step"] == 7
    state = content["model"]
    if preset == "mae-vit-b16":
        assert state.keys() == mae_names(3, 1)
    if preset.startswith("beyond"):
        assert not any("pos_embed" in key for key in state)
        assert ("encoder.cls_token" in state) == (preset == "beyond-zoomed-in")
    told = {"config": PRESETS[preset]()} if preset == "beyond-blurred" else {}
    heads = {"num_heads": 3, "decoder_num_heads": 4}
    loaded = load_published_objective(path, **told, **heads)
    own, other = modules_of(loaded.objective), modules_of(run.objective)
    assert own.keys() == other.keys()
    for name in own:
        assert_equal(own[name], other[name])
    assert loaded.config.model == config.model
    assert loaded.config.data.transforms.size == (224, 224)
    images = torch.randn(2, 3, 224, 224)
    encoder_alone = {"model": {k: v for k, v in state.items() if not k.startswith("decoder")}}
    with torch.no_grad():
        expected = run.encoder.tokens(images)
        assert torch.equal(import_encoder(path, num_heads=3).tokens(images), expected)
        if preset == "mae-vit-b16":
            del encoder_alone["model"]["mask_token"]
            torch.save(encoder_alone, tmp_path / "encoder.pth")
            imported = import_encoder(tmp_path / "encoder.pth", num_heads=3)
            assert torch.equal(imported.tokens(images), expected)
            with pytest.raises(CheckpointError, match="import_encoder reads encoders"):
                load_published_objective(tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="load_published_objective"):
        load_published(path, variant="ijepa")


@pytest.mark.parametrize(
    ("name", "change", "told", "message"),
    [
        ("droppos", {"decoder_pred.bias": None}, {}, "missing: decoder_pred.bias"),
        ("droppos", {"blocks.1.mlp.fc1.bias": None}, {}, "missing: blocks.1.mlp.fc1.bias"),
        ("droppos", {"decoder_embed.weight": None}, {}, "missing: decoder_embed.weight"),
        ("droppos", {"fc_norm.weight": torch.ones(48)}, {}, "unknown: fc_norm.weight"),
        ("droppos", {"norm.bias": torch.ones(3)}, {}, r"norm.bias \(3,\) instead of \(48,\)"),
        ("droppos", {"mask_pos_token": None}, {}, "import_encoder reads encoders"),
        ("droppos", {"args": 3}, {}, r"got other entries \['args'\]"),
        ("droppos", {}, {"decoder_num_heads": None}, "decoder of width 32"),
        ("droppos", {}, {"num_heads": None}, "num_heads for a width of 48"),
        ("droppos", {}, {"config": PRESETS["mae-vit-b16"]()}, "got 'reconstruction'"),
        (
            "droppos_multitask",
            {"aux_decoder_norm.bias": None},
            {},
            "missing: aux_decoder_norm.bias",
        ),
        (
            "beyond_zoomed-out_mask0.75",
            {"encoder.blocks.0.attn.v_bias": None},
            {},
            r"missing: encoder\.blocks\.0\.attn\.v_bias",
        ),
        ("beyond_zoomed-out_mask0.75", {}, {"config": None}, "do not tell which"),
        (
            "beyond_zoomed-out_mask0.75",
            {"encoder.pos_embed": torch.ones(1, 196, 24)},
            {},
            "unknown: encoder.pos_embed",
        ),
    ],
)
def test_files_that_do_not_fit(name, change, told, message, tmp_path):
    state, given, *_ = golden_case(name)
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_published_objective(tmp_path / "a.pth", **{**given, **told})


@pytest.mark.parametrize("name", FILES)
def test_encoders_alone_and_beside_what_nobody_knows(name):
    state, given, *_ = golden_case(name)
    heads = given["num_heads"]
    decoders = ("decoder", "aux_decoder", "mask_", "encoder_to_decoder")
    alone = {key: value for key, value in state.items() if not key.startswith(decoders)}
    assert_equal(
        import_encoder(alone, num_heads=heads).state_dict(),
        import_encoder(state, num_heads=heads).state_dict(),
    )
    with pytest.raises(CheckpointError, match="unknown: registers"):
        import_encoder({**state, "registers": torch.ones(3)}, num_heads=heads)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("beyond-zoomed-in-demo", {}, r"unknown: .*blocks\.0\.attn\.qkv\.bias"),
        ("mae-demo", {"noise": NoiseConfig(variant="stop_paper")}, "predictor_embed.bias"),
        ("mae-demo", {"noise": NoiseConfig(variant="stop", tie=False)}, "noise_embed"),
    ],
)
def test_runs_that_no_published_program_could_load(preset, change, message, tmp_path):
    write_checkpoint(tmp_path / "run", replace(PRESETS[preset](), **change))
    with pytest.raises(ValueError, match=message):
        export_run(tmp_path / "run", tmp_path / "a.pth", format="pth")
    assert not (tmp_path / "a.pth").exists()


def test_other_tables_than_the_computed_one_are_not_dropped(tmp_path):
    """Positions that a Beyond Masking file does not hold would come back as others."""
    checkpoint: Path = write_checkpoint(tmp_path / "run", settings("gray"))
    run = load_trained(checkpoint)
    states = modules_of(run.objective)
    state = to_published("beyond", states)
    assert told_layout(state) == "beyond" and not any("pos_embed" in key for key in state)
    states["encoder"]["pos_embed"] = states["encoder"]["pos_embed"].flip(1)
    with pytest.raises(ValueError, match=r"encoder\.pos_embed"):
        to_published("beyond", states)
