"""Tests of stopfast; `python -m tests.mutants` shows that they can fail."""
