"""`stopfast verify`: it passes where the fused operations are right, and says so where they are not."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from stopfast import build, cli, verify
from stopfast.config import Config, to_document
from stopfast.kernels.ops import FUSED, resolve_ops
from stopfast.presets import PRESETS
from stopfast.run_state import DataState, save_run

TINY = PRESETS["demo"]()
TINY = replace(
    TINY,
    data=replace(TINY.data, batch_size=2),
    model=replace(TINY.model, embed_dim=24, num_heads=2, depth=2, predictor_embed_dim=24),
)
SMALLEST = replace(TINY.model, num_heads=1, depth=1, predictor_depth=1)


def run(config: Config, tmp_path, *options: str) -> int:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(to_document(config)))
    return cli.main(["verify", "--config", str(path), *options])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes(precision, tmp_path, capsys):
    config = replace(TINY, step=replace(TINY.step, precision=precision))
    assert run(config, tmp_path, "--steps", "3") == 0
    out = capsys.readouterr().out
    assert "predictions" in out and "loss over 3 steps" in out and "DIFFERS" not in out


@pytest.mark.parametrize(
    ("preset", "computed"),
    [
        ("droppos-demo", "position logits"),
        ("beyond-zoomed-in-mask-demo", "predictions"),
        ("stop-blurred-demo", "predictions"),
    ],
)
def test_every_objective(preset, computed):
    """What each computes, and every gradient of each of its modules that is trained."""
    config = PRESETS[preset]()
    model = replace(SMALLEST, class_token=config.model.class_token)
    config = replace(config, data=TINY.data, model=model)
    console = Console(width=200, file=io.StringIO())
    verify.print_rows(verify.verify(config, steps=1), console)
    out = console.file.getvalue()
    assert computed in out and "DIFFERS" not in out
    trained = 0
    for name, module in build.build_objective(config, 1).modules().items():
        assert f"{name} after 1 steps" in out
        parameters = sum(p.requires_grad for p in module.parameters())
        assert parameters == 0 or f"(worst of {parameters})" in out
        assert (f"gradient {name}." in out) == (parameters > 0)
        trained += parameters > 0
    assert trained == 2


def test_fifty_steps():
    """Weights, teacher and losses stay within twice eager's own distance from a run in fp64."""
    config = replace(TINY, model=SMALLEST, optim=replace(TINY.optim, start_lr=1e-3))
    arms = {n: verify._arm(config, n, None, "cpu") for n in ("exact", "eager", "fused")}
    before = verify._weights(arms["exact"])
    losses: dict[str, list] = {name: [] for name in arms}
    batches = verify._images(config, arms["exact"].objective, 50, "cpu")
    for number, images in enumerate(batches, start=1):
        for name, arm in arms.items():
            losses[name].append(arm.step(images.to(arm.dtype), number).loss.double())
    away = {name: torch.stack(losses[name]) - torch.stack(losses["exact"]) for name in arms}
    assert 0 < away["fused"].norm() <= 2 * away["eager"].norm()
    for row in verify._weight_rows(arms, before, 50, 0.0):
        assert 0 < row.fused <= 2 * row.eager


def test_a_wrong_operation_is_found(tmp_path, capsys, monkeypatch):
    """A bias that is lost, in a gradient alone, shows as that gradient."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, bias):
            return bias.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    wrong = FUSED._replace(
        linear_gelu=lambda x, weight, bias: FUSED.linear_gelu(x, weight, Wrong.apply(bias))
    )
    monkeypatch.setattr(
        "stopfast.block.Mlp.forward",
        lambda self, x: self.fc2(
            (wrong if self.ops is FUSED else self.ops).linear_gelu(
                x, self.fc1.weight, self.fc1.bias
            )
        ),
    )
    assert run(TINY, tmp_path, "--steps", "1") == 1
    out = capsys.readouterr().out
    assert "mlp.fc1.bias" in out and "DIFFERS" in out


def test_checkpoint(tmp_path):
    """The weights compared are the checkpoint's."""
    config = replace(TINY, run=replace(TINY.run, output=tmp_path / "run"))
    objective = build.build_objective(config, 10)
    with torch.no_grad():
        objective.predictor.mask_token.fill_(7.0)
    step = build.build_step(config, objective, torch.device("cpu"))
    save_run(tmp_path / "run", config, objective, step, DataState(1, "", "pil"), 1)
    assert verify.read_config(str(tmp_path / "run")) == config
    arm = verify._arm(config, "fused", tmp_path / "run", "cpu")
    assert (arm.objective.predictor.mask_token == 7).all()
    assert arm.objective.predictor.ops is resolve_ops("fused")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("nothing", (), "expected --config"),
        ("demo", ("--images", "0"), "expected steps"),
        ("demo", ("--steps", "0"), "expected steps"),
    ],
)
def test_bad_requests(config, options, message, capsys):
    assert cli.main(["verify", "--config", config, *options]) == 2
    assert message in capsys.readouterr().err
