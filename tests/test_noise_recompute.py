"""Activations that are computed again in backward hold the noise that they held in forward."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from benchmarks.engine.agreement import relative_error
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.ops import EAGER, FUSED, Ops
from tests.small_predictor import inputs, small

Run = Callable[..., Tensor]
"""Calls the predictor: (predictor, x, masks_x, masks, seed)."""


def plain(
    predictor: nn.Module, x: Tensor, masks_x: list[Tensor], masks: list[Tensor], seed: Tensor | None
) -> Tensor:
    return predictor(x, masks_x, masks, seed=seed)


def checkpointed(*call: Any, **settings: Any) -> Tensor:
    """The whole predictor again in backward."""
    out = checkpoint(plain, *call, **settings)
    assert isinstance(out, Tensor)
    return out


SAVE, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE
PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def selective(tokens: CheckpointPolicy, products: CheckpointPolicy, **settings: Any) -> Run:
    """Keep or compute again stopfast's operations and matrix products; all else is computed again."""

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if getattr(op, "namespace", "") == "stopfast":
            return tokens
        return products if op in PRODUCTS else AGAIN

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpointed, use_reentrant=False, context_fn=contexts, **settings)


def compiled(run: Run, budget: float = 1.0) -> Run:
    """Compiled as one graph; ``budget`` is the part of the activations that the compiler may keep."""

    def call(*arguments: Any) -> Tensor:
        torch.compiler.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return torch.compile(run, backend="aot_eager", fullgraph=True)(*arguments)

    return call


whole = partial(checkpointed, use_reentrant=False)
KINDS: dict[str, tuple[Run, int]] = {
    "blocks": (plain, 1),
    "not reentrant": (whole, 2),
    "not reentrant, RNG not kept": (partial(whole, preserve_rng_state=False), 2),
    "reentrant": (partial(checkpointed, use_reentrant=True), 2),
    "reentrant, RNG not kept": (
        partial(checkpointed, use_reentrant=True, preserve_rng_state=False),
        2,
    ),
    "selective, tokens saved": (selective(SAVE, AGAIN), 1),
    "selective, tokens again": (selective(AGAIN, SAVE), 2),
    "selective, RNG not kept": (selective(AGAIN, AGAIN, preserve_rng_state=False), 2),
    "compiled": (compiled(plain), 1),
    "compiled, half the memory": (compiled(plain, 0.5), 2),
    "compiled, least memory": (compiled(plain, 0.0), 2),
    "compiled, not reentrant": (compiled(whole), 2),
}
"""How a forward is run, and how often its tokens are then made."""
OPS = {"fused": FUSED, "eager": EAGER}


class Result(NamedTuple):
    output: Tensor
    gradients: list[Tensor]
    tokens: list[Tensor]
    """What each call of the fused operation wrote."""


def train(kind: str | None, ops: Ops, seed: Tensor | None, device: torch.device) -> Result:
    """One forward and backward from the same weights; whatever is random in between is drawn anew."""
    run, _ = KINDS[kind] if kind else (plain, 1)
    predictor = small(
        apply_stop=True, apply_to="both", depth=1, ops=ops, checkpointing=kind == "blocks"
    ).to(device)
    x, masks_x, masks = inputs(contexts=2)
    x = x.to(device).requires_grad_()
    masks_x, masks = ([m.to(device) for m in each] for each in (masks_x, masks))
    torch.manual_seed(11)
    with watch_launches() as launches:
        output = run(predictor, x, masks_x, masks, None if seed is None else seed.to(device))
        torch.rand(3, device=device)
        weights = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
        (output * weights).sum().backward()
    written: dict[int, Tensor] = {}
    for made in launches:
        if made.name == "tokens_kernel":  # once for the context, once for the queries
            result = next(a for a in made.arguments if _is_like_tokens(a, output))
            written[id(result)] = result
    gradients = [x.grad, *(p.grad for p in predictor.parameters() if p.requires_grad)]
    return Result(output.detach(), gradients, list(written.values()))


def _is_like_tokens(argument: object, output: Tensor) -> bool:
    return isinstance(argument, Tensor) and argument.ndim == 3 and len(argument) == len(output)


@cache
def reference(ops: str, seed: int | None, device: torch.device) -> Result:
    """Nothing computed again."""
    return train(None, OPS[ops], _step(seed), device)


def _step(seed: int | None) -> Tensor | None:
    return None if seed is None else torch.tensor([seed, 7])


# Compiling is slow, and of the eager definition the compiler with least memory asks for most.
SLOW = {("compiled", "eager"), ("compiled, half the memory", "eager")}


@pytest.mark.parametrize(
    ("kind", "ops"), [(kind, ops) for kind in KINDS for ops in OPS if (kind, ops) not in SLOW]
)
def test_with_a_seed(kind: str, ops: str, device: torch.device):
    """Noise bit for bit the same when computed again, and so are all gradients."""
    expected = reference(ops, 5, device)
    found = train(kind, OPS[ops], _step(5), device)
    if ops == "fused":
        assert len(found.tokens) == KINDS[kind][1]
        assert all(torch.equal(tokens, expected.tokens[0]) for tokens in found.tokens)
    assert torch.equal(found.output, expected.output)
    for mine, its in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(mine, its) or ("compiled" in kind and relative_error(mine, its) < 1e-6)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("kind", [k for k in KINDS if "not kept" not in k and "compiled" not in k])
def test_without_a_seed(kind: str, ops: str, device: torch.device):
    """Torch's generator gives the same seed again where its state is kept, as it is unless asked not to."""
    expected = reference(ops, None, device)
    found = train(kind, OPS[ops], None, device)
    assert not torch.equal(expected.output, reference(ops, 5, device).output)
    assert torch.equal(found.output, expected.output)
    assert all(torch.equal(*pair) for pair in zip(found.gradients, expected.gradients, strict=True))


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("kind", [k for k in KINDS if "not kept" in k])
def test_without_seed_and_generator(kind: str, ops: str, device: torch.device):
    """What a seed is for: without either, backward has noise of its own, and silently wrong gradients."""
    expected = reference(ops, None, device)
    found = train(kind, OPS[ops], None, device)
    assert torch.equal(found.output, expected.output)
    assert not any(torch.equal(tokens, expected.tokens[0]) for tokens in found.tokens[1:])
    errors = [
        relative_error(*pair) for pair in zip(found.gradients, expected.gradients, strict=True)
    ]
    assert max(errors) > 0.5
