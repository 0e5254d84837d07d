"""The noise that the fused predictor_tokens adds: the definition's, in any tiling and order, never twice.

And the noise that its backward draws again: the one that forward added.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.kernels._launch import Launch, interpreted, watch_launches
from stopfast.kernels._token_kernels import RANGE, Tiles, tokens_kernel
from stopfast.kernels.noise import positional_noise
from stopfast.kernels.ops import EAGER, FUSED, Noise, Ops, Places
from tests.noise_battery import error_limit, fused_draw, repeats
from tests.small_predictor import B, inputs, small

SEEDS = [0, 1, 16, 1 << 31, 1 << 32, (1 << 63) - 1]
STEPS = [0, 1, 16, 1 << 31, (1 << 32) - 1]
BLOCKS, COPIES, KEPT, QUERIED, DEPTH, WIDTH = 2, 2, 6, 9, 24, 40
Call = tuple[Tensor, Tensor]
"""Seed and sample ids."""


class Tokens:
    """Tokens that are noise of deviation 1 and what ``x`` makes, which is nothing if it is not given."""

    def __init__(
        self,
        call: Call,
        weight: Tensor | None = None,
        x: Tensor | None = None,
        x_weight: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        seed, ids = call
        device, batch = seed.device, len(ids)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.places = Places(
            zeros(COPIES * batch, KEPT, dtype=torch.int64),
            zeros(BLOCKS, batch, QUERIED, dtype=torch.int64),
            lengths,
        )
        self.x = zeros(COPIES * batch, KEPT, DEPTH) if x is None else x
        self.weight = zeros(WIDTH, DEPTH) if x_weight is None else x_weight
        self.positions = zeros(1, WIDTH)
        self.noise = Noise(seed, ids, 1.0, weight, on_queries=True, on_context=True)

    def of(self, ops: Ops) -> Tensor:
        """[M, E, B, Kx + Ky, P]."""
        out = ops.predictor_tokens(
            self.x, self.places, self.weight, None, self.positions, None, self.noise
        )
        return out.view(BLOCKS, COPIES, -1, KEPT + QUERIED, WIDTH)


def alone(call: Call, weight: Tensor | None = None, ops: Ops = FUSED) -> Tensor:
    """Noise, and noise projected."""
    return Tokens(call, weight).of(ops)


def identity(device: torch.device) -> Tensor:
    return torch.eye(WIDTH, device=device)


def trained(call: Call, gradient: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Gradient of a weight that projects nothing but noise."""
    weight = torch.randn(WIDTH, WIDTH, device=gradient.device, requires_grad=True)
    (found,) = torch.autograd.grad(
        Tokens(call, weight, lengths=lengths).of(FUSED), weight, gradient
    )
    return found


def like_tokens(call: Call, width: int = WIDTH) -> Tensor:
    """A random gradient."""
    return torch.randn(BLOCKS, COPIES, len(call[1]), KEPT + QUERIED, width, device=call[0].device)


@pytest.fixture
def call(device: torch.device) -> Call:
    ids = torch.tensor([4, 0, 9, (1 << 32) - 1], device=device)
    return torch.tensor([5, 7], device=device), ids


def test_fused_is_the_definition(call: Call):
    """As it is and through an identity: within 1e-6 of fp64, and of the eager noise by what that is off."""
    for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 2e-6)):
        query = positional_noise(*call, BLOCKS, COPIES, QUERIED, WIDTH, False, dtype)
        context = positional_noise(*call, 1, COPIES, KEPT, WIDTH, True, dtype)
        defined = torch.cat([context.expand(BLOCKS, -1, -1, -1), query], dim=2)
        defined = defined.unflatten(1, (COPIES, -1))
        for weight in (None, identity(call[0].device)):
            error = (alone(call, weight) - defined).abs()
            assert (error <= error_limit(defined, least=limit)).all()
    assert torch.equal(alone(call, ops=EAGER), defined)


def retile(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    own = tiles._replace(rows=min(tiles.rows, RANGE))
    monkeypatch.setattr("stopfast.kernels.predictor_tokens.token_tiles", lambda dtype: tiles)
    monkeypatch.setattr("stopfast.kernels._token_gradients.noise_weight_tiles", lambda dtype: own)


@pytest.mark.parametrize("tiles", [(16, 64, 16), (32, 16, 64), (128, 32, 32)], ids=str)
def test_tiles(tiles: tuple[int, int, int], call: Call, monkeypatch: pytest.MonkeyPatch):
    """The same bits in tiles of any rows, depth and columns, and the same noise drawn again in backward."""
    weight, gradient = identity(call[0].device), like_tokens(call)
    before = alone(call), alone(call, weight), trained(call, gradient)
    retile(monkeypatch, Tiles(*tiles, 4))
    with watch_launches() as launches:
        after = alone(call), alone(call, weight), trained(call, gradient)
    assert {made.constants["ROWS"] for made in launches} == {tiles[0], min(tiles[0], RANGE)}
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert relative_error(after[2], before[2]) < 1e-6  # summed in another order


def test_order_of_programs(call: Call, monkeypatch: pytest.MonkeyPatch):
    """The interpreter runs each grid from its end."""
    if not interpreted(tokens_kernel):
        pytest.skip("a GPU runs programs in no order")
    from triton.runtime.interpreter import InterpreterBuilder

    retile(monkeypatch, Tiles(32, 32, 128, 4))  # several programs along each axis
    weight, gradient = identity(call[0].device), like_tokens(call)
    before = alone(call), alone(call, weight), trained(call, gradient)
    seen, plain = [], InterpreterBuilder.set_grid_idx

    def backwards(builder: Any, *place: int) -> None:
        seen.append(tuple(size - 1 - at for at, size in zip(place, builder.grid_dim, strict=True)))
        plain(builder, *seen[-1])

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    after = alone(call), alone(call, weight), trained(call, gradient)
    assert seen[0] != (0, 0, 0) and len(set(seen)) > 8
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_order_of_samples(call: Call):
    seed, ids = call
    order = torch.tensor([2, 0, 3, 1], device=ids.device)
    assert torch.equal(alone((seed, ids[order])), alone(call)[:, :, order])


@pytest.mark.parametrize("kind", ["ids strided", "ids expanded", "ids int32", "seed strided"])
def test_layout_of_seed_and_ids(kind: str, device: torch.device):
    """A rank may take every other image, and a step its seed from a table."""
    seed, ids = torch.tensor([5, 7], device=device), torch.arange(6, device=device)
    given = {
        "ids strided": (seed, ids[::2]),
        "ids expanded": (seed, ids[1:2].expand(3)),
        "ids int32": (seed, ids.int()),
        "seed strided": (torch.tensor([[5, 0], [7, 0]], device=device)[:, 0], ids),
    }[kind]
    plain = given[0].clone(), given[1].long().contiguous()
    gradient = like_tokens(given)
    assert torch.equal(alone(given), alone(plain))
    assert torch.equal(trained(given, gradient), trained(plain, gradient))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": torch.tensor([1])},
        {"seed": torch.tensor([1, 2], dtype=torch.int32)},
        {"blocks": 257},
        {"copies": 129},
        {"tokens": 65537},
    ],
    ids=["one number", "int32", "blocks", "copies", "tokens"],
)
def test_what_the_definition_refuses(wrong: dict[str, Any], device: torch.device):
    """A count beyond its bits would give two tokens the same noise, as a seed without a step would."""
    good = dict(
        seed=torch.tensor([1, 2]),
        sample_ids=torch.arange(1),
        blocks=1,
        copies=1,
        tokens=1,
        channels=16,
    )
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in {**good, **wrong}.items()}
    for draw in (positional_noise, fused_draw):
        with watch_launches(run=False), pytest.raises(ValueError, match="expected"):
            draw(**given)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("real", [None, (4, 5)], ids=["whole", "padded"])
def test_backward_draws_the_noise_of_forward(tied: bool, real: tuple[int, int] | None, call: Call):
    """The weight's gradient is ``gradient.T @ noise``, noise being what an identity lets through."""
    seed, ids = call
    device, batch = seed.device, len(ids)
    lengths = None if real is None else torch.tensor(real, dtype=torch.int32, device=device)
    x = torch.randn(COPIES * batch, KEPT, DEPTH, device=device)
    weight = torch.randn(WIDTH, DEPTH, device=device, requires_grad=True)
    own = weight if tied else torch.randn(WIDTH, DEPTH, device=device, requires_grad=True)
    gradient = like_tokens(call)
    out = Tokens(call, own, x, weight, lengths).of(FUSED)
    found = torch.autograd.grad(out, own, gradient)[0]

    def expected(call: Call) -> Tensor:
        through = torch.eye(WIDTH, DEPTH, device=device)
        noise = Tokens(call, through, lengths=lengths).of(FUSED)[..., :DEPTH].double()
        total = gradient.double().flatten(0, -2).T @ noise.flatten(0, -2)
        if tied:
            shown = x.double().view(COPIES, batch, KEPT, DEPTH).expand(BLOCKS, -1, -1, -1, -1)
            kept = KEPT if real is None else real[0]
            rows = [t[..., :kept, :].flatten(0, -2) for t in (gradient.double(), shown)]
            total = total + rows[0].T @ rows[1]
        return total

    assert relative_error(found, expected(call)) < 1e-6
    assert relative_error(found, expected((seed + torch.tensor([0, 1], device=device), ids))) > 0.1


def specialised(launch: Launch) -> tuple[Any, ...]:
    """All that a compiled kernel depends on, and more: every number, and how tensors are aligned."""
    arguments = [
        (a.dtype, a.shape, a.stride(), a.data_ptr() % 16) if isinstance(a, Tensor) else a
        for a in launch.arguments
    ]
    return launch.name, arguments, launch.constants, launch.options


def test_seeds_and_steps_change_no_launch(device: torch.device):
    """A predictor launches the same specialisations for every seed and step, forwards and backwards."""
    predictor = small(apply_stop=True, apply_to="both", depth=1, ops=FUSED).to(device)
    x, masks_x, masks = inputs()
    x, masks_x, masks = x.to(device), [m.to(device) for m in masks_x], [m.to(device) for m in masks]
    made = []
    pairs = zip(SEEDS, [*STEPS, 0], strict=True)
    seeds: list[Any] = [torch.tensor(pair, device=device) for pair in pairs]
    for seed in [*seeds, *SEEDS[1::2], None]:
        with watch_launches() as launches:
            predictor(x, masks_x, masks, seed=seed).sum().backward()
        made.append([specialised(launch) for launch in launches])
    assert len(made[0]) >= 4
    assert all(launches == made[0] for launches in made)


def test_seeds_and_steps_never_repeat(device: torch.device):
    """No four normals of one counter come twice in thirty steps, nor does a context have its queries'."""
    ids = torch.arange(B, device=device)
    drawn = [
        fused_draw(
            torch.tensor([seed, step], device=device), ids, blocks, 2, 4, 32, context=blocks == 1
        ).flatten()
        for seed in SEEDS
        for step in STEPS
        for blocks in (1, 2)
    ]
    together = torch.cat(drawn).cpu()
    assert repeats(together) == 1
    assert repeats(torch.cat([together, together[:4]])) == 0


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
def test_compiled_once(ops: Ops, device: torch.device):
    """Seeds and steps in a tensor: one graph for all, and the noise of the call without a compiler."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    ids = torch.arange(4, device=device)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda seed: alone((seed, ids), ops=ops), backend=backend, fullgraph=True
    )
    for seed in SEEDS:
        pair = torch.tensor([seed, STEPS[seed % 5]], device=device)
        assert torch.equal(compiled(pair), alone((pair, ids), ops=ops))
    assert len(graphs) == 1
