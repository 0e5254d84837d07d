"""The eager definitions are right themselves: fp64 derivatives, and plain loops beside them."""

import pytest
import torch
from torch import Tensor

from stopfast.kernels import reference, reference_losses
from stopfast.kernels.arguments import PatchTarget

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


@pytest.mark.spec(43)
@pytest.mark.parametrize("norm", ["none", "patch", "channel"])
def test_patches_by_loops(norm):
    """Values lie in the order (row, column, channel); variances are unbiased, eps in or behind the root."""
    side, channels, eps = 3, 2, {"none": (), "patch": (0.02,), "channel": (0.02, 0.3)}[norm]
    images, places = draw(2, channels, 6, 9, grad=False), torch.tensor([[5, 0, 2], [1, 1, 4]])
    prediction = draw(2, 3, side * side * channels)
    target, expected = torch.empty_like(prediction), 0.0
    for b in range(2):
        for k, place in enumerate(places[b].tolist()):
            top, left = side * (place // 3), side * (place % 3)
            patch = images[b, :, top : top + side, left : left + side].clone()
            if norm == "patch":
                patch = (patch - patch.mean()) / (patch.var() + eps[0]).sqrt()
            for c in range(channels if norm == "channel" else 0):
                patch[c] = (patch[c] - patch[c].mean()) / (patch[c].std() + eps[c])
            target[b, k] = torch.stack(
                [patch[c, r, x] for r in range(side) for x in range(side) for c in range(channels)]
            )
            expected += (prediction[b, k] - target[b, k]).square().mean().item() / 6
    settings = PatchTarget(side, norm, eps)
    loss = reference_losses.patch_mse(prediction, images, places, settings)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert reference_losses.patch_mse(target, images, places, settings).item() < 1e-24
    whole = draw(2, 6, side * side * channels)
    every = torch.arange(6).expand(2, 6)
    assert torch.equal(
        reference_losses.patch_mse(whole, images, None, settings),
        reference_losses.patch_mse(whole, images, every, settings),
    )


@pytest.mark.spec(43)
@pytest.mark.parametrize(("norm", "values"), [("channel", 256), ("patch", 768)])
def test_variances_are_unbiased(norm: str, values: int):
    """A prediction of 0 costs (n - 1) / n, n being the values that are normed together."""
    images = 5 * draw(2, 3, 32, 32, grad=False) + 3
    settings = PatchTarget(16, norm, (1e-9,) * (3 if norm == "channel" else 1))
    loss = reference_losses.patch_mse(torch.zeros(2, 4, 768), images, None, settings)
    assert loss.item() == pytest.approx((values - 1) / values, rel=1e-6)
