"""DropPos's smoothed labels and their loss: cases 31, 33, 34, 36 and 37 of the specification."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.kernels.ops import EAGER, FUSED, Ops, Smoothing, position_map
from tests.golden_files import golden

GRID = (14, 14)
BOTH = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])


def whole(norm: str, sigma: float = 1.0, grid: tuple[int, int] = GRID) -> Tensor:
    return position_map(Smoothing(grid, norm), torch.tensor(sigma, dtype=torch.float64))


def drawn(batch: int, visible: int, positions: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "logits": torch.randn(batch, visible, positions, device=device),
        "index": torch.randint(positions, (batch, visible), device=device),
        "weight": torch.rand(batch, visible, device=device),
    }


@pytest.mark.spec(33)
@pytest.mark.parametrize("sigma", ["0.5", "1.0", "2.0"])
def test_golden_map(sigma: str):
    """Divided by the sums of columns, not of rows, and by distances squared."""
    settings, tensors = golden(f"droppos_smooth_map_{sigma}")
    expected = tensors["map"].double()
    side = settings["grid"]
    found = whole("column", settings["sigma"], (side, side))[: len(expected)]
    assert (found - expected).abs().max() <= 2e-7  # the file is fp32


@pytest.mark.spec(33)
@pytest.mark.parametrize("sigma", ["0.5", "1.0", "2.0"])
@BOTH
def test_gradient_of_the_golden_map(sigma: str, ops: Ops, device: torch.device):
    """Of equal logits and weights it is each label's sum over 196, less the label: no map of ours."""
    settings, tensors = golden(f"droppos_smooth_map_{sigma}", device)
    labels, side = tensors["map"].double(), settings["grid"]
    count, positions = labels.shape
    logits = torch.zeros(1, count, positions, device=device, requires_grad=True)
    loss = ops.position_cross_entropy(
        logits,
        torch.arange(count, device=device)[None],
        torch.ones(1, count, device=device),
        torch.tensor(settings["sigma"], device=device),
        Smoothing((side, side), "column"),
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = (labels.sum(1, keepdim=True) / positions - labels) / count
    assert relative_error(gradient[0], expected) < 1e-6


@pytest.mark.spec(33)
def test_properties_of_the_map():
    column, row = whole("column"), whole("row")
    one = torch.ones(196, dtype=torch.float64)
    assert torch.allclose(row.sum(1), one) and torch.allclose(column.sum(0), one)
    assert torch.allclose(column, row.T)  # the weights themselves are symmetric
    place = {"corner": 0, "edge": 7, "interior": 7 * 14 + 7}
    for name, total, own in (
        ("corner", 0.8863, 0.5203),
        ("edge", 0.9415, 0.4069),
        ("interior", 1.0, 0.3182),
    ):
        assert column[place[name]].sum().item() == pytest.approx(total, abs=1e-4)
        for each in (row, column):
            assert each[place[name], place[name]].item() == pytest.approx(own, abs=1e-4)
    assert (row - column).abs().max().item() == pytest.approx(0.040, abs=5e-4)
    # Rows and columns of the grid are not mistaken for each other.
    oblong = whole("row", 1.0, (2, 5))
    assert oblong[0, 5] == oblong[0, 1] > oblong[0, 2] > oblong[0, 3]


@pytest.mark.spec(33)
def test_released_grid():
    """16 wide, of which 14 x 14 entries are used: what lies above is two columns off, ends lose mass."""
    released = whole("column", 1.0, (16, 16))[:196, :196]
    assert released.sum(1).min().item() == pytest.approx(0.659, abs=1e-3)
    centre = 6 * 14 + 7
    near = released[centre].topk(5).indices.tolist()
    offsets = {(each // 14 - centre // 14, each % 14 - centre % 14) for each in near}
    assert offsets == {(0, 0), (0, 1), (0, -1), (1, 2), (-1, -2)}


@pytest.mark.spec(34)
@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1 / 800])
@BOTH
def test_no_smoothing(sigma: float, ops: Ops, device: torch.device):
    """Sigma 0 is the identity, and so is the last epoch's: plain cross-entropy of the dropped ones."""
    given = drawn(2, 5, 196, device)
    expected = F.cross_entropy(given["logits"][0], given["index"][0])
    given["weight"][0], given["weight"][1] = 1, 0
    for norm in ("row", "column"):
        assert torch.equal(whole(norm, sigma), torch.eye(196, dtype=torch.float64))
        smoothing = Smoothing(GRID, norm)
        loss = ops.position_cross_entropy(
            **given, sigma=torch.tensor(sigma, device=device), smoothing=smoothing
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.spec(31)
@pytest.mark.spec(36)
@pytest.mark.parametrize("smoothing", [Smoothing(GRID), Smoothing((16, 16), "row")], ids=str)
@BOTH
def test_loss_of_a_batch(smoothing: Smoothing, ops: Ops, device: torch.device):
    """One sum over the batch by one sum of weights, of labels that are never made up to 1."""
    given, sigma = drawn(3, 7, 196, device), torch.tensor(1.3, device=device)
    given["weight"][0], given["weight"][1, 2] = 0, 5  # images differ, so a mean of means would show

    def loss(**changed: Tensor) -> float:
        return ops.position_cross_entropy(
            **{**given, **changed}, sigma=sigma, smoothing=smoothing
        ).item()

    labels = position_map(smoothing, sigma)[:196, :196][given["index"]].flatten(0, 1)
    each = F.cross_entropy(given["logits"].flatten(0, 1), labels, reduction="none")
    expected = (each @ given["weight"].flatten() / given["weight"].sum()).item()
    assert loss() == pytest.approx(expected, rel=1e-6)
    twice = {name: torch.cat([t, t]) for name, t in given.items()}
    assert loss(**twice) == pytest.approx(expected, rel=1e-6)
    assert loss(weight=3 * given["weight"]) == pytest.approx(expected, rel=1e-6)
    other = given["logits"].clone()
    other[0] = 100  # patches that kept their position
    assert loss(logits=other) == pytest.approx(expected, rel=1e-6)
    assert loss(weight=torch.zeros_like(given["weight"])) == 0.0
    sigma.zero_()
    assert loss(logits=torch.zeros_like(other)) == pytest.approx(math.log(196), rel=1e-6)


@pytest.mark.spec(37)
@pytest.mark.parametrize("norm", ["row", "column"])
@BOTH
def test_confident_patches_are_ignored(norm: str, ops: Ops, device: torch.device):
    """From the label's own share on, exactly; which gets neither loss nor gradient."""
    index = torch.tensor([[0, 7, 105, 105]], device=device)
    sigma = torch.tensor(1.0, device=device)
    own = position_map(Smoothing(GRID, norm), sigma).diagonal()[index[0]].double()
    likely = own + torch.tensor([1e-4, -1e-4, 1e-4, -1e-4], device=device)
    logits = torch.zeros(1, 4, 196, dtype=torch.float64, device=device)
    logits[0, torch.arange(4), index[0]] = torch.log(195 * likely / (1 - likely))
    logits = logits.float().requires_grad_()
    weight = torch.tensor([[1.0, 2.0, 4.0, 0.5]], device=device)

    def loss(ignored: bool, weight: Tensor) -> Tensor:
        smoothing = Smoothing(GRID, norm, ignored)
        return ops.position_cross_entropy(logits, index, weight, sigma, smoothing)

    found = loss(True, weight)
    kept = torch.tensor([[0.0, 2.0, 0.0, 0.5]], device=device)
    assert found.item() == pytest.approx(loss(False, kept).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, logits)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [False, True, False, True]
    # Equality counts as confident: with the certain ones left out, the mean is that of the others.
    sigma.zero_()
    with torch.no_grad():
        logits.zero_()[0, :3].scatter_(1, index[0, :3, None], 200.0)
    assert loss(True, weight).item() == pytest.approx(math.log(196), rel=1e-6)
    assert loss(True, weight * (logits.detach()[0].amax(-1) > 0)).item() == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_a_replayed_graph_takes_another_sigma(ops: Ops, device: torch.device):
    """Loss and gradient of a captured call are those of sigma as it is when the graph is replayed."""
    given = drawn(8, 49, 196, device)
    given["logits"].requires_grad_()
    sigma = torch.ones((), device=device)

    def call() -> list[Tensor]:
        loss = ops.position_cross_entropy(**given, sigma=sigma, smoothing=Smoothing(GRID))
        return [loss, *torch.autograd.grad(loss, given["logits"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    seen = []
    for value in (2.0, 0.5, 0.0):
        sigma.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))
        seen.append(captured[0].item())
    assert len(set(seen)) == 3
