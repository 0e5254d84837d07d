"""Files of results: pytest-benchmark's own format, with provenance and what was not timed.

A file is written whole after every row, so that a run that is killed keeps what it has; a row is
replaced by a newer one of the same key. ``pytest-benchmark compare FILE`` reads the files.
"""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.engine.provenance import HERE
from benchmarks.engine.refusals import Disagreement, NotTimed

Row = dict[str, Any]
Document = dict[str, Any]
FOLDER = HERE / "results"
_SECTIONS = ("benchmarks", "not_timed", "provenance")


class Results:
    """Rows of one file, each a benchmark of pytest-benchmark; ``extra_info`` says which and how.

    Use :meth:`open`. ``extra_info`` has at least ``key`` (see :class:`benchmarks.engine.options.Cell`),
    ``kind``, ``arm``, the problem's own entries, ``sweep``, ``taken`` (time) and ``run``, an index into
    ``provenance``: each process that wrote to the file has an entry there.
    """

    def __init__(self, path: Path, document: Document) -> None:
        self.path, self.document = path, document

    @classmethod
    def open(cls, path: Path) -> "Results":
        """Return the results of a file, none where it does not exist.

        Raises:
            ValueError: a file of another format.
        """
        if not path.exists():
            empty = {"machine_info": {}, "commit_info": {}, "benchmarks": [], "not_timed": []}
            return cls(path, {**empty, "provenance": [], "datetime": _now(), "version": ""})
        try:
            document = json.loads(path.read_text())
            wrong = [name for name in _SECTIONS if not isinstance(document[name], list)]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected results of these benchmarks, got {error!r}"
            ) from None
        if wrong:
            raise ValueError(f"{path}: expected lists of {_SECTIONS}, got others for {wrong}")
        return cls(path, document)

    def begin(self, origin: dict[str, object], **about: object) -> None:
        """Note a process that is about to add rows, by its provenance; ``about`` is pytest-benchmark's."""
        self.document["provenance"].append(origin)
        self.document.update(about)

    def add(self, row: Row) -> None:
        """Add a benchmark's row, and write the file."""
        self._put("benchmarks", {**row, "extra_info": self._stamped(row["extra_info"])})

    def refuse(self, info: Row, outcome: str, reason: str) -> None:
        """Add a row of what was not timed, with its reason, and write the file."""
        stamped = self._stamped({**info, "outcome": outcome, "reason": reason})
        self._put("not_timed", {"extra_info": stamped})

    def has(self, key: str) -> bool:
        """Whether there is a row of a measurement, timed or not; what went wrong is to be taken again."""
        wrong = {kind.outcome for kind in (NotTimed, Disagreement)}
        return any(
            info["key"] == key and info.get("outcome") not in wrong for info in self._infos()
        )

    def rows(self, **equal: object) -> list[Row]:
        """Return the benchmarks whose ``extra_info`` has these values: ``rows(kind="step")``."""
        return [row for row in self.document["benchmarks"] if _matches(row, equal)]

    def not_timed(self, **equal: object) -> list[Row]:
        """Return the like of what was not timed; ``extra_info`` has ``outcome`` and ``reason``."""
        return [row for row in self.document["not_timed"] if _matches(row, equal)]

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        entries = (f"{json.dumps(name)}: {_lines(value)}" for name, value in self.document.items())
        partial.write_text("{\n" + ",\n".join(entries) + "\n}\n")
        os.replace(partial, self.path)

    def _stamped(self, info: Row) -> Row:
        return {**info, "taken": _now(), "run": len(self.document["provenance"]) - 1}

    def _infos(self) -> Iterator[Row]:
        for section in ("benchmarks", "not_timed"):
            yield from (row["extra_info"] for row in self.document[section])

    def _put(self, section: str, row: Row) -> None:
        key = row["extra_info"]["key"]
        for name in ("benchmarks", "not_timed"):
            kept = [r for r in self.document[name] if r["extra_info"]["key"] != key]
            self.document[name] = kept
        self.document[section].append(row)
        self.write()


def results_path(
    chosen: Path | None, device: str, origin: dict[str, object], ending: str = ""
) -> Path:
    """Return the file for results of a device and a provenance.

    ``chosen`` is a file, or a folder that has one for each device, date and commit, and ``ending`` of its
    name. A clean commit's newest file goes on being used; an altered checkout's carries ``dirty``.
    """
    if chosen is not None and chosen.suffix == ".json":
        return chosen
    commit = str(origin["commit"])[:7] + ("-dirty" if origin["dirty"] else "") + ending
    folder = (chosen or FOLDER) / device
    found = sorted(folder.glob(f"????-??-??-{commit}.json"))
    return found[-1] if found else folder / f"{str(origin['date'])[:10]}-{commit}.json"


def all_results(folder: Path = FOLDER) -> list[Results]:
    """Return every file of results under a folder, oldest first; files of other kinds are left out."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and all(name in document for name in _SECTIONS):
            found.append(Results.open(path))
    return sorted(found, key=lambda results: str(results.document["datetime"]))


def _lines(value: object) -> str:
    """JSON with a line for each row, so that a change shows as the rows that changed."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
    return json.dumps(value)


def _matches(row: Row, equal: dict[str, object]) -> bool:
    info = row["extra_info"]
    return all(info.get(name) == value for name, value in equal.items())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
