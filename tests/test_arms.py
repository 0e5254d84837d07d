"""The benchmarks' arms take the same steps, and one that does not is not timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.bench_step import settle
from benchmarks.engine.refusals import Disagreement, NotHere
from benchmarks.step.arms import ARMS, assembled, captured
from benchmarks.step.arms.program import Program
from benchmarks.step.arms.published import Published
from benchmarks.step.cold import Cold, take
from benchmarks.step.gate import check, reference
from benchmarks.step.workload import build_workload

EAGER = [name for name in ARMS if not name.startswith("compile") and "compiled" not in name]
STATIC = {
    "backend": "aot_eager",
    "dynamic": False,
}  # what is built, without the minutes of inductor


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return tmp_path_factory.mktemp("masks") / "toy.safetensors"


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def expected(request, masks):
    return reference(build_workload("toy", 4, request.param, steps=60, masks=masks))


@pytest.mark.parametrize("name", EAGER)
def test_an_arm_takes_the_published_steps(name, expected):
    try:
        arm = ARMS[name](expected.workload)
    except NotHere as reason:
        assert "GPU" in str(reason) or "the same as stopfast" in str(reason)
        pytest.skip(str(reason))
    check(arm, expected)


def test_published_and_stopfast_are_here(expected):
    for name in ("published", "published without needless costs", "stopfast"):
        ARMS[name](expected.workload).close()
    assert expected.own is None or expected.own.loss > 0  # bf16 is not fp32


class WithoutAverage(Program):
    def _follow(self, momentum):
        pass


class OtherNoise(Program):
    def step(self, number, noise=None):
        return super().step(number, [draw.roll(1, 0) for draw in noise or ()])


class Scaled(Program):
    def _update(self, loss):
        super()._update(1.02 * loss)


class OtherRate(Program):
    def _set_scalars(self, scalars):
        super()._set_scalars(scalars._replace(lr=1.05 * scalars.lr))


class OwnTargets(Program):
    def _loss(self, masks, noise):
        own = self.networks
        self.networks = own._replace(target_encoder=own.encoder)
        loss = super()._loss(masks, noise)
        self.networks = own
        return loss


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (WithoutAverage, "weights of the target_encoder"),
        (OtherNoise, "moment of predictor.predictor_embed"),
        (Scaled, "moment of predictor"),
        (OtherRate, "weights of the predictor"),
        (OwnTargets, "moment"),
    ],
)
def test_a_wrong_arm_is_refused(wrong, named, expected):
    with pytest.raises(Disagreement, match=named):
        check(wrong(expected.workload), expected)


class WithoutDecay(Program):
    def _set_scalars(self, scalars):
        super()._set_scalars(scalars._replace(weight_decay=0.0))


def test_decay_shows_in_fp32(masks):
    """In bf16 it is less than rounding after eight steps."""
    expected = reference(build_workload("toy", 4, "fp32", steps=60, masks=masks))
    with pytest.raises(Disagreement, match="weights of the encoder"):
        check(WithoutDecay(expected.workload), expected)


def test_the_published_program_reads_every_weight_gradient(expected):
    arm = Published(expected.workload)
    read = []
    log = arm._log_gradients
    arm._log_gradients = lambda: read.append(log())
    arm.step(1)
    depth = expected.workload.config.model.depth
    assert len(read[0]) == 1 + 4 * depth
    assert min(read[0]) > 0


class Rehearsed(captured.Captured):
    """Captured, with calls in the place of graphs: what a replay may read and write is the same."""

    def _begin_recording(self):
        self.recorded = 0

    def _record(self, warm_up, work):
        self.recorded += 1
        warm_up()
        return work

    def _optimizer(self, groups):  # a capturable one is a GPU's
        return torch.optim.AdamW(groups, lr=self._rate, weight_decay=0.0, fused=True)


@pytest.mark.parametrize("kind", [assembled.Bucketed, Rehearsed])
def test_buckets_change_no_number(kind, expected, monkeypatch):
    for module in (assembled, captured):
        monkeypatch.setattr(module, "_STATIC", STATIC)
    arm = kind(expected.workload)
    check(arm, expected)
    settle(arm, 9, 50)
    counts = arm.counts()
    settle(arm, 9, 50)
    assert arm.counts() == counts
    assert counts["compilations"] <= 12  # five functions, and a few pairs of lengths
    pairs = {
        tuple(-(-group[0].shape[1] // 8) for group in (pair.context, pair.target))
        for pair in expected.workload.masks[8:58]
    }
    if kind is Rehearsed:
        assert counts["graphs"] <= 2 * len(pairs)  # with given noise and with drawn
    arm.close()


def test_compiled_blocks_serve_all_lengths(masks):
    """By inductor, about half a minute: five functions, none compiled again for other lengths."""
    expected = reference(build_workload("toy", 4, "fp32", steps=60, masks=masks))
    torch.compiler.reset()
    arm = ARMS["compile + SDPA"](expected.workload)
    check(arm, expected)
    counts = arm.counts()
    assert 4 <= counts["compilations"] <= 6
    settle(arm, 9, 50)
    assert arm.counts() == counts
    arm.close()


def test_masks_are_replayed_from_their_file(masks):
    first, again = (build_workload("toy", 4, steps=60, masks=masks) for _ in range(2))
    assert len(first.masks) == 60
    for one, other in zip(first.masks, again.masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.context, other.context, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.target, other.target, strict=True))
    assert first.masks_of(61) is first.masks_of(1)
    with pytest.raises(ValueError, match="expected masks for"):
        build_workload("toy", 5, steps=60, masks=masks)
    with pytest.raises(ValueError, match="expected a model of"):
        build_workload("vit-b14", 4)


class Compiling:
    """Compiles something in each of its first ``times`` steps."""

    def __init__(self, times):
        self.left, self.made = times, 0

    def step(self, number, noise=None):
        if self.left:
            self.left, self.made = self.left - 1, self.made + 1

    def counts(self):
        return {"compilations": self.made, "graphs": 0}


@pytest.mark.parametrize(("times", "passes"), [(0, 1), (3, 2), (6, 3), (100, 5)])
def test_an_arm_is_settled_when_it_compiles_no_more(times, passes):
    assert settle(Compiling(times), 1, 5) == 5 * passes


def test_a_cold_story_tells_every_step(masks):
    asked = Cold(
        arm="published", model="toy", images=4, precision="fp32", device="cpu", steps=5, masks=masks
    )
    story = take(replace(asked, steps=60))
    assert len(story["step_ms"]) == 60 and story["longest_ms"] == max(story["step_ms"])
    assert set(story["counts"]) == {"12", "24", "36", "48", "60"}
    assert asked.arguments()[:2] == ["--arm", "published"]
