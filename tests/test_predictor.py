"""The predictor: the order of its rows, what costs must not change, and what it refuses."""

import copy
from typing import Any

import pytest
import torch

from benchmarks.engine.agreement import relative_error
from stopfast import Predictor
from stopfast.kernels.ops import EAGER
from tests.small_predictor import KX, KY, B, D, N, P, Recorder, inputs, small


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
    with torch.autocast("cpu", dtype):
        predictor(x, masks_x, masks, noise=[torch.zeros(len(x), KY, D)] * len(masks))
    positions = predictor.predictor_pos_embed[0][torch.cat(masks)]
    assert torch.equal(recorder.query_tokens, positions + predictor.predictor_embed.bias)


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
        (lambda x, mx, m: ((x, mx, m), {"sample_ids": torch.arange(1)}), "sample_ids"),
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


def test_copies_and_grids(tmp_path):
    """A deep copy computes the same; positions move to another grid; a single mask needs no list."""
    predictor = small(num_patches=12, grid_size=(3, 4))
    x, masks_x, masks = inputs()
    masks_x, masks = [m % 12 for m in masks_x], [m % 12 for m in masks]
    assert torch.equal(copy.deepcopy(predictor)(x, masks_x, masks), predictor(x, masks_x, masks))
    assert torch.equal(predictor(x, masks_x[0], masks[0]), predictor(x, masks_x, masks[:1]))
    predictor.resize_positions((6, 8))
    assert predictor.predictor_pos_embed.shape == (1, 48, P) and predictor.grid_size == (6, 8)
    assert predictor(x, masks_x, [m + 30 for m in masks]).shape == (2 * B, KY, D)
    predictor.save_pretrained(tmp_path)
    assert Predictor.from_pretrained(tmp_path).grid_size == (6, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("apply_to", ["masked", "both"])
def test_other_precisions(dtype: torch.dtype, apply_to: str):
    """A model that is itself in another precision draws the same noise, and follows fp32."""
    predictor = small(apply_stop=True, apply_to=apply_to)
    x, masks_x, masks = inputs()
    expected = predictor(x, masks_x, masks, seed=1)
    out = predictor.to(dtype)(x.to(dtype), masks_x, masks, seed=1)
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < {torch.float64: 1e-5}.get(dtype, 0.05)


@pytest.mark.parametrize("apply_stop", [None, True])
def test_compiled_once_for_all_lengths(apply_stop: bool | None):
    """Mask lengths change every step: after the first length's own, one graph serves them."""
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    predictor = small(apply_stop=apply_stop)
    compiled = torch.compile(predictor, fullgraph=True, backend=count)
    for step in range(12):
        kx, ky = 3 + step % 5, 2 + step % 4
        order = torch.rand(B, N).argsort(1)
        arguments = torch.randn(B, kx, D), [order[:, :kx]], [order[:, -ky:], order[:, 3 : 3 + ky]]
        seed = torch.tensor([1, step])
        expected = predictor(*arguments, seed=seed)
        assert torch.allclose(compiled(*arguments, seed=seed), expected, atol=1e-6)
    assert len(graphs) <= 3


def test_norms_that_cannot_be_saved_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LayerNorm"):
        small(norm_layer=torch.nn.RMSNorm).save_pretrained(tmp_path)
    bare = small(norm_layer={"eps": 1e-3, "elementwise_affine": False})
    bare.save_pretrained(tmp_path)
    norm = Predictor.from_pretrained(tmp_path).predictor_norm
    assert norm.eps == 1e-3 and norm.weight is None
