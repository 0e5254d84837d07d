"""Lengths in buckets: the same numbers, few shapes, one compilation, and nothing that waits for a GPU."""

from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.engine.agreement import relative_error
from stopfast import MultiBlockMasks, masking
from stopfast.block import Block, Slots
from stopfast.buckets import bucket_of, pad_slots, pad_to_bucket
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.masking import Masks
from stopfast.objectives.jepa import Jepa, JepaDraws
from tests.small_predictor import inputs
from tests.small_predictor import small as small_predictor
from tests.test_objective import build, images

BATCH = 2
PAPER = {"variant": "stop_paper", "apply_to": "both"}
# What lengths are rounded up to, and settings.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ijepa": (8, {"noise": {}}),
    "ijepa, learned positions": (4, {"noise": {"learned_pos_emb": True}, "target_blocks": 2}),
    "stop": (4, {}),
    "stop, all is computed": (8, {"skip_unused": False}),
    "stop, contexts": (8, {"masks": {"nenc": 2}, "target_blocks": 2}),
    "stop, contexts, all is computed": (4, {"masks": {"nenc": 2}, "skip_unused": False}),
    "stop, recomputed": (8, {"checkpointing": True}),
    "stop, more targets than patches": (8, {"masks": {"npred": 5}}),
    "paper, noise on both": (8, {"noise": PAPER, "masks": {"nenc": 2}}),
    "paper, noise on both, all is computed": (4, {"noise": PAPER, "skip_unused": False}),
    "own projection": (8, {"noise": {"apply_stop": True, "tie": False, "noise_dim": "predictor"}}),
    "fixed covariance": (4, {"noise": {"apply_stop": True, "cov": "fixed"}}),
}

SOME = (
    "ijepa",
    "stop, all is computed",
    "stop, contexts",
    "paper, noise on both",
    "own projection",
)
CASES_BY_OPS = [(name, EAGER) for name in CASES] + [(name, FUSED) for name in SOME]


def objective(bucket: int, ops: Ops, **settings: Any) -> Jepa:
    """Every weight is away from where it begins: a bias of zero would hide what padding adds to it."""
    made = build(bucket=bucket, ops=ops, **settings)
    generator = torch.Generator().manual_seed(2)
    for module in made.modules().values():
        for part in module.modules():
            if hasattr(part, "ops"):
                part.ops = ops
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def outcome(made: Jepa, draws: JepaDraws, device: torch.device) -> dict[str, Tensor]:
    """The loss, and every gradient."""
    for module in made.modules().values():
        module.zero_grad()
    loss = made.loss(images(BATCH).to(device), draws)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, module in (("encoder", made.encoder), ("predictor", made.predictor)):
        for key, parameter in module.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), key
            if parameter.grad is not None:
                found[f"{name}.{key}"] = parameter.grad
    return found


@pytest.mark.parametrize(("name", "ops"), CASES_BY_OPS, ids=lambda of: getattr(of, "name", of))
def test_padding_changes_nothing(name: str, ops: Ops, device: torch.device):
    """Loss and gradients are those without padding, and what stands in the padding plays no part."""
    bucket, settings = CASES[name]
    plain, padded = (objective(size, ops, **settings) for size in (1, bucket))
    for made in (plain, padded):
        for module in made.modules().values():
            module.to(device)
    draws = [made.draws(3, 2 * BATCH, slice(2, 2 + BATCH)) for made in (plain, padded)]
    expected = outcome(plain, draws[0], device)
    masks, lengths = draws[1].masks, draws[1].masks.lengths
    assert lengths.tolist() == [mask[0].shape[1] for mask in draws[0].masks[:2]]
    slots = [mask[0].shape[1] for mask in masks[:2]]
    assert all(slot % bucket == 0 for slot in slots) and slots != lengths.tolist()
    for mask, length in ((m, n) for ms, n in zip(masks[:2], lengths, strict=True) for m in ms):
        assert not mask[:, length:].any()
        mask[:, length:] = 17
    for key, value in outcome(padded, draws[1], device).items():
        assert relative_error(value, expected[key]) < 1e-5, key


@pytest.mark.parametrize(("ops", "depth"), [(EAGER, 1), (EAGER, 2), (FUSED, 1)])
def test_padding_of_the_features_may_be_nan(ops: Ops, depth: int, device: torch.device):
    """What the predictor is given for padding reaches no prediction and no gradient."""
    x, masks_x, masks = (
        [m.to(device) for m in t] if isinstance(t, list) else t.to(device) for t in inputs()
    )
    predictor = small_predictor(apply_stop=True, depth=depth, ops=ops).to(device)
    call = {"seed": torch.tensor([3, 1], device=device)}

    def run(x: Tensor, masks: Masks, wanted: int) -> list[Any]:
        predictor.zero_grad()
        x = x.clone().requires_grad_()
        out = predictor(x, masks.context, masks.target, lengths=masks.lengths, **call)[:, :wanted]
        (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in predictor.parameters() if p.requires_grad)]

    exact = Masks([m[:, :5] for m in masks_x], [m[:, :3] for m in masks])
    plain = run(x[:, :5], exact, 3)
    filled = torch.cat([x, torch.full_like(x[:, :3], torch.nan)], dim=1)
    padded = run(filled, pad_to_bucket(exact, 8), 3)
    assert not padded[1][:, 5:].any()
    padded[1] = padded[1][:, :5]
    for got, expected in zip(padded, plain, strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(("side", "batch", "most"), [(14, 64, 8), (16, 128, 13)])
def test_few_shapes(side: int, batch: int, most: int):
    """500 steps of the published settings, whose exact lengths are 69 and 84 pairs or more."""
    sampler = MultiBlockMasks(grid=(side, side))
    drawn = [sampler(batch, iteration) for iteration in range(500)]
    lengths = [(m.context[0].shape[1], m.target[0].shape[1]) for m in drawn]
    shapes = {tuple(bucket_of(length, 8, side * side) for length in pair) for pair in lengths}
    assert len(shapes) <= most and len(set(lengths)) > 6 * most


def test_pad_to_bucket():
    index = torch.arange(1, 8).expand(2, -1)
    padded = pad_to_bucket(Masks([index[:, :5]], [index[:, :4], index[:, 1:5]]), 4, most=7)
    assert torch.equal(padded.context[0], torch.tensor([[1, 2, 3, 4, 5, 0, 0]] * 2))
    assert [m.tolist()[0] for m in padded.target] == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert padded.lengths.dtype == torch.int32 and padded.lengths.tolist() == [5, 4]
    assert [bucket_of(n, 8, 20) for n in (1, 8, 9, 17, 21)] == [8, 8, 16, 20, 21]
    assert pad_slots(torch.ones(2, 3, 4), 5).sum(2).tolist() == [[4, 4, 4, 0, 0]] * 2
    with pytest.raises(ValueError, match="multiple >= 1"):
        pad_to_bucket(padded, 0)
    with pytest.raises(ValueError, match="without padding"):
        pad_to_bucket(padded, 4)


def test_bad_lengths():
    made, pixels = build(), images(2)
    index, lengths = torch.arange(8).expand(2, -1), torch.tensor([5, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="lengths with masks"):
        made.encoder(pixels, lengths=lengths)
    with pytest.raises(ValueError, match="without rows"):
        made.encoder(pixels, index, rows=index, lengths=lengths)
    for wrong in (lengths.long(), lengths[:1]):
        with pytest.raises(ValueError, match=r"int32 \(2,\)"):
            made.encoder(pixels, index, lengths=wrong)
        with pytest.raises(ValueError, match=r"int32 \(2,\)"):
            made.predictor(torch.zeros(2, 8, 32), index, index, lengths=wrong)
    block, x = made.encoder.blocks[0], torch.zeros(2, 8, 32)
    for rows in (3, index):
        with pytest.raises(ValueError, match="target's slots"):
            block(x, rows, Slots(lengths, 5))
    with pytest.raises(ValueError, match="bucket >= 1"):
        build(bucket=0)


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_blocks_serve_every_shape(padded: bool, monkeypatch):
    """Six compilations, however sizes coincide at first: 8 is the batch, and 4 x 8 the encoder's width."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()

    def block(width: int) -> Block:
        settings: dict[str, Any] = {"mlp_ratio": 2.0, "qkv_bias": True, "qk_scale": None}
        made = Block(width, 2, **settings, norm_layer=torch.nn.LayerNorm, ops=EAGER)
        made.compile_parts()
        return made

    target, encoder, first, middle, last = (block(width) for width in (32, 32, 16, 16, 16))
    lengths = torch.tensor([3, 2], dtype=torch.int32) if padded else None
    for batch, kept, wanted in ((8, 8, 8), (8, 16, 8), (8, 12, 4), (16, 32, 16), (5, 7, 9)):
        with torch.no_grad():
            target(torch.randn(batch, 36, 32))
            target(torch.randn(batch, 36, 32), torch.randint(36, (batch, 4 * wanted)))
        encoder(torch.randn(batch, kept, 32), None, Slots.of(lengths, kept)).sum().backward()
        x = torch.randn(4 * batch, kept + wanted, 16)
        slots = Slots.of(lengths, kept)
        x = first.forward_shared(x, batch, kept, False, slots)
        last(middle(x, None, slots), kept, slots).sum().backward()
        # Without padding, the encoder's block and the middle one of the predictor differ in width alone.
        assert counter.frame_count == 6


class _Queue(TorchDispatchMode):
    """Refuse what would wait for a GPU's queue: to read from it, or to copy to it from pageable memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor) and t.ndim]
        assert len({t.device.type for t in tensors}) < 2, f"{func} between host and device"
        assert func is not torch.ops.aten.lift_fresh.default, "torch.tensor of the host's numbers"
        return out


class _Stream:
    """A stream of a GPU that is not there."""

    log: list[str]

    def __init__(self, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What happens to the streams of a GPU that is not there."""

    @contextmanager
    def stream(of: _Stream):
        _Stream.log.append(f"on {of.name}")
        yield
        _Stream.log.append(f"off {of.name}")

    _Stream.log = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda _, of: _Stream.log.append(f"for {of.name}"))
    return _Stream.log


def on_a_fake_gpu(made: Jepa) -> None:
    """Under FakeTensorMode: give every module weights of the same shapes on a GPU."""
    for part in (part for module in made.modules().values() for part in module.modules()):
        for name, value in part.named_parameters(recurse=False):
            fake = torch.empty(value.shape, device="cuda")
            part._parameters[name] = torch.nn.Parameter(fake, value.requires_grad)


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)
def test_nothing_waits_for_the_device(ops: Ops, log: list[str], monkeypatch):
    """Tensors of a fake GPU, which have no numbers to read; those of the masks are the one exception.

    Those are drawn beside what the GPU does, and the target encoder runs beside the context encoder.
    """
    made = objective(4, ops, target_stream=True, masks={"ops": FUSED, "nenc": 2})
    sizes = made.masks.sizes(0)
    monkeypatch.setattr(made.masks, "sizes", lambda iteration: sizes)
    monkeypatch.setattr(masking, "read", lambda numbers: [5] + [0] * (len(numbers) - 1))
    for name in ("target_encoder", "encoder", "predictor"):
        module = getattr(made, name)
        module.register_forward_pre_hook(lambda *_, name=name: log.append(name))
    with FakeTensorMode(), _Queue():
        on_a_fake_gpu(made)
        draws = made.draws(1, 8, slice(2, 6))
        tensors = [*draws.masks.context, *draws.masks.target, draws.masks.lengths, *draws[1:3]]
        assert {t.device.type for t in tensors} == {"cuda"}
        assert log == ["on side", "off side", "main waits for side", "for main", "for main"]
        log.clear()
        loss = made.loss(torch.empty(4, 3, 48, 48, device="cuda"), draws)
    assert loss.device.type == "cuda" and loss.shape == ()
    beside = ["side waits for main", "on side", "target_encoder", "off side"]
    assert log == [*beside, "encoder", "predictor", "main waits for side"]


def test_masks_of_the_host_are_sent_when_they_are_done(monkeypatch):
    """Two copies, and no other tensor of the GPU: there is none, so it would be an error."""
    sent = []
    monkeypatch.setattr(masking, "send", lambda t, device: sent.append((t, device)) or t)
    tight = {"enc_mask_scale": (0.4, 0.5), "min_keep": 5, "edge_inclusive": True}
    sampler = MultiBlockMasks((8, 8), **tight, truncate="random", ops=EAGER)
    for iteration in range(10):
        masks = sampler(4, iteration, device="cuda:1")
        assert [t.device.type for t, _ in sent] == ["cpu", "cpu"]
        assert {device for _, device in sent} == {torch.device("cuda:1")}
        assert torch.equal(masks.context[0], sent[0][0][:, 0])
        sent.clear()


def test_target_stream_needs_a_gpu():
    made = build(target_stream=True)
    with pytest.raises(ValueError, match="CUDA device"):
        made.loss(images(2), made.draws(1, 2, slice(0, 2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)
def test_streams_change_nothing(ops: Ops, device: torch.device):
    """Ten steps with the GPU kept busy, so that whoever does not wait is early."""
    results = []
    for beside in (False, True):
        made = objective(8, ops, target_stream=beside, masks={"ops": FUSED if beside else EAGER})
        for module in made.modules().values():
            module.to(device)
        losses = []
        for step in range(1, 11):
            if beside:
                torch.cuda._sleep(10_000_000)
            draws = made.draws(step, BATCH, slice(0, BATCH))
            losses.append(outcome(made, draws, device))
        results.append(losses)
    for plain, other in zip(*results, strict=True):
        for key, value in plain.items():
            assert relative_error(other[key], value) < 1e-5, key
