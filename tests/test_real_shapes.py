"""The fused operations at the published models' shapes, which takes a GPU; elsewhere at small ones."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.engine.agreement import peak_bytes
from benchmarks.step.published_model import PublishedPredictor
from stopfast import Predictor
from stopfast.kernels.cases import CASES, Case, Shape
from stopfast.kernels.ops import EAGER, FUSED
from tests.kernel_runs import copied, run

GPU = torch.cuda.is_available()
REPEATS = 250 if GPU else 3
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def _shapes() -> Iterator:
    for case in CASES:
        shapes = case.timed if GPU else {"small": case.tested[0]}
        for name, shape in shapes.items():
            batches = (64, 128) if GPU and shape.get("B") in (64, 128) else (shape.get("B"),)
            for batch in batches:
                sized = shape if batch is None else {**shape, "B": batch}
                yield pytest.param(case, sized, id=f"{case.name}-{name}-{batch}")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("case", "shape"), list(_shapes()))
def test_error_bounds(case: Case, shape: Shape, dtype: str, device: torch.device):
    """Error against fp64 at most twice the eager one's (gradients three times), plus an ulp floor.

    The floor is the rounding of a result that the eager arm may happen to have exactly.
    """
    arguments = case.make(shape, HALF[dtype], device)
    exact = run(EAGER, case, copied(arguments, torch.float64))
    eager, fused = (run(ops, case, copied(arguments)) for ops in (EAGER, FUSED))
    for kind, factor in (("results", 2), ("gradients", 3)):
        for got, plain, true in zip(
            *(getattr(r, kind) for r in (fused, eager, exact)), strict=True
        ):
            if true is None:
                assert got is None and plain is None
            elif not true.is_floating_point():
                assert torch.equal(got, true)
            else:
                ulp = torch.finfo(got.dtype).eps
                floor = ulp / 8 * true.abs().max()
                mine, its = ((x.double() - true.double()).abs().max() for x in (got, plain))
                assert mine <= factor * its + floor
                assert got.isfinite().all()


@pytest.mark.parametrize(("case", "shape"), list(_shapes()))
def test_repeats_are_bit_equal(case: Case, shape: Shape, device: torch.device):
    """No atomics, no races: the same bits every time."""
    arguments = case.make(shape, torch.bfloat16, device)
    first = run(FUSED, case, copied(arguments))
    for _ in range(REPEATS - 1):
        again = run(FUSED, case, copied(arguments))
        for a, b in zip(
            first.results + first.gradients, again.results + again.gradients, strict=True
        ):
            assert a is b is None or torch.equal(a, b)


FAR = {  # one step along an axis is 2**30 elements, so two are beyond what 32 bits hold
    "attention": {"B": 3, "N": 5, "H": 1, "d": 24},
    "target_smooth_l1": {"M": 3, "E": 1, "B": 1, "Ky": 3, "T": 5, "D": 24},
    "predictor_tokens": {
        "M": 1, "E": 3, "B": 1, "Kx": 3, "Ky": 2, "N": 9, "D": 24, "P": 16, "noise": "both",
    },
    "position_cross_entropy": {"B": 3, "V": 3, "grid": (4, 6)},
    "patch_mse": {"B": 3, "size": (8, 8), "p": 4, "C": 2, "K": 3},
}  # fmt: skip
SPREAD = {
    "attention": "packed",
    "target_smooth_l1": "prediction",
    "predictor_tokens": "x",
    "position_cross_entropy": "logits",
    "patch_mse": "prediction",
}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in FAR], ids=lambda c: c.name)
def test_offsets_beyond_32_bits(case: Case, device: torch.device):
    """An input whose outer axis is spread over 2**31 elements, of which few are ever touched."""
    arguments = case.make(FAR[case.name], torch.float16, device)
    expected = run(FUSED, case, copied(arguments))
    name = SPREAD[case.name]
    near = arguments[name].detach()
    stride = 2**30 + 8
    far = torch.empty(2 * stride + near[0].numel(), dtype=near.dtype, device=device)
    far = far.as_strided(near.shape, (stride, near.shape[2], 1))
    far.copy_(near)
    got = run(FUSED, case, {**arguments, name: far.requires_grad_()})
    for a, b in zip(
        expected.results + expected.gradients, got.results + got.gradients, strict=True
    ):
        assert a is b is None or torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("rows", [2**31 // 1024 + 5])
def test_a_tensor_beyond_2_31_elements(rows: int, device: torch.device):
    """The last rows of a result with more than 2**31 elements are those of the rows alone."""
    x = torch.randn(rows, 1024, dtype=torch.bfloat16, device=device)
    weight, bias = torch.randn(2, 1024, dtype=torch.bfloat16, device=device)
    _, normed = FUSED.layer_norm(x, weight, bias, 1e-6)
    _, tail = FUSED.layer_norm(x[-7:].clone(), weight, bias, 1e-6)
    assert torch.equal(normed[-7:], tail)


@needs_gpu
def test_a_replayed_graph_draws_fresh_noise(device: torch.device):
    """Seed and step lie on the device: each replay has its step's noise, that of a call without a graph."""
    predictor = Predictor(196, apply_stop=True, depth=2, ops="fused").to(device)
    x = torch.randn(8, 53, 768, device=device)
    index = torch.arange(196, device=device).expand(8, -1)
    masks_x, masks = [index[:, :53].clone()], [index[:, k : k + 36].clone() for k in (60, 100, 140)]
    seed, ids = torch.tensor([7, 0], device=device), torch.arange(8, device=device)

    def call() -> torch.Tensor:
        return predictor(x, masks_x, masks, seed=seed, sample_ids=ids)

    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        seen = []
        for step in range(1, 4):
            seed[1] = step
            graph.replay()
            seen.append(out.clone())
            assert torch.equal(out, call())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@needs_gpu
def test_peak_memory_of_the_predictor(device: torch.device):
    """At most half of what the published way takes, forward and backward, ViT-B in bf16."""
    x = torch.randn(64, 53, 768, device=device, requires_grad=True)
    index = torch.arange(196, device=device).expand(64, -1)
    masks_x, masks = [index[:, :53]], [index[:, k : k + 36] for k in (60, 90, 120, 150)]
    peaks = []
    for predictor in (
        PublishedPredictor(apply_stop=True),
        Predictor(196, apply_stop=True, ops="fused"),
    ):
        predictor.to(device)

        def step(predictor: torch.nn.Module = predictor) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                out = predictor(x, masks_x, masks)
            out.float().square().mean().backward()

        step()
        peaks.append(peak_bytes(step, device))
    assert peaks[1] <= peaks[0] / 2
