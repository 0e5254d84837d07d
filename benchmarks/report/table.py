"""What a table is."""

from typing import NamedTuple


class Table(NamedTuple):
    """Text by rows; ``notes`` stand below."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]
