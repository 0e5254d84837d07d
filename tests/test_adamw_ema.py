"""AdamW with the teacher's average: the kernel, and the training step by each implementation."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stopfast import config, presets
from stopfast.build import build_objective, build_step
from stopfast.config import StepConfig
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import EAGER, FUSED, AdamWBuffers, Ops
from stopfast.run_state import DataState, load_run, save_run
from stopfast.step import TrainStep
from tests.test_objective import assert_close, build, images, weights

SETTINGS = {"lr": 1e-3, "decay": 0.04, "momentum": 0.996, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
OPS = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)


def scalars(step: float, device: torch.device, **changed: float) -> Tensor:
    s = {**SETTINGS, **changed}
    numbers = [s["lr"], s["decay"], s["momentum"], step, s["beta1"], s["beta2"], s["eps"]]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def buffers(size: int, device: torch.device, copies: torch.dtype | None = None) -> AdamWBuffers:
    """Buffers as at the start of a run, with a teacher that is elsewhere."""
    made = torch.randn(2, size, device=device)
    low = [None if copies is None else torch.zeros(size, dtype=copies, device=device) for _ in "pa"]
    zeros = [torch.zeros(size, device=device) for _ in range(3)]
    return AdamWBuffers(made[0].clone(), zeros[0], zeros[1], zeros[2], made[1].clone(), *low)


def wide(given: AdamWBuffers) -> AdamWBuffers:
    return AdamWBuffers(*(None if b is None else b.double() for b in given))


def gradients(size: int, steps: int, device: torch.device) -> Tensor:
    """Of magnitudes from 1e-6 to 10, as different parameters have them."""
    return torch.randn(steps, size, device=device) * torch.logspace(-6, 1, size, device=device)


@pytest.mark.parametrize("size", [1, 33, 1024, 9001])
@pytest.mark.parametrize("copies", [None, torch.bfloat16, torch.float16])
def test_kernel_over_steps(size: int, copies: torch.dtype | None, device: torch.device):
    """Within 1e-6 of fp64, every element within a few roundings, and no further off than torch's."""
    got = buffers(size, device, copies)
    exact = wide(got)._replace(param_copy=None, average_copy=None)
    theirs = nn.Parameter(got.param.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.04, fused=True)
    given = gradients(size, 6, device)
    for number, gradient in enumerate(given, 1):
        FUSED.adamw_ema(got._replace(grad=gradient), scalars(number, device))
        EAGER.adamw_ema(exact._replace(grad=gradient.double()), scalars(number, device))
        theirs.grad = gradient
        optimizer.step()
        # A sum's rounding follows what went into it, which may be larger than what is left.
        largest = given[:number].abs().amax(0)
        terms = {"param": 1e-3, "exp_avg": largest, "exp_avg_sq": 0.0, "average": 0.02}
        torchs = {"param": theirs.detach(), **optimizer.state[theirs]}
        for name, term in terms.items():
            value, expected = getattr(got, name), getattr(exact, name)
            assert (value - expected).norm() <= 1e-6 * expected.norm(), name
            scale = expected.abs() + term
            error = ((value - expected) / scale).abs()
            assert error.max() <= 4e-7, name
            if name in torchs and size >= 1000:  # fewer elements prove nothing
                assert error.norm() <= 1.25 * ((torchs[name] - expected) / scale).norm(), name
        if copies is not None:
            assert torch.equal(got.param_copy, got.param.to(copies))
            assert torch.equal(got.average_copy, got.average.to(copies))


@pytest.mark.parametrize("step", [1.0, 2.0, 1000.0, 1e6])
def test_bias_correction(step: float, device: torch.device):
    """In fp32, 1 - 0.999**step would be off by 1e-5 where the count is small."""
    got = buffers(64, device)
    got.param.zero_()
    got.exp_avg_sq.copy_(torch.rand(64))
    exact = wide(got)
    gradient = torch.randn(64, device=device)
    FUSED.adamw_ema(got._replace(grad=gradient), scalars(step, device))
    EAGER.adamw_ema(exact._replace(grad=gradient.double()), scalars(step, device))
    assert ((got.param.double() - exact.param).abs() <= 5e-7 * exact.param.abs()).all()


def test_copies_round_to_nearest_even(device: torch.device):
    """An update by nothing leaves values half-way between two of bf16, below and above as they were."""
    bits = torch.arange(0x3F80, 0x3F90, device=device).repeat_interleave(3) << 16
    bits += torch.tensor([0x7FFF, 0x8000, 0x8001], device=device).repeat(16)
    got = buffers(48, device, torch.bfloat16)
    got.param.copy_(bits.to(torch.int32).view(torch.float32))
    before = got.param.clone()
    FUSED.adamw_ema(got, scalars(1, device, lr=0.0))
    assert torch.equal(got.param, before) and torch.equal(got.param_copy, before.bfloat16())


@pytest.mark.parametrize("flag", [1.0, 2.0, float("inf"), float("nan")])
def test_found_inf_writes_nothing(flag: float, device: torch.device):
    got = buffers(1029, device, torch.bfloat16)
    before = [b.clone() for b in got]
    gradient = torch.full((1029,), float("nan"), device=device)
    FUSED.adamw_ema(
        got._replace(grad=gradient), scalars(1, device), torch.tensor(flag, device=device)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, before, strict=True))
    FUSED.adamw_ema(got, scalars(1, device), torch.tensor(0.0, device=device))
    assert not torch.equal(got.param, before[0]) and not torch.equal(got.average, before[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scale_divides(dtype: torch.dtype, device: torch.device):
    scaled, plain = buffers(257, device), None
    plain = AdamWBuffers(*(None if b is None else b.clone() for b in scaled))
    gradient = torch.randn(257, device=device).to(dtype)
    FUSED.adamw_ema(
        scaled._replace(grad=gradient * 4), scalars(1, device), None, torch.tensor(4.0).to(device)
    )
    FUSED.adamw_ema(plain._replace(grad=gradient), scalars(1, device))
    assert all(a is b or torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))


def test_kernel_refuses_what_it_would_overwrite(device: torch.device):
    good, numbers = buffers(8, device), scalars(1, device)
    for wrong in (
        {"param": torch.zeros(8, device=device, dtype=torch.bfloat16)},
        {"exp_avg": torch.zeros(4, device=device)},
        {"average": torch.zeros(16, device=device)[::2]},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FUSED.adamw_ema(good._replace(**wrong), numbers)
    with pytest.raises(ValueError, match="scalars: expected fp64"):
        FUSED.adamw_ema(good, numbers.float())


def overflow(step: TrainStep) -> None:
    step.scaler.update(new_scale=2.0**60)
    step(images(), 4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@OPS
def test_step(ops: Ops, precision: str):
    """The same training, average, skipped step and saved state by either optimiser."""
    found = []
    for optimizer in ("torch", "adamw_ema"):
        objective = build(clip="global" if precision == "fp16" else "none")
        step = TrainStep(objective, StepConfig(precision=precision), optimizer=optimizer, ops=ops)
        assert isinstance(step.optimizer, FlatAdamW) == (optimizer == "adamw_ema")
        start = weights(objective)
        # In half precision a second step would amplify what the first rounds.
        for number in (1, 2, 3) if precision == "fp32" else (1,):
            step(images(), number)
        after = weights(objective)
        if precision == "fp16":
            overflow(step)
            assert step.skipped == 1
            assert_close(after, weights(objective), 1e-12)
        moved = "target_encoder.blocks.0.mlp.fc1.weight"
        assert not torch.equal(after[moved], start[moved])
        state = {str(n): s["exp_avg"] for n, s in step.state_dict()["optimizer"]["state"].items()}
        found.append(after | state)
    assert_close(*found, tolerance=1e-6)


def test_only_what_is_trained_may_be_left_alone():
    objective = build()
    objective.target_encoder.pos_embed.data += 1
    with pytest.raises(ValueError, match="pos_embed: expected a teacher that equals"):
        TrainStep(objective, optimizer="adamw_ema")
    with pytest.raises(ValueError, match="expected auto, adamw_ema, torch or apex, got 'sgd'"):
        TrainStep(build(), optimizer="sgd")


def test_run_goes_on(tmp_path):
    """Settings to step, and a checkpoint from which the flat optimiser, or torch's, goes on."""
    demo = presets.demo()
    settings = replace(demo, optim=replace(demo.optim, optimizer="adamw_ema"))
    state = DataState(8, "", "pil")
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def begin(settings: config.Config) -> tuple:
        objective = build_objective(settings, 10)
        return objective, build_step(settings, objective, torch.device("cpu"))

    objective, step = begin(settings)
    for number in (1, 2):
        step(images, number)
    save_run(tmp_path, settings, objective, step, state, 2)
    step(images, 3)
    again, resumed = begin(settings)
    assert isinstance(resumed.optimizer, FlatAdamW)
    load_run(tmp_path, settings, again, resumed, state)
    resumed(images, 3)
    assert_close(weights(objective), weights(again), 1e-12)


FAKE_APEX = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps)

    def zero_grad(self):  # as apex has it
        super().zero_grad()
"""


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [n for n in sys.modules if n.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_apex(precision: str, no_apex: None, tmp_path, monkeypatch):
    (tmp_path / "apex/optimizers").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").write_text("")
    (tmp_path / "apex/optimizers/__init__.py").write_text(FAKE_APEX)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for optimizer in ("torch", "apex"):
        objective = build()
        step = TrainStep(objective, StepConfig(precision=precision), optimizer=optimizer)
        for number in (1, 2, 3) if precision == "fp32" else (1,):
            step(images(), number)
        found.append(weights(objective))
        if precision == "fp16":
            overflow(step)
            assert step.skipped == 1
            assert_close(found[-1], weights(objective), 1e-12)
    assert type(step.optimizer).__module__ == "apex.optimizers"
    assert_close(*found, tolerance=1e-6)


def test_no_apex(no_apex: None, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=r"github\.com/NVIDIA/apex; PyPI's package"):
        TrainStep(build(), optimizer="apex")
