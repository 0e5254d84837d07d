"""A page of pictures about finished or stopped runs; begin at :mod:`stopfast.report.compose`."""
