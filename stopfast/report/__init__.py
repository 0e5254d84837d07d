"""One HTML page of curves and pictures about finished or stopped runs."""

from stopfast.report.compose import report

__all__ = ["report"]
