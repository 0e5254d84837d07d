"""Checkpoints: whole or absent, checked on loading; and the published programs' files."""

import json

import pytest
import torch

from stopfast import Predictor, VisionTransformer, load_published
from stopfast.checkpoint import (
    CheckpointError,
    flatten_state,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    unflatten_state,
)
from tests.golden_files import golden, listed, norm_1e6, under


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "step-0000003"
    save_checkpoint(
        path,
        {"model": {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2)}},
        {"state": {"step": 3}},
    )
    return path


def test_round_trip(folder):
    tensors, documents = load_checkpoint(folder)
    assert torch.equal(tensors["model"]["a"], torch.arange(6.0).view(2, 3).T)
    assert documents == {"state": {"step": 3}}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_every_flipped_bit_is_noticed(folder):
    """No byte of any file can change without an error; no format below does this by itself."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(CheckpointError):
                load_checkpoint(folder)
        path.write_bytes(content)
    load_checkpoint(folder)


@pytest.mark.parametrize("damage", ["missing", "truncated", "added", "unlisted"])
def test_damage_is_noticed(folder, damage):
    model = folder / "model.safetensors"
    if damage == "missing":
        model.unlink()
    elif damage == "truncated":
        model.write_bytes(model.read_bytes()[:-1])
    elif damage == "added":
        (folder / "more.json").write_text("{}")
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-0000003"):
        load_checkpoint(folder)


def test_interrupted_save_leaves_nothing_to_load(tmp_path, monkeypatch):
    """The folder appears by a rename of a flushed whole; a save that dies leaves the older one."""
    order = []
    monkeypatch.setattr("os.fsync", lambda fd: order.append("fsync"))
    replace = __import__("os").replace
    monkeypatch.setattr("os.replace", lambda *a: order.append("rename") or replace(*a))
    save_checkpoint(tmp_path / "step-1", {"model": {"a": torch.ones(1)}}, {"state": {}})
    assert order == ["fsync"] * 4 + [
        "rename",
        "fsync",
    ]  # three files and their folder; then its parent

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "step-2", {"model": {"a": torch.ones(1)}}, {})
    assert newest_checkpoint(tmp_path) == tmp_path / "step-1"
    monkeypatch.setattr("os.replace", replace)
    save_checkpoint(tmp_path / "step-2", {"model": {"a": torch.ones(1)}}, {})
    assert newest_checkpoint(tmp_path) == tmp_path / "step-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]
    with pytest.raises(ValueError, match="exists"):
        save_checkpoint(tmp_path / "step-2", {}, {})


def test_state_survives_flattening():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    tensors, rest = flatten_state(state)
    restored = unflatten_state(tensors, json.loads(json.dumps(rest)))
    assert torch.equal(restored["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert restored["param_groups"][0]["betas"] == [0.9, 0.999]
    torch.optim.AdamW([weight], lr=0.5).load_state_dict(restored)


@pytest.fixture
def published(tmp_path):
    """A file as the published programs write it, of the golden networks."""
    _, tensors = golden("stop_training_steps")
    content = {
        name: {f"module.{k}": v for k, v in under(tensors, f"init.{source}.").items()}
        for name, source in (
            ("encoder", "encoder"),
            ("predictor", "predictor"),
            ("target_encoder", "encoder"),
        )
    }
    content |= {
        "opt": {"state": {}},
        "scaler": None,
        "epoch": 7,
        "loss": 0.5,
        "batch_size": 64,
        "lr": 1e-3,
    }
    path = tmp_path / "jepa-latest.pth.tar"
    torch.save(content, path)
    return path, content


def test_published_file(published):
    path, content = published
    model = load_published(path, variant="stop", num_heads=4, noise_var=0.25)
    assert model.epoch == 7
    assert model.predictor.variant == "stop" and model.predictor.noise_std == 0.25
    assert not any(p.requires_grad for p in model.target_encoder.parameters())
    for module, name in ((model.encoder, "encoder"), (model.predictor, "predictor")):
        for key, value in module.state_dict().items():
            assert torch.equal(value, content[name][f"module.{key}"])
    _, tensors = golden("stop_training_steps")
    by_hand = VisionTransformer(
        img_size=[32], patch_size=8, embed_dim=48, depth=2, num_heads=4, norm_layer=norm_1e6
    )
    by_hand.load_state_dict(under(tensors, "init.encoder."))
    images, masks = tensors["step0.imgs"], listed(tensors, "step0.masks_x")
    assert torch.equal(model.encoder(images, masks), by_hand(images, masks))
    assert load_published(path, variant="ijepa", num_heads=4).predictor.mask_token.requires_grad


def test_odd_hidden_width(tmp_path):
    """ViT-g's hidden width is no whole multiple of its width; it is read off, not rounded away."""
    encoder = VisionTransformer(
        img_size=[32],
        patch_size=8,
        embed_dim=44,
        depth=1,
        num_heads=4,
        mlp_ratio=48 / 11,
        norm_layer=norm_1e6,
    )
    predictor = Predictor(16, 44, 20, 1, 4, norm_layer=norm_1e6, mlp_ratio=3.15)
    states = {
        "encoder": encoder.state_dict(),
        "predictor": predictor.state_dict(),
        "target_encoder": encoder.state_dict(),
    }
    torch.save(states, tmp_path / "a.pth.tar")
    model = load_published(tmp_path / "a.pth.tar", variant="ijepa", num_heads=4)
    assert model.encoder.blocks[0].mlp.fc1.out_features == 192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("predictor"), "predictor"),
        (lambda c: c["encoder"].pop("module.norm.weight"), "missing: norm.weight"),
        (lambda c: c["predictor"].pop("module.mask_token"), "missing: mask_token"),
        (
            lambda c: c["predictor"].pop("module.predictor_embed.weight"),
            "missing: predictor_embed.weight",
        ),
        (lambda c: c["encoder"].update(extra=torch.ones(1)), "unknown: extra"),
        (lambda c: c.update(encoder=None), "without .*encoder"),
        (lambda c: c["predictor"]["module.predictor_pos_embed"].add_(0.1), "learned_pos_emb=True"),
        (
            lambda c: c["target_encoder"].update({"module.norm.bias": torch.ones(3)}),
            r"norm.bias \(3,\)",
        ),
    ],
)
def test_partial_published_file(published, change, message):
    path, content = published
    change(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_published(path, variant="stop", num_heads=4)


def test_published_file_needs_its_heads(published):
    with pytest.raises(ValueError, match="num_heads"):
        load_published(published[0], variant="stop")


def test_published_file_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"encoder": Attack()}, tmp_path / "bad.pth.tar")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_published(tmp_path / "bad.pth.tar", variant="ijepa")
    assert not (tmp_path / "touched").exists()
