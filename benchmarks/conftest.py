"""Benchmarks as pytest runs them: options, one test for each measurement, a row for each result."""

import traceback
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.engine.clock import round_clock
from benchmarks.engine.options import Cell, Options, chosen
from benchmarks.engine.runner import DEVICE_LOST, HANDED_OVER, Bench, Recorder

_RECORDER = pytest.StashKey[Recorder]()
_FLAGS: dict[str, dict[str, Any]] = {
    "device": {"choices": ["auto", "cpu", "cuda"]},
    "model": {"action": "append"},
    "images": {"action": "append", "type": int},
    "arm": {"action": "append"},
    "precision": {"choices": ["fp32", "bf16", "fp16"]},
    "rounds": {"type": int},
    "sweeps": {"type": int},
    "threads": {"type": int},
    "seconds": {"type": float},
    "results": {"type": Path},
    "commit": {},
    "again": {"action": "store_true", "default": None},
}


def pytest_configure() -> None:
    """No TF32: fp32 is what is compared with, and in bf16 nothing is left to be gained by it."""
    torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what every kind of benchmark can be told; `python -m benchmarks KIND` knows the rest."""
    group = parser.getgroup("stopfast")
    for name, named in _FLAGS.items():
        group.addoption(f"--{name}", **named, help=f"see benchmarks.engine.options.Options.{name}")


def _options(config: pytest.Config, module: Any) -> Options:  # noqa: ANN401
    if HANDED_OVER in config.stash:
        return config.stash[HANDED_OVER]
    known = {field.name for field in fields(module.OPTIONS)} & _FLAGS.keys()
    told = {name: config.getoption(name) for name in known}
    given = {name: value for name, value in told.items() if value is not None}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return module.OPTIONS(**{**given, **lists})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every measurement of the file's plan that is of the function's kind."""
    if "cell" not in metafunc.fixturenames:
        return
    module: Any = metafunc.module
    options = _options(metafunc.config, module)
    kind = metafunc.function.__name__.removeprefix("test_")
    planned = (cell for cell in module.plan(options) if cell.kind == kind)
    cells = list(chosen(planned, options))
    metafunc.parametrize("cell", cells, ids=[cell.key for cell in cells])


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every measurement the device's clock and the name of its comparison."""
    cell = _cell(item)
    if cell is not None:
        own = item.get_closest_marker("benchmark")
        device = _options(item.config, item.module).place  # type: ignore[attr-defined]
        told = {"timer": round_clock(device), "group": cell.group, **(own.kwargs if own else {})}
        item.add_marker(pytest.mark.benchmark(**told), append=False)


def _cell(item: pytest.Item) -> Cell | None:
    found = item.callspec.params.get("cell") if hasattr(item, "callspec") else None  # type: ignore[attr-defined]
    return found if isinstance(found, Cell) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the functions whose kind has no measurement in the plan."""
    empty = [item for item in items if "bench" in _fixtures(item) and _cell(item) is None]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def _recorder(item: pytest.Item) -> Recorder:
    stash = item.config.stash
    if _RECORDER not in stash:
        options = _options(item.config, item.module)  # type: ignore[attr-defined]
        try:
            stash[_RECORDER] = Recorder(item.config, options)
        except ValueError as error:
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    return stash[_RECORDER]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what the results have, and what there is no time for."""
    cell = _cell(item)
    reason = _recorder(item).unwanted(cell) if cell else None
    if reason:
        pytest.skip(reason)


@pytest.fixture
def bench(request: pytest.FixtureRequest, cell: Cell, benchmark: Any) -> Iterator[Bench]:  # noqa: ANN401
    """What a measurement is taken with; afterwards nothing of the arm is left."""
    recorder = _recorder(request.node)
    yield Bench(cell, recorder, benchmark)
    recorder.clean()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Write a row of whatever comes of a measurement, before the next one begins."""
    cell = _cell(pyfuncitem)
    if cell is None:
        return (yield)
    recorder, benchmark = _recorder(pyfuncitem), cast(Any, pyfuncitem.funcargs["benchmark"])
    recorder.begin(cell)
    refusal, story = None, ""
    try:
        result = yield
    except Exception as error:
        refusal = recorder.refuse(cell, error, benchmark.extra_info)
        story = "" if error is refusal else traceback.format_exc()
    finally:
        recorder.end()
    if refusal is None:
        if benchmark.stats is not None:
            _tell(pyfuncitem, cell, recorder.keep(cell, benchmark.stats))
        return result
    if recorder.lost:
        pytest.exit(f"{cell.key}: the device is lost: {refusal}", returncode=DEVICE_LOST)
    if refusal.passes:
        pytest.skip(f"{refusal.outcome}: {refusal}")
    pytest.fail(f"{refusal.outcome}: {refusal}\n{story}", pytrace=False)


def _tell(item: pytest.Item, cell: Cell, info: dict[str, Any]) -> None:
    figures = f"{info['ms_p50']:.3f} ms ({info['ms_p10']:.3f} to {info['ms_p90']:.3f})"
    rate = info.get("images_per_s")
    capture: Any = item.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{cell.key}: {figures}" + (f", {rate:.0f} images/s" if rate else ""), flush=True)
