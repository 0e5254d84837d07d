"""Tables of the newest results: what they show, row by row."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from benchmarks.engine.refusals import NotHere
from benchmarks.engine.results import FOLDER
from benchmarks.report.accuracies import ACCURACIES
from benchmarks.report.measured import (
    Measured,
    commits,
    fastest,
    groups,
    is_ours,
    newest,
    published,
    strongest,
)
from benchmarks.report.table import Table
from benchmarks.roof.ceilings import Roof, newest_roof
from benchmarks.roof.roofline import A100, StepCost, projected, step_cost
from benchmarks.roof.step_work import drawn_shapes
from benchmarks.step.workload import MODELS
from stopfast.kernels.cases import CASES

Cell = Callable[[Measured, list[Measured]], str]


def ms(one: Measured, _: list[Measured]) -> str:
    """Median, and the 10th and 90th percentiles; or why there is none."""
    if one.ms is None:
        return str(one.outcome)
    return f"{_number(one.ms)} ({_number(one.spread(0.1))} to {_number(one.spread(0.9))})"


def times_published(one: Measured, group: list[Measured]) -> str:
    """How many times as fast as the published way."""
    return _ratio(published(group), one)


def times_assembled(one: Measured, group: list[Measured]) -> str:
    """How many times as fast as the strongest other arm."""
    return _ratio(strongest(group), one)


def info(name: str, form: str = "{}", scale: float = 1.0) -> Cell:
    """Return a column of an entry of the row."""

    def cell(one: Measured, _: list[Measured]) -> str:
        value = one.info.get(name)
        if value is None or not one.samples:
            return ""
        return form.format(value if scale == 1 else value / scale)

    return cell


def counted(name: str) -> Cell:
    """Return a column of a cold run's last count."""

    def cell(one: Measured, _: list[Measured]) -> str:
        counts = one.info.get("counts")
        return str(list(counts.values())[-1][name]) if counts else ""

    return cell


ARM: list[tuple[str, Cell]] = [("arm", lambda one, _: one.arm)]
MS: list[tuple[str, Cell]] = [("ms (10th to 90th percentile)", ms)]
PEAK: list[tuple[str, Cell]] = [("peak GiB", info("peak_bytes", "{:.2f}", 2**30))]
# What graphs keep for themselves is reserved, and allocated only while they run.
HELD: list[tuple[str, Cell]] = [("peak GiB", info("peak_reserved_bytes", "{:.2f}", 2**30))]
RATE: list[tuple[str, Cell]] = [("images/s", info("images_per_s", "{:.0f}"))]
RATIOS: list[tuple[str, Cell]] = [
    ("x published", times_published),
    ("x strongest other", times_assembled),
]


def _about(*names: str) -> list[tuple[str, Cell]]:
    return [(name, lambda one, _, name=name: str(one.info.get(name, ""))) for name in names]


COLUMNS: dict[str, list[tuple[str, Cell]]] = {
    "step": [
        *_about("model", "images", "precision"),
        *ARM,
        *MS,
        *RATE,
        *HELD,
        ("of matrix rate", info("matrix_share", "{:.0%}")),
        ("of roof", info("roof_share", "{:.0%}")),
        ("floor ms", info("floor_ms", "{:.3g}")),
        *RATIOS,
    ],
    "cold": [
        *_about("model", "images", "precision", "steps"),
        *ARM,
        *MS,
        ("all of them, s", lambda one, _: f"{sum(one.samples) * 1e-3:.1f}" if one.samples else ""),
        ("building, s", info("build_s", "{:.1f}")),
        ("stalls", info("stalls")),
        ("longest, s", info("longest_ms", "{:.2f}", 1e3)),
        ("compilations", counted("compilations")),
        ("graphs", counted("graphs")),
    ],
    "predictor": [*_about("model", "images", "variant", "tokens"), *ARM, *MS, *PEAK, *RATIOS],
    "masks": [*_about("grid", "images", "calls"), *ARM, *MS, ("x fastest other", times_assembled)],
    "loader": [
        *_about("transforms", "images", "workers"),
        *ARM,
        *RATE,
        ("busy cores", info("busy_cores", "{:.2f}")),
        ("images/s of a busy core", info("images_per_core_s", "{:.0f}")),
        *MS,
    ],
    "train": [
        *_about("model", "images", "precision"),
        *ARM,
        *RATE,
        ("waiting", info("waiting_share", "{:.0%}")),
        *MS,
    ],
    "op-arms": [
        *_about("op", "shape", "precision"),
        *ARM,
        *MS,
        *PEAK,
        ("of roof", info("roof_share", "{:.0%}")),
        ("x fastest other", times_assembled),
    ],
    "ceilings": [
        *_about("ceiling", "precision"),
        *ARM,
        ("per second", info("per_second", "{:.3g}")),
    ],
}
"""Columns by table; a table's rows are of the kind of its name."""
_KINDS = {"op-arms": "ops"}
_ABSENT = NotHere.outcome


def listed(name: str, folder: Path = FOLDER) -> Table:
    """Return a table of :data:`COLUMNS`: every arm a row, those that lost and those not timed too."""
    found = newest(_KINDS.get(name, name), folder)
    # Times of the interpreter mean nothing.
    found = [one for one in found if one.info.get("shape") != "rehearsal"]
    measured = list(_beside_the_roof(found, folder))
    headings = ["device", *(heading for heading, _ in COLUMNS[name])]
    rows = [
        [one.device, *(cell(one, group) for _, cell in COLUMNS[name])]
        for group in groups(measured)
        for one in group
        if one.outcome != _ABSENT
    ]
    return Table(name, headings, rows, [*_origin(measured), *_reasons(measured)])


def operations(folder: Path = FOLDER) -> Table:
    """The operations, and on each GPU how many times as fast as its best alternative each is."""
    measured = [one for one in newest("ops", folder) if one.device != "cpu"]
    devices = list(dict.fromkeys(one.device for one in measured)) or ["a GPU"]
    headings = ["operation", "in one go", "timed at"]
    headings += [f"times as fast, {device}" for device in devices]
    rows = []
    for case in CASES:
        models = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in case.timed))
        ratios = [_least_and_most(measured, device, case.name) for device in devices]
        rows.append([f"`{case.name}`", case.fuses, models, *ratios])
    return Table("operations", headings, rows, _origin(measured))


def projection(folder: Path = FOLDER) -> Table:
    """Steps as they would be on an A100, at the share of the roof reached where they were timed."""
    headings = ["model", "images", "arm", "device", "ms, measured", "ms on an A100, projected"]
    rows, used, roofs = [], [], _roofs(folder)
    for one in newest("step", folder):
        roof = roofs(one)
        if one.ms is None or roof is None or one.device == "cpu" or "a100" in one.device:
            continue
        there = projected(_cost(one), one.ms, roof, A100)
        about = [str(one.info["model"]), str(one.info["images"]), one.arm, one.device]
        rows.append([*about, _number(one.ms), _number(there)])
        used.append(one)
    note = (
        "Projected, not measured: the floor under an A100's stated ceilings "
        f"({A100.flops / 1e12:.0f} TFLOP/s, {A100.bytes / 1e12:.1f} TB/s), over the share of the roof "
        "reached on the measured device."
    )
    return Table("A100, projected", headings, rows, [note, *_origin(used)] if rows else [])


def _reasons(measured: list[Measured]) -> list[str]:
    """Why rows have no time, and which arms are no rows."""
    absent: dict[str, dict[str, None]] = {}
    for one in measured:
        if one.outcome == _ABSENT:
            absent.setdefault(str(one.info["reason"]), {})[one.arm] = None
    told = [f"{', '.join(arms)} ({reason})" for reason, arms in absent.items()]
    notes = [
        f"{one.arm}, {one.group}: {one.info['reason']}."
        for one in measured
        if one.outcome not in (None, _ABSENT)
    ]
    notes += [
        f"{one.arm}, {one.group}: something was compiled or captured while it was timed."
        for one in measured
        if one.info.get("settled") is False
    ]
    return [*notes, *([f"Not there: {'; '.join(told)}."] if told else [])]


def _least_and_most(measured: list[Measured], device: str, operation: str) -> str:
    ratios = []
    for group in groups(m for m in measured if m.device == device and m.info["op"] == operation):
        fused = fastest(one for one in group if is_ours(one.arm))
        other = strongest(group)
        if fused and other and fused.ms and other.ms:
            ratios.append(other.ms / fused.ms)
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured"


def _origin(measured: list[Measured]) -> list[str]:
    return [f"Measured at {'; '.join(commits(measured))}."] if measured else []


def _ratio(reference: Measured | None, one: Measured) -> str:
    if reference is None or reference.ms is None or one.ms is None:
        return ""
    return f"{reference.ms / one.ms:.2f}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _roofs(folder: Path) -> Callable[[Measured], Roof | None]:
    """The newest ceilings of each device, looked up once."""
    found = cache(partial(newest_roof, folder=folder))
    return lambda one: found(one.device, str(one.info["precision"]))


def _beside_the_roof(measured: list[Measured], folder: Path) -> Iterator[Measured]:
    """Add to steps and operations what they are beside the device's newest measured ceilings."""
    roofs = _roofs(folder)
    for one in measured:
        # A step's row has the figures of the very steps that were timed, if ceilings were known then.
        wanted = one.info["kind"] in ("step", "ops") and "roof_share" not in one.info
        roof = roofs(one) if one.ms and wanted else None
        if roof is None or one.ms is None:
            yield one
        elif one.info["kind"] == "step":
            yield replace(one, info={**one.info, **_cost(one).figures(roof, one.ms)})
        else:
            floor = max(one.info["bytes"] / roof.bytes, one.info["flops"] / roof.flops)
            yield replace(one, info={**one.info, "roof_share": 1e3 * floor / one.ms})


@cache
def _cost_of(model: str, images: int, precision: str) -> StepCost:
    config = MODELS[model]()
    return step_cost(config, drawn_shapes(config, images, 500), precision)


def _cost(one: Measured) -> StepCost:
    return _cost_of(str(one.info["model"]), int(one.info["images"]), str(one.info["precision"]))


TABLES: dict[str, Callable[[Path], Table]] = {
    **{name: partial(listed, name) for name in COLUMNS},
    "ops": operations,
    "projection": projection,
    **ACCURACIES,
}
"""Tables by the name that their markers have: ``<!-- table: NAME -->``."""
