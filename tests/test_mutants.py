"""The lists of mutants are in step with the source: `python -m tests.mutants`, `tests.kernel_mutants`."""

import pytest

from tests import kernel_mutants
from tests.mutants import CASES, MUTANTS
from tests.mutation import ROOT


def test_every_case_has_a_mutant_that_applies():
    assert {mutant.case for mutant in MUTANTS} == set(CASES)
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.right) == 1, f"case {mutant.case}: {mutant.right!r}"
        assert mutant.right != mutant.wrong


@pytest.mark.parametrize(
    "mutant", kernel_mutants.MUTANTS, ids=lambda m: f"{m.operation}: {m.mistake}"
)
def test_every_mutant_of_a_kernel_applies(mutant: kernel_mutants.Mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.right) == 1
    assert mutant.right != mutant.wrong
