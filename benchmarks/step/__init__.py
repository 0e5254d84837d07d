"""One training problem, the programs that solve it, and whether they solve the same."""
