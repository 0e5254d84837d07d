"""Fused attention: padding, what is saved and written, the longest rows, and what it refuses."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stopfast.kernels import _measured, attention_backends
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.attention import attention, supports
from stopfast.kernels.cases import CASES
from stopfast.kernels.ops import EAGER, FUSED
from tests.kernel_runs import copied, run
from tests.test_kernels import errors

(CASE,) = (case for case in CASES if case.name == "attention")
HEADS, WIDTH, SLOTS, TOKENS = 2, 24, 16, 23
SCALE = WIDTH**-0.5
# Real context and target slots of 16 and 7.
LENGTHS = [(9, 6), (16, 7), (0, 3), (1, 1), (16, 0), (0, 0)]
EACH_LENGTH = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
EACH_FORM = pytest.mark.parametrize("targets_only", [False, True], ids=["all rows", "target rows"])


def padded(lengths: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the slots are real, all of them and the target's."""
    slot = torch.arange(TOKENS, device=device)
    real = (slot < lengths[0]) | ((slot >= SLOTS) & (slot < SLOTS + lengths[1]))
    return real, real[SLOTS:]


def inputs(targets_only: bool, device: torch.device) -> list[Tensor]:
    """The packed projection, the target's queries if they are apart, and an incoming gradient."""
    width, rows = HEADS * WIDTH, TOKENS - SLOTS if targets_only else TOKENS
    widths = [(TOKENS, 2 * width), (rows, width)] if targets_only else [(TOKENS, 3 * width)]
    return [torch.randn(2, *shape, device=device) for shape in [*widths, (rows, width)]]


def outcome(call: Any, given: list[Tensor], lengths: Tensor | None, slots: int) -> list[Tensor]:
    """The result and the gradients of all inputs but the last, which is the incoming gradient."""
    *leaves, upstream = given
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    queries = leaves[1] if len(leaves) > 1 else None
    out = call(leaves[0], HEADS, SCALE, queries, lengths, slots)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@EACH_FORM
@EACH_LENGTH
@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_padding(name: str, lengths: tuple[int, int], targets_only: bool, device: torch.device):
    """Padding that holds NaN, of the incoming gradient too, is as if it were not there; it gets zeros."""
    given = inputs(targets_only, device)
    keys, targets = padded(lengths, device)
    real = [keys, targets, targets] if targets_only else [keys, keys]
    alone = [tensor[:, kept].double() for tensor, kept in zip(given, real, strict=True)]
    expected = outcome(EAGER.attention, alone, None, 0) if keys.any() else None
    if name == "triton":  # the definition passes on what comes in; a kernel does not look at it
        given[-1][:, ~real[-1]] = torch.nan
    for tensor, kept in zip(given[:-1], real, strict=False):
        tensor[:, ~kept] = torch.nan
    call = attention_backends.attention_backend(name)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    found = outcome(call, given, counts, SLOTS)
    for number, (tensor, kept) in enumerate(zip(found, [real[-1], *real], strict=False)):
        assert not tensor[:, ~kept].any()  # NaN would be true
        if expected is not None:
            difference = (tensor[:, kept] - expected[number]).norm()
            assert difference <= 1e-5 * expected[number].norm()


def test_lengths_are_read_on_the_device(device: torch.device):
    """One compiled call serves other lengths, written where the first ones were."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    call = torch.compile(FUSED.attention, fullgraph=True, backend=backend)
    packed = inputs(False, device)[0]
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    for counts in LENGTHS:
        lengths.copy_(torch.tensor(counts))
        got = call(packed, HEADS, SCALE, None, lengths, SLOTS)
        assert torch.equal(got, attention(packed, HEADS, SCALE, None, lengths, SLOTS))
        assert torch.equal(got.any(-1).any(0), padded(counts, device)[0])
    assert len(compiled) == 1


@EACH_FORM
def test_what_is_saved_and_written(targets_only: bool, device: torch.device):
    """Only inputs are kept for backward; a kernel each way; the packed gradient is one tensor."""
    *given, upstream = inputs(targets_only, device)
    leaves = [tensor.requires_grad_() for tensor in given]
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        watch_launches() as launches,
    ):
        queries = leaves[1] if targets_only else None
        out = attention(leaves[0], HEADS, SCALE, queries)
        found = torch.autograd.grad(out, leaves, upstream)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves}
    assert [launch.name for launch in launches] == ["forward_kernel", "backward_kernel"]
    for gradient in found:
        assert gradient.is_contiguous()
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


LONGEST = [(24, 128), (32, 128), (64, 128), (80, 128), (24, 136), (64, 196), (64, 256), (40, 33)]


@pytest.mark.parametrize(("head_dim", "tokens"), LONGEST)
def test_longest_rows(head_dim: int, tokens: int, device: torch.device):
    arguments = CASE.make({"B": 1, "N": tokens, "H": 1, "d": head_dim}, torch.float32, device)
    exact = run(EAGER, CASE, copied(arguments, torch.float64))
    assert supports(head_dim, tokens, torch.float32)
    with watch_launches() as launches:
        got = run(FUSED, CASE, arguments)
    assert len(launches) == 2
    assert all(error <= 1e-5 for error in errors(got, exact))


@pytest.mark.parametrize("scale", [1e4, 1e-30, 0.0, -3.0])
def test_any_scale(scale: float, device: torch.device):
    """Scores of any size and sign: the largest of a row is taken off before the exponential."""
    arguments = CASE.make({"B": 1, "N": 19, "H": 2, "d": 32}, torch.float32, device)
    # Small integers, whose products are exact, so that a large scale multiplies no rounding error; each
    # product is negative, so that slots beyond the rows lose to it only if they are no slots at all.
    packed = arguments["packed"].detach().round()
    queries, keys, _ = packed.chunk(3, dim=-1)
    queries.abs_().add_(1)
    keys.abs_().add_(1).neg_()
    arguments["packed"] = packed.requires_grad_()
    arguments["scale"] = scale
    exact = run(EAGER, CASE, copied(arguments, torch.float64))
    got = run(FUSED, CASE, arguments)
    assert torch.isfinite(got.results[0]).all()
    assert all(error <= 1e-5 for error in errors(got, exact))


def test_more_queries_than_keys(device: torch.device):
    shape = {"B": 2, "N": 5, "H": 2, "d": 24, "R": 70}
    arguments = CASE.make(shape, torch.float32, device)
    exact = run(EAGER, CASE, copied(arguments, torch.float64))
    assert all(error <= 1e-5 for error in errors(run(FUSED, CASE, arguments), exact))


def test_supported():
    takes = {(d, n) for d in (24, 32, 64, 80, 88) for n in (1, 128, 129, 256, 257)}
    takes = {(d, n) for d, n in takes if supports(d, n, torch.bfloat16)}
    wide = {(d, n) for d in (24, 32, 64) for n in (1, 128, 129, 256)}
    assert takes == wide | {(80, 1), (80, 128)}
    assert not supports(32, 16, torch.float64)


@pytest.mark.parametrize(
    ("packed", "queries", "dtype"),
    [
        ((1, 8, 3 * 88), None, torch.float32),
        ((1, 257, 3 * 32), None, torch.float32),
        ((1, 8, 3 * 32 + 1), None, torch.float32),
        ((1, 8, 2 * 32), (2, 4, 32), torch.float32),
        ((1, 8, 2 * 32), (1, 4, 24), torch.float32),
        ((1, 8, 2 * 32), (1, 4, 32), torch.bfloat16),
        ((1, 8, 3 * 32), None, torch.float64),
    ],
)
def test_refused(packed: tuple, queries: tuple | None, dtype: torch.dtype, device: torch.device):
    first = dtype if queries is None else torch.float32
    other = None if queries is None else torch.zeros(queries, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="expected"):
        attention(torch.zeros(packed, dtype=first, device=device), 1, 1.0, other)


def test_compiled_fallback_is_whole_and_warns_once(device: torch.device):
    """Of lengths that change, and while it traces."""
    attention_backends._warn_now.cache_clear()
    torch.compiler.reset()
    call = torch.compile(FUSED.attention, fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tokens in (5, 6, 7):
            packed = torch.randn(1, tokens, 3 * 96, device=device)
            expected = EAGER.attention(packed, 1, 0.1)
            torch.testing.assert_close(call(packed, 1, 0.1), expected)
            FUSED.attention(packed, 1, 0.1)
    assert len([w for w in caught if "computed by SDPA" in str(w.message)]) == 1


def test_the_choice_compiles_once_for_many_lengths(monkeypatch):
    table = {"G": {"attention": {"d32": [[64, "triton"], [128, "flex"]]}}}
    monkeypatch.setattr(_measured, "_tables", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "G")
    torch.compiler.reset()
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    named = attention_backends._NAMED
    known = {function: number for number, function in enumerate(named.values())}
    codes = [list(named).index(name) for name in ("triton", "flex", "sdpa")]

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def code(x: Tensor) -> Tensor:
        return x + known[attention_backends._choose(0, 32, x.shape[0])]

    for tokens in (9, 30, 64, 65, 100, 128, 129, 200, 300):
        kind = 0 if tokens <= 64 else 1 if tokens <= 128 else 2
        assert code(torch.zeros(tokens))[0] == codes[kind]
    assert len(compiled) == 3


@EACH_FORM
@pytest.mark.parametrize("lengths", [None, *LENGTHS[:4]], ids=str)
def test_xformers_gets_what_it_asks_for(
    monkeypatch, lengths: tuple[int, int] | None, targets_only: bool, device: torch.device
):
    """Tensors [B, N, H, d], and a bias whose memory goes on to a multiple of eight."""

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        if attn_bias is not None:
            assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert attn_bias.dtype == q.dtype and attn_bias.stride(-2) % 8 == 0
            assert attn_bias.untyped_storage().nbytes() % (8 * attn_bias.element_size()) == 0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale)
        return out.transpose(1, 2)

    library = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_backends, "import_module", lambda name: library)
    call = attention_backends.attention_backend("xformers")
    given = inputs(targets_only, device)
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    slots = 0 if lengths is None else SLOTS
    expected = outcome(EAGER.attention, given, counts, slots)
    for got, wanted in zip(outcome(call, given, counts, slots), expected, strict=True):
        torch.testing.assert_close(got, wanted)
