"""Imports compute what their sources compute, and what our encoder does not have is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stopfast import VisionTransformer
from stopfast.checkpoint import CheckpointError
from stopfast.export import export_run, import_encoder, load_encoder
from tests.small_runs import assert_same, hugging_face, settings, write_checkpoint


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


def test_files_that_cannot_be_imported(tmp_path):
    run = write_checkpoint(tmp_path / "run", settings("square"))
    hf = export_run(run, tmp_path / "hf", format="hf")
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
    timm = export_run(run, tmp_path / "timm", format="timm")
    document = json.loads((timm / "config.json").read_text())
    document["model_args"]["act_layer"] = "quick_gelu"
    (timm / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="act_layer"):
        import_encoder(timm)
