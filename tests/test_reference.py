"""The eager definitions are right themselves: fp64 derivatives, and plain loops beside them."""

import pytest
import torch
from torch import Tensor

from stopfast.kernels import reference

M, E, B, N, KX, KY, D, P = 2, 2, 3, 9, 4, 2, 6, 8


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def index(*shape: int) -> Tensor:
    return torch.stack(
        [torch.randperm(N)[: shape[-1]] for _ in range(torch.Size(shape[:-1]).numel())]
    ).view(shape)


def test_tokens_by_loops():
    """Rows are ordered (mask, context, image), and each takes its own index and noise."""
    torch.manual_seed(0)
    places, noise = index(M, B, KY), draw(M, E * B, KY, D)
    positions, offset, weight = draw(N, P), draw(P), draw(P, D)
    queries = reference.query_tokens(places, E, positions, offset, noise, weight)
    for m in range(M):
        for e in range(E):
            for b in range(B):
                row = positions[places[m, b]] + offset + noise[m, e * B + b] @ weight.T
                assert torch.allclose(queries[(m * E + e) * B + b], row)


def test_attention_by_softmax():
    q, k, v = draw(2, 3, P), draw(2, 5, P), draw(2, 5, P)
    out = reference.attention(torch.cat([k, v], -1), 2, 0.3, q)
    half = P // 2
    for head in (slice(0, half), slice(half, P)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) * 0.3).softmax(-1)
        assert torch.allclose(out[..., head], weights @ v[..., head])


@pytest.mark.spec(12)
@pytest.mark.parametrize(
    ("distance", "expected"),
    [(0.0, 0.0), (0.4, 0.08), (-0.4, 0.08), (1.0, 0.5), (3.0, 2.5), (-3.0, 2.5)],
)
def test_loss_is_smooth_l1(distance: float, expected: float):
    torch.manual_seed(0)
    features, places = draw(B, N, D, grad=False), index(M, B, KY)
    target = torch.nn.functional.layer_norm(features, (D,))
    rows = torch.cat([torch.stack([target[b, places[m, b]] for b in range(B)]) for m in range(M)])
    loss = reference.target_smooth_l1(rows + distance, features, places)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.spec(11)
def test_targets_are_normed_per_token():
    """Mean 0 and (biased) variance 1 of each token: scale and shift of a token change nothing."""
    torch.manual_seed(0)
    features, places = draw(B, N, 64, grad=False), index(M, B, KY)
    prediction = draw(M * B, KY, 64)
    loss = reference.target_smooth_l1(prediction, features, places)
    moved = features * 7 + torch.randn(B, N, 1, dtype=torch.float64)
    assert reference.target_smooth_l1(prediction, moved, places).item() == pytest.approx(
        loss.item(), rel=1e-4
    )
    far = torch.full_like(
        prediction, 100.0
    )  # beyond 1 the loss is linear: it tells the mean target
    assert reference.target_smooth_l1(far, features, places).item() == pytest.approx(99.5, abs=1e-9)
    rows = features[torch.arange(B)[:, None], places[0]]
    unit = (rows - rows.mean(-1, keepdim=True)) / rows.var(-1, unbiased=False, keepdim=True).sqrt()
    assert reference.target_smooth_l1(unit, features, places[:1]).item() < 1e-9
