"""The list of mutants is in step with the source: `python -m tests.mutants` runs them."""

from tests.mutants import CASES, MUTANTS
from tests.mutation import ROOT


def test_every_case_has_a_mutant_that_applies():
    assert {mutant.case for mutant in MUTANTS} == set(CASES)
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.right) == 1, f"case {mutant.case}: {mutant.right!r}"
        assert mutant.right != mutant.wrong
