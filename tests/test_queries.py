"""What the predictor's queries are made of: positions, noise, bias and mask token."""

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.optim import parameter_groups
from tests.small_predictor import KX, KY, B, D, P, Recorder, inputs, queries, small


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
