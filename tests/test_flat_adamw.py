"""The optimiser over flat buffers against torch's AdamW and an average of its own."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.optim import OptimizerRecipe, build_optimizer
from tests.test_objective import assert_close

OPS = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen one, one that is not used unless asked, and another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.first, self.spare, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.last.weight = self.first_tie = nn.Parameter(torch.randn(7, 7))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)

    def forward(self, x: Tensor, spare: bool = True) -> Tensor:
        x = self.first(self.conv(x).mean((2, 3)))
        x = self.spare(x) if spare else x
        return self.last(x @ self.first_tie + self.frozen)


class Pair:
    """A student with its teacher, a head without one, and the two ways to train them."""

    def __init__(self, way: str, device: torch.device, ops: Ops = EAGER, **settings: Any) -> None:
        torch.manual_seed(3)
        self.student, self.head = Net().to(device), nn.Linear(7, 3).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        with torch.no_grad():
            for parameter, trained in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                parameter += 0.1 * trained.requires_grad
        both = [p for m in (self.student, self.head) for p in m.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in both if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in both if p.ndim == 1], "weight_decay": 0.0},
        ]
        recipe = OptimizerRecipe(groups=groups, clipped=[])
        self.optimizer = build_optimizer(
            recipe, [(self.student, self.teacher)], way, ops, **settings
        )
        for group in self.optimizer.param_groups:
            group |= {"lr": 1e-2, "teacher_momentum": 0.9}
        self.device = device

    def train(self, steps: range, spare: bool = True) -> "Pair":
        for number in steps:
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(4, 3, 6, 6, generator=generator).to(self.device)
            self.head(self.student(x, spare)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def values(self) -> dict[str, Tensor]:
        """Weights, average and moments by name."""
        modules = {"student": self.student, "teacher": self.teacher, "head": self.head}
        named = [
            (f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()
        ]
        state = {
            f"{name}.{key}": value
            for name, p in named
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        return {n: t.detach().clone() for n, t in (*named, *state.items())}


@pytest.fixture(params=["eager", "fused"])
def flat(request: pytest.FixtureRequest, device: torch.device) -> Pair:
    return Pair("adamw_ema", device, {"eager": EAGER, "fused": FUSED}[request.param])


@pytest.fixture
def plain(device: torch.device) -> Pair:
    return Pair("torch", device)


def test_five_steps(flat: Pair, plain: Pair):
    """Weights, moments, counts and average as of torch's AdamW and an average of its own."""
    start = flat.values()
    assert_close(plain.train(range(5)).values(), flat.train(range(5)).values(), 1e-6)
    assert all(
        (start[n] != v).any() for n, v in flat.values().items() if n in start and "frozen" not in n
    )
    assert flat.student.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert flat.student.last.weight is flat.student.first_tie


def test_memory(flat: Pair):
    """Every parameter starts where a kernel can load 16 bytes, and what lies between them stays zero."""
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        flat.train(range(2)).train(range(2, 4), spare=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.data_ptr() % 16 == 0 for m in (flat.student, flat.teacher) for t in m.parameters())
    for segment in flat.optimizer._segments:
        assert all(b.isfinite().all() for b in segment.buffers.values())


def test_missing_gradients(flat: Pair, plain: Pair):
    """Without a gradient, weights and count stay and the teacher follows; so whatever comes and goes."""
    for pair in (flat, plain):
        pair.train(range(2), spare=False)
        assert pair.student.spare.weight not in pair.optimizer.state
        pair.train(range(2, 4)).train(range(4, 5), spare=False).train(range(5, 6))
    values = flat.values()
    assert_close(plain.values(), values, 1e-6)
    assert [values[f"student.{n}.weight.step"].item() for n in ("spare", "first")] == [3, 6]
    before = values
    flat.optimizer.step()  # no gradient at all
    plain.optimizer.step()
    assert_close(plain.values(), flat.values(), 1e-6)
    assert torch.equal(before["student.first.weight"], flat.values()["student.first.weight"])
    assert not torch.equal(before["teacher.first.weight"], flat.values()["teacher.first.weight"])


@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("ways", [("torch", "adamw_ema"), ("adamw_ema", "torch")])
def test_checkpoints_are_shared(ways: tuple[str, str], spare: bool, device: torch.device):
    """Three steps of one, three more of the other, are six of either; counts that differ included."""
    pairs = [Pair(way, device) for way in (ways[0], *ways)]
    whole, begun, other = pairs
    whole.train(range(2)).train(range(2, 3), spare).train(range(3, 6))
    begun.train(range(2)).train(range(2, 3), spare)
    written = io.BytesIO()
    modules = [[p.student, p.teacher, p.head] for p in (begun, other)]
    torch.save([begun.optimizer.state_dict(), *(m.state_dict() for m in modules[0])], written)
    written.seek(0)
    optimizer, *states = torch.load(written)
    for module, state in zip(modules[1], states, strict=True):
        module.load_state_dict(state)
    other.optimizer.load_state_dict(optimizer)
    assert set(other.optimizer.param_groups[0]) == set(begun.optimizer.param_groups[0])
    assert_close(whole.values(), other.train(range(3, 6)).values(), 1e-6)


def test_load_forgets_and_refuses(flat: Pair):
    fresh = copy.deepcopy(flat.optimizer.state_dict())
    flat.train(range(2), spare=False)
    used = copy.deepcopy(flat.optimizer.state_dict())
    flat.optimizer.load_state_dict(fresh)
    assert not flat.optimizer.state
    assert flat.train(range(1)).values()["student.first.weight.step"] == 1
    for name, value in (("exp_avg", torch.zeros(1)), ("exp_avg_sq", torch.zeros(7))):
        broken = copy.deepcopy(used)
        broken["state"][0][name] = value
        with pytest.raises(ValueError, match=f"{name}: expected the shape"):
            flat.optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="amsgrad"):
        used["param_groups"][1]["amsgrad"] = True
        flat.optimizer.load_state_dict(used)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_moved_parameters_are_refused(which: str, flat: Pair):
    flat.train(range(1))
    module = getattr(flat, which)
    module.load_state_dict({n: t + 1 for n, t in module.state_dict().items()})
    flat.train(range(1))  # writing into a parameter moves nothing
    module.last.bias.data = module.last.bias.data.clone()
    with pytest.raises(ValueError, match="1 elsewhere: move modules to their device"):
        flat.train(range(1))


def test_modules_are_copied_and_saved_as_before(flat: Pair, device: torch.device):
    student = flat.train(range(2)).student
    written = io.BytesIO()
    torch.save(student, written)
    written.seek(0)
    copies = [copy.deepcopy(student), pickle.loads(pickle.dumps(student))]
    copies.append(torch.load(written, weights_only=False))
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    flat.train(range(2, 3))
    for made in copies:
        assert_close(before, dict(made.named_parameters()), 1e-12)
        made.double().float()(torch.zeros(1, 3, 6, 6, device=device)).sum().backward()
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(flat.optimizer)


def test_a_stale_graph_is_noticed(flat: Pair, device: torch.device):
    loss = flat.student(torch.ones(1, 3, 6, 6, device=device)).sum()
    flat.train(range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refusals() -> Iterator[tuple[str, Any]]:
    def linear() -> nn.Linear:
        return nn.Linear(2, 2)

    weight = linear().weight
    half = nn.Linear(2, 2, dtype=torch.bfloat16)
    yield (
        r"fp32, got group 0\[1\] \(Tensor, torch.bfloat16, \(2, 2\)\)",
        ([weight, half.weight], {}),
    )
    yield "fp32, got some.weight", ([("some.weight", half.weight)], {})
    yield (
        "memory of their own, got group 0.0. and group 0.1.",
        ([weight, nn.Parameter(weight.data)], {}),
    )
    yield "memory of their own, got group 0.0. and teacher", ([weight], {weight: weight})
    yield "teachers of parameters", ([weight], {linear().weight: weight})
    yield "teacher of group 0.0.: expected", ([weight], {weight: linear().bias})
    yield "teacher of group 0.0.", ([weight], {weight: half.weight})
    yield "one device", ([weight, nn.Parameter(torch.zeros(2, device="meta"))], {})


@pytest.mark.parametrize(
    ("message", "given"), [*refusals()], ids=lambda v: v if isinstance(v, str) else ""
)
def test_refusals(message: str, given: tuple[list, dict]):
    parameters, teachers = given
    memory = [t.data_ptr() for t in (*teachers, *teachers.values())]
    with pytest.raises(ValueError, match=message):
        FlatAdamW(parameters, teachers=teachers, ops=EAGER)
    assert memory == [t.data_ptr() for t in (*teachers, *teachers.values())]


def test_settings_are_refused():
    weight = nn.Linear(2, 2).weight
    with pytest.raises(ValueError, match="amsgrad"):
        FlatAdamW([{"params": [weight], "amsgrad": True}], ops=EAGER)
    with pytest.raises(ValueError, match="copies in bf16 or fp16"):
        FlatAdamW([weight], ops=EAGER, copies=torch.float32)
    optimizer = FlatAdamW([weight], teachers={weight: weight.detach().clone()}, ops=EAGER)
    with pytest.raises(ValueError, match="at construction"):
        optimizer.add_param_group({"params": [nn.Linear(2, 2).weight]})
    with pytest.raises(ValueError, match="teacher_momentum"):
        optimizer.step()
    with pytest.raises(ValueError, match="copy is kept"):
        optimizer.copy_of(weight)


@OPS
def test_copies(ops: Ops, device: torch.device):
    torch.manual_seed(0)
    student, teacher = nn.Linear(5, 3, device=device), nn.Linear(5, 3, device=device)
    teachers = dict(zip(student.parameters(), teacher.parameters(), strict=True))
    optimizer = FlatAdamW(student.parameters(), teachers=teachers, ops=ops, copies=torch.bfloat16)
    optimizer.param_groups[0]["teacher_momentum"] = 0.5
    every = [*student.parameters(), *teacher.parameters()]
    kept = [optimizer.copy_of(t) for t in every]
    for step in range(3):
        before = [c.clone() for c in kept]
        if step:
            student(torch.ones(2, 5, device=device)).sum().backward()
            if step == 2:  # a missing gradient: one parameter at a time
                student.bias.grad = None
            optimizer.step()
        for own, copied, old in zip(every, kept, before, strict=True):
            assert copied.dtype == torch.bfloat16 and torch.equal(copied, own.bfloat16())
            still = step == 0 or (own is student.bias and step == 2)
            assert torch.equal(copied, old) == still
    student.load_state_dict({n: t + 1 for n, t in student.state_dict().items()})
    optimizer.refresh_copies()
    assert torch.equal(kept[0], student.weight.bfloat16())


def test_a_parameter_given_twice_is_updated_once():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = FlatAdamW([weights[0]] * 2, ops=EAGER)
    for weight, optimizer in zip(weights, (twice, FlatAdamW(weights[1:], ops=EAGER)), strict=True):
        weight.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(*weights)


@OPS
def test_numbers_may_be_tensors(ops: Ops, device: torch.device):
    pairs = [Pair("adamw_ema", device, ops) for _ in range(2)]
    for group in pairs[1].optimizer.param_groups:
        for name in ("lr", "weight_decay", "teacher_momentum"):
            group[name] = torch.tensor(group[name], dtype=torch.float64, device=device)
        group["betas"] = (torch.tensor([0.9], dtype=torch.float64), 0.999)
    assert_close(*(pair.train(range(3)).values() for pair in pairs), tolerance=1e-12)
    for group in pairs[1].optimizer.param_groups:
        group["lr"] /= 2
    with pytest.raises(AssertionError):
        assert_close(*(pair.train(range(3, 4)).values() for pair in pairs), tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in")  # what is computed and then not written
@pytest.mark.parametrize("clipped", [False, True])
def test_grad_scaler(clipped: bool, flat: Pair, plain: Pair, device: torch.device, monkeypatch):
    """Scaled gradients update as plain ones; a step that overflows leaves all as it was, count included."""
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)  # pyright: ignore
    x = torch.randn(4, 3, 6, 6, device=device)
    for step in range(4):
        overflows = step in (0, 2)
        before = flat.values()
        for pair in (flat, plain):
            # A parameter without a gradient is left alone too, average included.
            loss = pair.head(pair.student(x, spare=not overflows)).square().mean()
            (scaler.scale(loss) if pair is flat else loss).backward()
        if overflows:
            assert flat.head.bias.grad is not None
            flat.head.bias.grad[1] = float("inf")
        if clipped:
            scaler.unscale_(flat.optimizer)
        with monkeypatch.context() as context:  # nothing may wait for the device
            context.setattr(Tensor, "item", lambda _: pytest.fail("a number was read"))
            scaler.step(flat.optimizer)
        if not overflows:
            plain.optimizer.step()
        scaler.update()
        for pair in (flat, plain):
            pair.optimizer.zero_grad()
        after = flat.values()
        assert all(
            torch.equal(v, after[n]) == (overflows or "frozen" in n) for n, v in before.items()
        )
        if step:
            assert_close(plain.values(), after, 1e-6)
    assert scaler.get_scale() == 256.0
    assert after["head.bias.step"] == 2
