"""Tables and plots of the newest results: `python -m benchmarks report [--write | --check]`.

A Markdown file has a table between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``--write`` renews what
lies between, and the plots under ``benchmarks/results/plots``; ``--check`` exits with 1 where either is not
what the results make.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as Printed

from benchmarks.engine.provenance import HERE
from benchmarks.engine.results import FOLDER
from benchmarks.report import plots
from benchmarks.report.tables import TABLES, Table

FILES = (HERE.parent / "README.md", HERE / "NOTES.md")
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Tables and plots of the newest results."""

    write: bool = False
    """Renew the tables between markers, and the plots."""
    check: bool = False
    """Say what is not up to date, and exit with 1 if anything is."""
    table: tuple[str, ...] = ()
    """Tables to print; all that have rows when left out."""
    results: Path = FOLDER
    """Folder with a folder of results for each device."""
    file: tuple[Path, ...] = FILES
    """Markdown files with markers."""

    def __post_init__(self) -> None:
        if set(self.table) - set(TABLES):
            raise ValueError(f"expected tables of {list(TABLES)}, got {self.table}")


OPTIONS = ReportOptions


def run(options: ReportOptions) -> int:
    """Print, write or check; the exit status."""
    if options.check:
        wrong = [str(path) for path in stale(options)]
        for path in wrong:
            print(f"not up to date: {path}; see `python -m benchmarks report --write`")
        return int(bool(wrong))
    if options.write:
        for path in stale_files(options):
            path.write_text(renewed(path.read_text(), options.results))
            print(f"wrote {path}")
        for path in plots.write_plots(options.results):
            print(f"drew {path}" if path.exists() else f"removed {path}")
        return 0
    console = Console()
    for name in options.table or TABLES:
        table = TABLES[name](options.results)
        if table.rows:
            console.print(printed(table))
    return 0


def stale(options: ReportOptions) -> list[Path]:
    """Return the files and plots that the results would make otherwise."""
    return [*stale_files(options), *plots.stale(options.results)]


def stale_files(options: ReportOptions) -> list[Path]:
    """Return the Markdown files that have another table than the results make."""
    texts = {path: path.read_text() for path in options.file}
    return [path for path, text in texts.items() if renewed(text, options.results) != text]


def renewed(text: str, folder: Path = FOLDER) -> str:
    """Return a Markdown text with its tables made anew.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    ends = len(_MARKED.findall(text))
    if ends != text.count("<!-- table:"):
        raise ValueError("expected <!-- end --> after every <!-- table: NAME -->")

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"expected a marker for a table of {list(TABLES)}, got {found[2]!r}")
        return f"{found[1]}{markdown(TABLES[found[2]](folder))}\n{found[3]}"

    return _MARKED.sub(table, text)


def markdown(table: Table) -> str:
    """Return a table as Markdown; "not measured" where there are no rows."""
    if not table.rows:
        return f"{table.title}: not measured."
    lines = ["| " + " | ".join(table.headings) + " |", "|" + "---|" * len(table.headings)]
    lines += ["| " + " | ".join(_escaped(row)) + " |" for row in table.rows]
    notes = [f"\n{note}" for note in table.notes]
    return "\n".join([*lines, *notes])


def printed(table: Table) -> Printed:
    """Return a table for the console."""
    made = Printed(*table.headings, title=table.title, caption="\n".join(table.notes))
    for row in table.rows:
        made.add_row(*row)
    return made


def _escaped(row: list[str]) -> list[str]:
    escape: Callable[[str], str] = lambda text: text.replace("|", "\\|")  # noqa: E731
    return [escape(text) for text in row]
