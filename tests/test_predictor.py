"""The predictor: what its queries are made of, the order of its rows, and its switches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import relative_error
from stopfast import Predictor
from stopfast.kernels.ops import EAGER
from stopfast.optim import parameter_groups
from tests.golden_files import norm_1e6

N, D, P, B, KX, KY = 16, 24, 16, 3, 5, 4


def small(seed: int = 0, **settings: Any) -> Predictor:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        num_patches=N, embed_dim=D, predictor_embed_dim=P, depth=2, num_heads=2, norm_layer=norm_1e6
    )
    predictor = Predictor(**{**sizes, **settings})
    with torch.no_grad():  # biases start at zero, which would hide a lost one
        for parameter in predictor.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return predictor


def inputs(
    contexts: int = 1, targets: int = 2, seed: int = 1
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def index(count: int) -> Tensor:
        return torch.rand(B, N, generator=generator).argsort(1)[:, :count]

    x = torch.randn(contexts * B, KX, D, generator=generator)
    return x, [index(KX) for _ in range(contexts)], [index(KY) for _ in range(targets)]


class Recorder:
    """Operations that keep the context tokens and the queries of a call."""

    def __init__(self) -> None:
        def keep(name: str):
            def run(*arguments: Any) -> Tensor:
                out = getattr(EAGER, name)(*arguments)
                setattr(self, name, out)
                return out

            return run

        self.context_tokens: Tensor
        self.query_tokens: Tensor
        self.ops = EAGER._replace(
            context_tokens=keep("context_tokens"), query_tokens=keep("query_tokens")
        )


def queries(predictor: Predictor, **call: Any) -> Tensor:
    """Queries less their positions, [M * E * B, Ky, P]."""
    recorder = Recorder()
    predictor.ops = recorder.ops
    x, masks_x, masks = inputs()
    predictor(x, masks_x, masks, **call)
    return recorder.query_tokens - predictor.predictor_pos_embed[0][torch.cat(masks)]


@pytest.mark.spec(9)
@pytest.mark.parametrize("skip_unused", [True, False])
def test_target_blocks_do_not_see_each_other(skip_unused: bool):
    predictor = small(skip_unused=skip_unused)
    x, masks_x, masks = inputs(targets=3)
    before = predictor(x, masks_x, masks).unflatten(0, (3, B))
    other = [masks[0], (masks[1] + 1) % N, masks[2]]
    after = predictor(x, masks_x, other).unflatten(0, (3, B))
    assert [torch.equal(before[m], after[m]) for m in range(3)] == [True, False, True]
    moved = predictor(x + 1, masks_x, masks).unflatten(0, (3, B))
    assert all(not torch.allclose(before[m, b], moved[m, b]) for m in range(3) for b in range(B))


@pytest.mark.spec(10)
def test_rows_and_targets_have_one_order():
    """Two contexts, two targets, three images: each prediction meets the target of its own place.

    A predictor without blocks, whose projection is the identity, predicts the norm of its query, so
    features equal to the queries leave no loss if and only if the orders agree.
    """
    predictor = small(depth=0, embed_dim=P)
    with torch.no_grad():
        predictor.predictor_proj.weight.copy_(torch.eye(P))
        predictor.predictor_proj.bias.zero_()
        predictor.predictor_norm.weight.fill_(1)
        predictor.predictor_norm.bias.zero_()
    _, masks_x, masks = inputs(contexts=2)
    out = predictor(torch.randn(2 * B, KX, P), masks_x, masks)
    features = (predictor.mask_token + predictor.predictor_pos_embed).expand(B, -1, -1)
    assert EAGER.target_smooth_l1(out, features, torch.stack(masks)) < 1e-8
    noisy = small(depth=0, apply_stop=True)
    x, masks_x, masks = inputs(contexts=2)
    noise = [torch.randn(2 * B, KY, D) for _ in masks]
    whole = noisy(x, masks_x, masks, noise=noise)
    for m in range(2):
        for e in range(2):
            rows = slice(e * B, (e + 1) * B)
            alone = noisy(x[rows], masks_x[e], masks[m], noise=[noise[m][rows]])
            assert torch.allclose(whole.unflatten(0, (2, 2, B))[m, e], alone, atol=1e-6)


@pytest.mark.spec(16)
@pytest.mark.parametrize(("variant", "std"), [("stop", 0.25), ("stop_paper", 0.5)])
def test_noise_moments(variant: str, std: float):
    """Mean and covariance of a query: StoP's noise_var is a deviation, the paper's a variance."""
    predictor = small(variant=variant, noise_var=0.25)
    with torch.no_grad():
        predictor.predictor_embed.weight.mul_(20)
    recorder = Recorder()
    predictor.ops = recorder.ops
    batch, tokens = 2048, 16
    index = torch.arange(tokens).expand(batch, -1)
    predictor(torch.zeros(batch, 1, D), index[:, :1], [index] * 2, seed=3)
    rows = recorder.query_tokens - predictor.predictor_pos_embed[0][torch.cat([index] * 2)]
    rows = rows.detach().flatten(0, 1).double()
    weight = predictor.predictor_embed.weight.detach().double()
    expected = std**2 * weight @ weight.T
    offset = (
        predictor.mask_token.view(-1) if variant == "stop_paper" else predictor.predictor_embed.bias
    )
    deviation = (expected.diagonal() / len(rows)).sqrt()
    assert ((rows.mean(0) - offset.detach()).abs() < 5 * deviation).all()
    assert relative_error(rows.T.cov(), expected) < 0.03


@pytest.mark.spec(17)
def test_no_noise_leaves_the_bias():
    """Without noise a query is position + bias; StoP switched off has no bias, I-JEPA its mask token."""
    silent = queries(small(apply_stop=True, noise_var=0.0))
    bias = small().predictor_embed.bias
    assert torch.allclose(silent, bias.expand_as(silent), atol=1e-6)
    assert torch.equal(queries(small(apply_stop=False)), torch.zeros_like(silent))
    ijepa = small()
    assert torch.allclose(queries(ijepa), ijepa.mask_token.expand_as(silent), atol=1e-6)


@pytest.mark.spec(18)
def test_noise_is_fresh_where_it_should_be():
    predictor = small(apply_stop=True)
    x, masks_x, masks = inputs()
    first, again = (predictor(x, masks_x, masks, seed=4) for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(0)
    unseeded = [predictor(x, masks_x, masks) for _ in range(2)]
    assert not torch.allclose(*unseeded)
    torch.manual_seed(0)
    assert torch.equal(predictor(x, masks_x, masks), unseeded[0])
    assert not torch.allclose(first, predictor(x, masks_x, masks, seed=torch.tensor([4, 1])))
    recorder = Recorder()
    predictor.ops = recorder.ops
    same = masks[0][:1].expand(B, -1)
    predictor(x, masks_x, [same, same])
    rows = recorder.query_tokens
    assert len({tuple(row.tolist()) for row in rows.flatten(0, 1)}) == 2 * B * KY


@pytest.mark.spec(18)
def test_noise_of_a_sample_is_its_own():
    """A part of a batch, told its places in it, gets the batch's noise."""
    predictor = small(apply_stop=True, apply_to="both")
    x, masks_x, masks = inputs(contexts=2)
    whole = predictor(x, masks_x, masks, seed=4).unflatten(0, (2, 2, B))
    for part in (slice(0, 1), slice(1, 3)):
        ids = torch.arange(B)[part]
        alone = predictor(
            x.unflatten(0, (2, B))[:, part].flatten(0, 1),
            [mask[part] for mask in masks_x],
            [mask[part] for mask in masks],
            seed=4,
            sample_ids=ids,
        )
        assert torch.allclose(alone.unflatten(0, (2, 2, -1)), whole[:, :, part], atol=1e-6)


@pytest.mark.spec(19)
@pytest.mark.parametrize(
    ("apply_to", "queries_move", "context_moves"),
    [("masked", True, False), ("context", False, True), ("both", True, True)],
)
def test_what_is_noisy(apply_to: str, queries_move: bool, context_moves: bool):
    predictor = small(apply_stop=True, apply_to=apply_to)
    x, masks_x, masks = inputs()
    seen = []
    first, qkv = predictor.predictor_blocks[0], predictor.predictor_blocks[0].attn.qkv
    qkv.register_forward_hook(lambda _module, arguments, _out: seen.append(arguments[0]))
    assert first.norm1 is not None
    for seed in (1, 2):
        predictor(x, masks_x, masks, seed=seed)
    (context, query), (context_2, query_2) = seen[:2], seen[2:]
    assert torch.equal(context, context_2) != context_moves
    assert torch.equal(query, query_2) != queries_move


@pytest.mark.spec(20)
def test_noise_trains_the_projection():
    """The noise path alone gives the tied weight a gradient."""
    predictor = small(apply_stop=True, depth=0)
    x, masks_x, masks = inputs()
    predictor(x, masks_x, masks, seed=1).square().sum().backward()
    assert predictor.predictor_embed.weight.grad.norm() > 0


@pytest.mark.spec(20)
@pytest.mark.parametrize("tie", [True, False])
def test_gradient_at_zero(tie: bool):
    """StoP's Proposition 3.1, with noise of both signs: tied, the weight's gradient at 0 is that of the
    loss without noise; untied, the noise weight's gradient at 0 is 0, so nothing holds it up."""
    predictor = small(apply_stop=True, tie=tie).double()
    noise_weight = predictor.predictor_embed.weight if tie else predictor.noise_embed.weight
    with torch.no_grad():
        noise_weight.zero_()
        if tie:
            predictor.predictor_embed.bias.zero_()
    x, masks_x, masks = inputs()
    target = torch.randn(2 * B, KY, D, dtype=torch.float64)
    noise = [torch.randn(B, KY, D, dtype=torch.float64) for _ in masks]

    def gradient(*factors: float) -> Tensor:
        predictor.zero_grad()
        for factor in factors:
            out = predictor(x.double(), masks_x, masks, noise=[factor * n for n in noise])
            ((out - target).square().sum() / len(factors)).backward()
        return noise_weight.grad.clone()

    silent, one_sided, both = gradient(0.0), gradient(1.0), gradient(1.0, -1.0)
    assert (one_sided - silent).norm() > 1e-3
    if tie:
        assert silent.norm() > 1e-3 and relative_error(both, silent) < 1e-6
    else:
        assert both.norm() < 1e-6 * one_sided.norm()


@pytest.mark.spec(21)
@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, True),
        ({"apply_stop": True}, False),
        ({"apply_stop": False}, False),
        ({"variant": "stop_paper"}, True),
    ],
)
def test_mask_token(settings: dict, used: bool):
    """Only where queries have it is it trainable; it never touches the context."""
    predictor = small(**settings)
    recorder = Recorder()
    predictor.ops = recorder.ops
    x, masks_x, masks = inputs()
    out = predictor(x, masks_x, masks, seed=1)
    out.sum().backward()
    assert predictor.mask_token.requires_grad == used
    assert (predictor.mask_token.grad is not None) == used
    context = recorder.context_tokens.clone()
    with torch.no_grad():
        predictor.mask_token.add_(1)
    assert torch.equal(predictor(x, masks_x, masks, seed=1), out) != used
    assert torch.equal(recorder.context_tokens, context)
    assert ("mask_token" in predictor.state_dict()) and (
        ("predictor_embed.bias" in predictor.state_dict())
        == (settings.get("variant") != "stop_paper")
    )


@pytest.mark.spec(22)
def test_weight_is_shared():
    """One tensor scales noise and context alike, and stands once among the optimiser's."""
    predictor = small(apply_stop=True)
    recorder = Recorder()
    predictor.ops = recorder.ops
    x, masks_x, masks = inputs()
    results = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            predictor.predictor_embed.weight.mul_(factor)
        predictor(x, masks_x, masks, seed=1)
        bias, positions = predictor.predictor_embed.bias, predictor.predictor_pos_embed[0]
        results.append(
            (
                recorder.context_tokens - bias - positions[masks_x[0]],
                recorder.query_tokens - bias - positions[torch.cat(masks)],
            )
        )
    for once, thrice in zip(*results, strict=True):
        assert relative_error(thrice, 3 * once) < 1e-5
    grouped = [p for group in parameter_groups([predictor]) for p in group["params"]]
    assert sum(p is predictor.predictor_embed.weight for p in grouped) == 1
    assert len(grouped) == len({id(p) for p in grouped})


@pytest.mark.spec(23)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("skip_unused", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_costs_change_nothing(depth: int, skip_unused: bool, checkpointing: bool):
    """Recomputation and skipped work leave the loss and every gradient as they are."""
    results = []
    for settings in (
        {"skip_unused": False},
        {"skip_unused": skip_unused, "checkpointing": checkpointing},
    ):
        predictor = small(apply_stop=True, apply_to="both", depth=depth, **settings)
        x, masks_x, masks = inputs(contexts=2)
        x.requires_grad_()
        loss = predictor(x, masks_x, masks, seed=2).square().mean()
        loss.backward()
        results.append([loss, x.grad, *(p.grad for p in predictor.parameters() if p.requires_grad)])
    for plain, other in zip(*results, strict=True):
        assert relative_error(other, plain) < 2e-6


@pytest.mark.spec(24)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype):
    """Positions are added in fp32, whatever the projection's dtype; predictions stay finite."""
    predictor = small(apply_stop=True)
    recorder = Recorder()
    predictor.ops = recorder.ops
    x, masks_x, masks = inputs()
    exact = predictor(x, masks_x, masks, seed=1)
    exact_queries = recorder.query_tokens
    with torch.autocast("cpu", dtype):
        out = predictor(x, masks_x, masks, seed=1)
    assert recorder.query_tokens.dtype == recorder.context_tokens.dtype == torch.float32
    assert out.isfinite().all() and relative_error(out.float(), exact) < 0.05
    assert (recorder.query_tokens - exact_queries).abs().max() < 0.02


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        ({"cov": "fixed"}, P),
        ({"tie": False}, D),
        ({"tie": False, "noise_dim": "predictor"}, P),
        ({"variant": "stop_paper"}, D),
    ],
)
def test_noise_switches(settings: dict, channels: int):
    """Each switch makes the queries it says, from draws of its own width."""
    predictor = small(**{"apply_stop": None if "variant" in settings else True, **settings})
    noise = [torch.randn(B, KY, channels) for _ in range(2)]
    got = queries(predictor, noise=noise)
    weight = None if settings.get("cov") == "fixed" else predictor.predictor_embed.weight
    if predictor.noise_embed is not None:
        weight = predictor.noise_embed.weight
    offset = predictor.mask_token if "variant" in settings else predictor.predictor_embed.bias
    projected = torch.cat(noise) if weight is None else torch.cat(noise) @ weight.T
    assert torch.allclose(got, projected + offset, atol=1e-5)


def test_context_noise_is_added_before_the_blocks():
    predictor = small(apply_stop=True, apply_to="context")
    x, masks_x, masks = inputs()
    noise = torch.randn(B, KX, D)
    got = predictor(x, masks_x, masks, noise_context=noise)
    silent = small(apply_stop=True, noise_var=0.0)
    assert torch.allclose(got, silent(x + noise, masks_x, masks), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "mae"}, "variant"),
        ({"variant": "ijepa", "apply_stop": True}, "apply_stop"),
        ({"variant": "stop_paper", "apply_stop": False}, "apply_stop"),
        ({"apply_to": "all"}, "apply_to"),
        ({"cov": "full"}, "cov"),
        ({"noise_dim": "predictor"}, "noise_dim"),
        ({"cov": "fixed", "noise_dim": "encoder"}, "noise_dim"),
        ({"noise_var": -1.0}, "noise_var"),
        ({"num_patches": 12}, "grid_size"),
        ({"num_patches": 12, "grid_size": (3, 3)}, "grid"),
        ({"drop_rate": 0.1}, "drop_rate"),
        ({"ops": "turbo"}, "ops"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, mx, m: ((x[:2], mx, m), {}), "expected x"),
        (lambda x, mx, m: ((x, mx, [m[0], m[1][:, :2]]), {}), "one shape"),
        (lambda x, mx, m: ((x, mx, []), {}), "one shape"),
        (lambda x, mx, m: ((x, mx, [t[:2] for t in m]), {}), "expected x"),
        (lambda x, mx, m: ((x, mx, m), {"noise": [torch.zeros(B, KY, D)]}), "expected noise"),
        (lambda x, mx, m: ((x, mx, m), {"noise_context": torch.zeros(B, KX, D)}), "no noise"),
    ],
)
def test_bad_input(change, message: str):
    arguments, call = change(*inputs())
    with pytest.raises(ValueError, match=message):
        small(apply_stop=True)(*arguments, **call)


@pytest.mark.parametrize(
    "settings",
    [{}, {"variant": "stop_paper", "noise_var": 0.3}, {"cov": "fixed", "apply_stop": True}],
)
def test_saved_and_loaded(settings: dict, tmp_path):
    predictor = small(**settings)
    predictor.save_pretrained(tmp_path)
    loaded = Predictor.from_pretrained(tmp_path)
    x, masks_x, masks = inputs()
    assert torch.equal(loaded(x, masks_x, masks, seed=1), predictor(x, masks_x, masks, seed=1))


def test_lenient_loads_are_errors(tmp_path):
    """A file that lacks a weight does not load: the hub's own default leaves the weight random."""
    from safetensors.torch import load_file, save_file

    small().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "mask_token"}, file)
    with pytest.raises(RuntimeError, match="mask_token"):
        Predictor.from_pretrained(tmp_path)


def test_copies_and_grids():
    """A deep copy computes the same; positions move to another grid; a single mask needs no list."""
    predictor = small(num_patches=12, grid_size=(3, 4))
    x, masks_x, masks = inputs()
    masks_x, masks = [m % 12 for m in masks_x], [m % 12 for m in masks]
    assert torch.equal(copy.deepcopy(predictor)(x, masks_x, masks), predictor(x, masks_x, masks))
    assert torch.equal(predictor(x, masks_x[0], masks[0]), predictor(x, masks_x, masks[:1]))
    predictor.resize_positions((6, 8))
    assert predictor.predictor_pos_embed.shape == (1, 48, P) and predictor.grid_size == (6, 8)
    assert predictor(x, masks_x, [m + 30 for m in masks]).shape == (2 * B, KY, D)
