"""The search of what is fastest: who wins, who may not, what is written, and what kernels make of it."""

import json
from itertools import cycle

import pytest
import torch

from benchmarks.engine.refusals import Disagreement
from benchmarks.engine.results import Results
from benchmarks.tuning import jobs as tuning_jobs
from benchmarks.tuning.contest import Arena, Candidate, Contest, TimeOver
from benchmarks.tuning.race import race
from benchmarks.tuning.search import TuneOptions, run
from benchmarks.tuning.table import attention_table, fused_table, read_table, write_table
from benchmarks.tuning.verified import Calls, Reference, copied
from stopfast.kernels import _measured, _tiles, attention_backends
from stopfast.kernels._launch import watch_launches
from stopfast.kernels._tiles import CHOICES, Asked, shape_class, tiles, trying
from stopfast.kernels.cases import CASES
from stopfast.kernels.ops import EAGER, FUSED

CASE = {case.name: case for case in CASES}


class Clock:
    """Time that passes only while a fake call runs: so long, again and again."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *seconds: float):
        lasts = cycle(seconds)

        def run() -> None:
            self.now += next(lasts)

        return run


@pytest.mark.parametrize(
    ("others", "winner", "clear"),
    [
        ({"b": (2.0,)}, "a", True),
        ({"b": (0.5,)}, "b", True),
        ({"b": (0.5,), "c": (0.4,), "d": (3.0,)}, "c", True),
        ({"b": (0.995,)}, "a", False),  # less than what is worth a change
        ({"b": (0.5, 1.2)}, "a", False),  # faster in the middle, slower half of the time
        ({"b": (0.7,), "c": (0.703,)}, "b", False),
    ],
    ids=str,
)
def test_who_wins(others, winner, clear):
    clock = Clock()
    runs = {"a": clock.call(1.0)} | {name: clock.call(*each) for name, each in others.items()}
    held = race(runs, clock, incumbent="a")
    assert (held.winner, held.clear) == (winner, clear)


def test_who_has_lost_is_not_timed_on():
    clock = Clock()
    runs = {"a": clock.call(1.0), "b": clock.call(1.003), "slow": clock.call(9.0)}
    held = race(runs, clock, rounds=30)
    assert {name: len(each) for name, each in held.samples.items()} == {"a": 30, "b": 30, "slow": 7}


def test_a_race_ends_in_time():
    """Whoever leads then has won; the first round is always held."""
    clock = Clock()
    runs = {"a": clock.call(1.0), "b": clock.call(0.998)}
    assert len(race(runs, clock, until=10.5).samples["a"]) == 6
    assert len(race(runs, clock, until=0.0).samples["a"]) == 1
    assert race({}, clock).winner is None


def wrong_result(**named):
    return EAGER.linear_gelu(**named) * 1.01


def wrong_gradient(x, weight, bias):
    return EAGER.linear_gelu(x, weight, bias.detach() + (bias - bias.detach()) * 1.1)


def not_a_number(**named):
    return EAGER.linear_gelu(**named) * torch.nan


def missing_gradient(x, weight, bias):
    return EAGER.linear_gelu(x, weight, bias.detach())


@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("wrong", [wrong_result, wrong_gradient, not_a_number, missing_gradient])
def test_a_wrong_candidate_is_refused(wrong, kind):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    arguments = CASE["linear_gelu"].make({"rows": (2, 7), "C": 33, "F": 65}, dtype, CPU)
    reference = Reference(CASE["linear_gelu"], arguments, kind)
    reference.check(EAGER.linear_gelu)
    with pytest.raises(Disagreement, match="relative error"):
        reference.check(wrong)


CPU = torch.device("cpu")


def test_a_wrong_update_is_refused():
    def late(buffers, scalars, *others):
        EAGER.adamw_ema(buffers, scalars, *others)
        buffers.average_copy.mul_(1.01)

    case = CASE["adamw_ema"]
    arguments = case.make({"numel": 1029}, torch.float32, CPU)
    before = copied(arguments)
    reference = Reference(case, arguments, "fp32")
    reference.check(lambda buffers, scalars, **named: EAGER.adamw_ema(buffers, scalars))
    with pytest.raises(Disagreement):
        reference.check(lambda buffers, scalars, **named: late(buffers, scalars))
    assert torch.equal(arguments["buffers"].param, before["buffers"].param)


def contest(candidates, **changes):
    arguments = CASE["layer_norm"].make({"rows": (2, 7), "C": 33}, torch.float32, CPU)
    given = {"phase": "both", "incumbent": "eager", **changes}
    made = Contest("c", CASE["layer_norm"], arguments, "fp32", candidates=candidates, **given)
    return made, Reference(CASE["layer_norm"], arguments, "fp32")


def test_only_what_is_right_is_timed(tmp_path):
    """What is not becomes a row with its reason; a contest that was held is not held again."""
    pytest.importorskip("pytest_benchmark")
    results = Results.open(tmp_path / "r.json")
    results.begin({})
    arena = Arena(CPU, results, 60.0)
    calls = []

    def counted(**named):
        calls.append(1)
        return EAGER.layer_norm(**named)

    def broken(**named):
        raise RuntimeError("out of resource: shared memory")

    def wrong(**named):
        total, normed = EAGER.layer_norm(**named)
        return total, normed * 1.01

    made = {"eager": EAGER.layer_norm, "counted": counted, "broken": broken, "wrong": wrong}
    candidates = {name: Candidate(function) for name, function in made.items()}
    infos = arena.hold(*contest(candidates))
    assert {info["arm"] for info in infos} == {"eager", "counted"}
    assert sum(info["winner"] for info in infos) == 1
    told = {row["extra_info"]["arm"]: row["extra_info"] for row in results.not_timed(kind="tune")}
    assert {name: info["outcome"] for name, info in told.items()} == {
        "broken": "failed",
        "wrong": "disagrees",
    }
    assert "shared memory" in told["broken"]["reason"]
    row = results.rows(kind="tune")[0]
    assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= 7
    count = len(calls)
    again = Arena(CPU, Results.open(results.path), 60.0)
    assert again.hold(*contest(candidates)) == infos and len(calls) == count
    results.begin({})
    Arena(CPU, results, 60.0, since=1).hold(*contest(candidates))
    assert len(calls) > count


def test_no_contest_begins_after_the_limit(tmp_path):
    results = Results.open(tmp_path / "r.json")
    results.begin({})
    with pytest.raises(TimeOver):
        Arena(CPU, results, -1.0).hold(*contest({"eager": Candidate(EAGER.layer_norm)}))
    assert not results.rows() and not results.path.exists()


def row(label, arm, ms, **named):
    told = {
        "job": "attention",
        "head_dim": 32,
        "padded": False,
        "tokens": 89,
        "weight": 1,
        "round": 0,
    }
    return {**told, "label": label, "arm": arm, "ms_p50": ms, **named}


def test_backends_by_time_over_all_shapes():
    infos = [
        row("all", "triton", 1.0, weight=5),
        row("all", "flash", 0.8, weight=5),
        row("all", "cudnn", 0.1, weight=5),
        row("last", "triton", 1.0),
        row("last", "flash", 1.6),
        row("last", "efficient", 0.1),  # it cannot do the other
        row("last", "cudnn", 0.1),
        row("grid", "efficient", 3.0, tokens=196),
        row("padded", "triton", 2.0, padded=True),
    ]
    assert attention_table(infos, cudnn=False) == {
        "d32": [
            [128, "flash"],
            [256, "efficient"],
        ],  # by number of calls: triton, each counted once
        "d32 padded": [[128, "triton"]],
    }
    assert attention_table(infos, cudnn=True)["d32"][0] == [128, "cudnn"]
    infos += [row("last", "triton", 1.0, round=1), row("last", "flash", 2.5, round=1)]
    assert attention_table(infos, cudnn=False)["d32"][0] == [128, "triton"]


def test_fused_only_where_it_is_nowhere_slower():
    def of(op, label, arm, ms, number=0):
        return {"job": "fused", "op": op, "label": label, "arm": arm, "ms_p50": ms, "round": number}

    infos = [
        of("layer_norm", "B", "fused", 1.0),
        of("layer_norm", "B", "eager", 2.0),
        of("layer_norm", "L", "fused", 1.0),
        of("layer_norm", "L", "eager", 0.9),
        of("linear_gelu", "B", "fused", 1.0),
        of("linear_gelu", "B", "eager", 1.1),
        of("target_smooth_l1", "B", "eager", 1.0),  # the fused one was refused
    ]
    labels = {"layer_norm": ["B", "L"], "linear_gelu": ["B", "L"], "target_smooth_l1": ["B"]}
    assert fused_table(infos, labels) == {"layer_norm": False, "target_smooth_l1": False}
    infos += [of("layer_norm", "L", "fused", 0.8, 1), of("layer_norm", "L", "eager", 0.9, 1)]
    infos += [of("linear_gelu", "L", "fused", 1.0), of("linear_gelu", "L", "eager", 1.0)]
    assert fused_table(infos, labels) == {
        "layer_norm": True,
        "linear_gelu": True,
        "target_smooth_l1": False,
    }


def asked_of(operation, shape):
    """The kernels of an operation, their classes of shapes and heuristics."""
    arguments = CASE[operation].make(shape, torch.float32, CPU)
    calls = Calls(getattr(FUSED, operation), arguments, "fp32")
    with trying({}) as asked:
        if calls.prepare():
            calls.backward()
    return arguments, {one.kernel: one for one in asked}


@pytest.mark.parametrize("operation", tuning_jobs.TILED)
def test_kernels_take_the_tiles_that_they_are_given(operation, device):
    """Every neighbour of the heuristic is launched as it says, and right."""
    if device.type == "cuda":
        pytest.skip("a GPU may have no room for a neighbour; the search itself says so there")
    shape = CASE[operation].tested[1 if operation in ("adamw_ema", "predictor_tokens") else 0]
    arguments, asked = asked_of(operation, shape)
    assert asked and all(
        CHOICES[name].keys() == one.heuristic.keys() for name, one in asked.items()
    )
    reference = Reference(CASE[operation], arguments, "fp32")
    for kernel, one in asked.items():
        for entry in list(tuning_jobs.neighbours(kernel, one.heuristic))[:2]:
            with trying({(kernel, one.shapes): entry}), watch_launches() as launches:
                reference.check(getattr(FUSED, operation))
            told = [{**launch.constants, **launch.options} for launch in launches]
            entry = {name: value for name, value in entry.items() if name != "programs"}
            assert any(entry.items() <= each.items() for each in told)


def test_every_kernel_with_choices_is_searched():
    searched = {name for op in tuning_jobs.TILED for name in asked_of(op, CASE[op].tested[1])[1]}
    assert searched == CHOICES.keys()


HEURISTIC = {"ROWS": 4, "num_warps": 4}
TABLE = {"G": {"tiles": {"layer_norm_forward": {"bf16 c512": {"num_warps": 8, "ROWS": 2}}}}}


@pytest.fixture
def shipped(monkeypatch):
    """A shipped table, and the GPUs 0 (in it) and 1 (not in it)."""

    def use(table):
        _tiles._of_device.cache_clear()
        monkeypatch.setattr(_measured, "_tables", lambda: table)
        names = {0: "G", 1: "other"}
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])

    yield use
    _tiles._of_device.cache_clear()


def test_the_table_is_read(shipped):
    shipped(TABLE)
    shapes = shape_class(torch.bfloat16, c=512)
    found = tiles("layer_norm_forward", shapes, torch.device("cuda", 0), HEURISTIC)
    assert list(found.items()) == [("ROWS", 2), ("num_warps", 8)]
    for device, kernel, other in (
        (torch.device("cuda", 1), "layer_norm_forward", shapes),
        (torch.device("cuda", 0), "layer_norm_forward", "bf16 c1024"),
        (torch.device("cuda", 0), "target_smooth_l1_forward", shapes),
        (CPU, "layer_norm_forward", shapes),
    ):
        assert tiles(kernel, other, device, HEURISTIC) == HEURISTIC
    with trying({("layer_norm_forward", shapes): {"ROWS": 1, "num_warps": 1}}) as asked:
        found = tiles("layer_norm_forward", shapes, torch.device("cuda", 0), HEURISTIC)
    assert found == {"ROWS": 1, "num_warps": 1}
    assert asked == [Asked("layer_norm_forward", shapes, HEURISTIC)]


@pytest.mark.parametrize(
    ("kernel", "entry"),
    [
        ("layer_norm", {"ROWS": 4, "num_warps": 4}),
        ("layer_norm_forward", {"ROWS": 4}),
        ("layer_norm_forward", {"ROWS": 4, "num_warps": 4, "num_stages": 2}),
        ("layer_norm_forward", {"ROWS": 3, "num_warps": 4}),
        ("layer_norm_forward", {"ROWS": True, "num_warps": 4}),
        ("layer_norm_forward", {"ROWS": "4", "num_warps": 4}),
        ("layer_norm_forward", [4, 4]),
    ],
    ids=str,
)
def test_a_bad_entry_is_refused_by_name(shipped, kernel, entry):
    shipped({"G": {"tiles": {kernel: {"bf16 c512": entry}}}})
    with pytest.raises(ValueError, match=r"measured\.json: tiles of 'G', layer_norm.*expected"):
        tiles("layer_norm_forward", "bf16 c512", torch.device("cuda", 0), HEURISTIC)
    with pytest.raises(ValueError, match="expected"), trying({(kernel, "bf16 c512"): entry}):
        pass


def test_the_shipped_table_is_sound():
    for gpu, table in _measured._tables().items():
        _tiles.table_tiles(gpu)
        for entries in table.get("attention", {}).values():
            assert all(name in attention_backends._NAMED for _, name in entries)


def test_padded_rows_have_their_own_backend(shipped):
    table = {
        "attention": {
            "d32": [[128, "flash"]],
            "d32 padded": [[128, "triton"]],
            "d24": [[64, "flex"]],
        }
    }
    shipped({"G": table})
    names = attention_backends._NAMED
    choose = attention_backends._choose
    assert choose(0, 32, 89) is names["flash"] and choose(0, 32, 89, True) is names["triton"]
    assert choose(0, 24, 64, True) is names["flex"] and choose(0, 24, 65, True) is names["sdpa"]


def test_a_search_without_a_gpu(tmp_path, device, monkeypatch):
    """It decides by what it timed, writes a table of its own, and goes on where it stopped."""
    if device.type == "cuda":
        pytest.skip("a rehearsal is for machines without a GPU")
    pytest.importorskip("pytest_benchmark")
    before = _measured.PATH.read_text()
    options = TuneOptions(
        device="cpu",
        model=("target_smooth_l1",),
        seconds=60.0,
        compiled=False,
        table=tmp_path / "table.json",
        results=tmp_path / "results.json",
    )
    write_table(tmp_path / "table.json", "another", {"layer_norm": True})
    assert run(options) == 0
    table = read_table(tmp_path / "table.json")
    assert table["another"] == {"layer_norm": True}
    assert table["rehearsal"]["target_smooth_l1"] in (True, False)
    results = Results.open(options.results)
    kinds = {info["job"] for info in (r["extra_info"] for r in results.rows(kind="tune"))}
    assert kinds == {"fused", "tiles"}
    monkeypatch.setattr(_measured, "_tables", lambda: table)
    _tiles.table_tiles("rehearsal")
    assert run(options) == 0
    again = json.loads(options.results.read_text())["benchmarks"]
    assert [r["extra_info"]["taken"] for r in again] == [
        r["extra_info"]["taken"] for r in results.rows()
    ]
    assert _measured.PATH.read_text() == before


def test_a_rehearsal_leaves_the_shipped_table_alone(device, tmp_path):
    if device.type == "cuda":
        pytest.skip("a search on a GPU is no rehearsal")
    for table in (None, _measured.PATH):
        with pytest.raises(ValueError, match="expected --table of its own"):
            run(TuneOptions(device="cpu", table=table, results=tmp_path / "r.json"))
    with pytest.raises(ValueError, match="expected operations"):
        TuneOptions(model=("gelu",))
