"""Attention by any backend is the same attention; one that is not there says how to get it."""

import warnings
from dataclasses import replace

import pytest
import torch

from stopfast import build
from stopfast.kernels import _measured, attention_backends
from stopfast.kernels.attention import supports
from stopfast.kernels.cases import CASES
from stopfast.kernels.ops import AUTO, EAGER, FUSED, ops_on, resolve_ops
from stopfast.presets import PRESETS
from tests.kernel_runs import copied, run
from tests.test_kernels import errors

(CASE,) = (case for case in CASES if case.name == "attention")
BACKENDS = ["triton", "sdpa", "flex", "auto", "xformers"]


def backend(name: str):
    try:
        return attention_backends.attention_backend(name)
    except ValueError as problem:
        pytest.skip(str(problem))


@pytest.mark.filterwarnings("ignore:.*flex_attention")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("number", range(len(CASE.tested)))
def test_backends_agree(name: str, number: int, device: torch.device):
    """Results and, where the library differentiates here, gradients: within 1e-5 of the fp64 definition."""
    ops = EAGER._replace(attention=backend(name))
    arguments = CASE.make(CASE.tested[number], torch.float32, device)
    if name == "flex" and device.type == "cpu":
        arguments = {
            k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
        }
        if CASE.tested[number]["B"] == 0:
            pytest.skip("flex_attention takes no empty batch")
    exact = run(EAGER, CASE, copied(arguments, torch.float64))
    assert all(error <= 1e-5 for error in errors(run(ops, CASE, copied(arguments)), exact))


@pytest.mark.parametrize("head_dim", [24, 32, 64])
def test_full_rows(head_dim: int, device: torch.device):
    """The longest rows that are promised, forward and backward."""
    arguments = CASE.make({"B": 1, "N": 128, "H": 2, "d": head_dim}, torch.float32, device)
    exact = run(EAGER, CASE, copied(arguments, torch.float64))
    assert all(error <= 1e-5 for error in errors(run(FUSED, CASE, copied(arguments)), exact))


def test_what_the_kernel_does_not_take_is_sdpa_with_one_warning(device: torch.device):
    assert not supports(96, 16, torch.float32)
    attention_backends._warn_now.cache_clear()
    arguments = CASE.make({"B": 1, "N": 16, "H": 1, "d": 96}, torch.float32, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (FUSED.attention(**arguments) for _ in range(2))
    assert len(caught) == 1 and "computed by SDPA" in str(caught[0].message)
    assert torch.equal(first, second)
    assert torch.allclose(first, EAGER.attention(**arguments), atol=1e-5)


def test_absent_backends_say_how_to_get_them(monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(attention_backends, "import_module", absent)
    with pytest.raises(ValueError, match=r"pip install 'stopfast\[xformers\]'"):
        resolve_ops("fused", "xformers")
    with pytest.raises(ValueError, match="expected one of"):
        resolve_ops("fused", "fastest")


def test_the_table_decides_once(monkeypatch):
    """By GPU, head dim and length; what it does not name is SDPA."""
    table = {"G": {"layer_norm": True, "attention": {"d32": [[64, "triton"], [128, "xformers"]]}}}
    monkeypatch.setattr(_measured, "_tables", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "G" if index == 0 else "other")
    shapes = ((32, 64), (32, 65), (32, 129), (24, 9))
    chosen = [_measured.attention_choice(table["G"], *shape) for shape in shapes]
    assert chosen == ["triton", "xformers", "sdpa", "sdpa"]
    attention_backends._warn_now.cache_clear()
    assert attention_backends._choose(0, 32, 64) is attention_backends.triton
    assert attention_backends._choose(1, 32, 64) is attention_backends.sdpa
    gpu = ops_on(AUTO, torch.device("cuda", 0))
    assert gpu.layer_norm is FUSED.layer_norm and gpu.linear_gelu is EAGER.linear_gelu
    other = ops_on(AUTO, torch.device("cuda", 1))
    assert other.layer_norm is EAGER.layer_norm
    for name in ("predictor_tokens", "target_smooth_l1"):
        assert getattr(other, name) is getattr(FUSED, name)
    assert other.attention is attention_backends.auto


def test_a_run_chooses_its_backend():
    config = PRESETS["demo"]()
    assert build.step_ops(config) is AUTO
    chosen = build.step_ops(replace(config, step=replace(config.step, attention="flex")))
    assert chosen.attention is attention_backends.flex
    assert chosen.layer_norm is AUTO.layer_norm
