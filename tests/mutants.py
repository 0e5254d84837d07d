"""Show that the tests of the specification can fail: `python -m tests.mutants [CASE ...]`.

Each case of the specification of the published systems names a mistake. Here the mistake is made, in a
copy of the source, and the case's tests (those marked `spec(case)`) are run on it: they must fail, and
they must pass on the copy without it.
"""

import sys
from pathlib import Path

# Imported before the fork, so that each copy need not: they are most of a run's time.
import huggingface_hub  # noqa: F401
import numpy  # noqa: F401
import pytest
import safetensors  # noqa: F401
import torch
import torch.optim.swa_utils  # noqa: F401

from tests import degradation_mutants, droppos_mutants, reconstruction_mutants
from tests.mutation import Mutant, run_on_copy

CASES = tuple(range(1, 51))
FAILED, PASSED = pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK


MASKING, TABLES = "stopfast/masking.py", "stopfast/mask_tables.py"
PREDICTOR, ENCODER = "stopfast/predictor.py", "stopfast/encoder.py"
REFERENCE, BLOCK, OPTIM = "kernels/reference.py", "stopfast/block.py", "stopfast/optim.py"
NOISE = "kernels/noise.py"
SCHEDULES, POSITIONS = "stopfast/schedules.py", "stopfast/pos_embed.py"

MUTANTS = (
    Mutant(
        1,
        "context drawn before target",
        MASKING,
        "target, context = torch.rand(",
        "context, target = torch.rand(",
    ),
    Mutant(
        1,
        "a draw of its own for the aspect",
        MASKING,
        "aspect_ratio[0] + draw *",
        "aspect_ratio[0] + (7 * draw % 1) *",
    ),
    Mutant(2, "last place reachable", MASKING, "+ int(self.edge_inclusive)", "+ 1"),
    Mutant(2, "last place never reachable", MASKING, "+ int(self.edge_inclusive)", "+ 0"),
    Mutant(
        3,
        "min_keep itself accepted",
        MASKING,
        "if kept <= self.min_keep:",
        "if kept < self.min_keep:",
    ),
    Mutant(3, "wrong complement", TABLES, "& ~covered", "& covered"),
    Mutant(
        3,
        "first targets dropped first",
        MASKING,
        "targets[:, :binding]",
        "targets[:, targets.shape[1] - binding :]",
    ),
    Mutant(
        4,
        "last patches kept",
        TABLES,
        "member.numpy() & (order <= kept)",
        "member.numpy() & (order > order[..., -1:] - kept)",
    ),
    Mutant(
        4,
        "padded to the longest instead of cut to the shortest",
        MASKING,
        "first_positions(member, rank, kept)",
        "member.byte().topk(int(rank.max()), -1).indices.sort(-1).values",
    ),
    Mutant(
        5,
        "targets a patch short",
        MASKING,
        "None] + tables[0].inside",
        "None] + tables[0].inside[1:]",
    ),
    Mutant(6, "row before column", POSITIONS, "in (columns, rows)", "in (rows, columns)"),
    Mutant(
        6,
        "sines and cosines interleaved",
        POSITIONS,
        "np.concatenate(halves, axis=1)",
        "np.stack(halves, axis=2).reshape(len(halves[0]), -1)",
    ),
    Mutant(7, "two sines", POSITIONS, ", np.cos(angle)]", ", np.sin(angle)]"),
    Mutant(
        8,
        "positions added after the gather",
        ENCODER,
        "table[torch.cat(masks)]",
        "table[: masks[0].shape[1]]",
    ),
    Mutant(
        9,
        "target blocks share what they see",
        PREDICTOR,
        "depth = len(self.predictor_blocks)",
        "depth = len(self.predictor_blocks)\n        x = x + x.mean((0, 1), True)",
    ),
    Mutant(
        10,
        "targets repeated by row (the published StoP)",
        REFERENCE,
        ".view(blocks, -1, batch, tokens, width)",
        ".view(blocks, batch, -1, tokens, width).transpose(1, 2)",
    ),
    Mutant(
        10,
        "contexts inside images",
        REFERENCE,
        "queries[:, None].expand(blocks, copies, batch, tokens, -1)",
        "queries[:, :, None].expand(blocks, batch, copies, tokens, -1)",
    ),
    Mutant(
        11,
        "targets not normed",
        REFERENCE,
        "F.layer_norm(rows.to(dtype), (width,))",
        "rows.to(dtype)",
    ),
    Mutant(
        11,
        "average the wrong way round",
        OPTIM,
        "get_ema_multi_avg_fn(momentum)",
        "get_ema_multi_avg_fn(1 - momentum)",
    ),
    Mutant(12, "squared error", REFERENCE, "return F.smooth_l1_loss", "return F.mse_loss"),
    Mutant(13, "norms decayed", OPTIM, '"bias" in n or p.ndim == 1', '"bias" in n'),
    Mutant(13, "mask token not decayed", OPTIM, "or p.ndim == 1", "or p.ndim != 2"),
    Mutant(
        13,
        "warm-up counted in the cosine",
        SCHEDULES,
        "(step - self.warmup_steps) / (self.total_steps - self.warmup_steps)",
        "step / self.total_steps",
    ),
    Mutant(13, "momentum a step ahead", SCHEDULES, "(step - 1)", "step"),
    Mutant(14, "rescaled by default", "stopfast/initial.py", "if rescale:", "if not rescale:"),
    Mutant(15, "giant with the common ratio", "stopfast/models.py", ", 48 / 11)", ")"),
    Mutant(
        15, "mask token frozen", PREDICTOR, 'in ("ijepa", "stop_paper"))', 'in ("stop_paper",))'
    ),
    Mutant(
        16,
        "noise_var as a variance",
        PREDICTOR,
        'if self.variant == "stop_paper" else noise_var',
        "if True else noise_var",
    ),
    Mutant(
        16,
        "noise of the predictor's width",
        PREDICTOR,
        "noise_dim = _resolve_noise_dim(noise_dim, cov, tie)",
        'cov, noise_dim = "fixed", "predictor"',
    ),
    Mutant(17, "bias left out of the query", PREDICTOR, '"stop": bias', '"stop": None'),
    Mutant(
        17,
        "StoP switched off is I-JEPA",
        PREDICTOR,
        '"stop_off": None',
        '"stop_off": self.mask_token.view(-1)',
    ),
    Mutant(18, "targets share noise", NOISE, "axis(blocks, 0) << 16", "axis(blocks, 0) * 0"),
    Mutant(
        18,
        "images share noise",
        NOISE,
        "& _MASK).view(1, 1, -1, 1, 1)",
        "* 0).view(1, 1, -1, 1, 1)",
    ),
    Mutant(
        18,
        "steps share noise",
        NOISE,
        "axis(quads, 4), place, sample, seed[1] & _MASK",
        "axis(quads, 4), place, sample, seed[1] * 0",
    ),
    Mutant(19, "context noisy too", PREDICTOR, 'stochastic and apply_to != "masked"', "stochastic"),
    Mutant(
        20,
        "noise path without gradient",
        REFERENCE,
        "F.linear(noise, noise_weight)",
        "F.linear(noise, noise_weight.detach())",
    ),
    Mutant(
        21,
        "mask token in StoP's query",
        PREDICTOR,
        '"stop": bias',
        '"stop": bias + self.mask_token.view(-1)',
    ),
    Mutant(
        21, "mask token trained in StoP", PREDICTOR, 'in ("ijepa", "stop_paper"))', "is not None)"
    ),
    Mutant(
        22,
        "noise has a weight of its own",
        PREDICTOR,
        "weight=own.weight if",
        "weight=torch.ones_like(own.weight) if",
    ),
    Mutant(
        23,
        "recomputation cuts the gradient",
        BLOCK,
        "checkpoint(function, *args,",
        "checkpoint(function, args[0].detach(), *args[1:],",
    ),
    Mutant(
        24,
        "queries in half precision",
        REFERENCE,
        "queries = queries + projected",
        "queries = queries.to(projected.dtype) + projected",
    ),
    Mutant(
        25,
        "norm after the average",
        ENCODER,
        "outputs.append(self.norm(taken))\n"
        "        result = outputs[0] if K == 1 else torch.stack(outputs).mean(0)",
        "outputs.append(taken)\n        result = self.norm(torch.stack(outputs).mean(0))",
    ),
    Mutant(
        26, "no threshold", SCHEDULES, "and step >= self.fix_step", "and step > self.total_steps"
    ),
    Mutant(
        26,
        "fixed at the final value",
        SCHEDULES,
        "fixed = self._curve(self.fix_step)",
        "fixed = self.final",
    ),
    Mutant(
        27,
        "noise_var as a variance",
        PREDICTOR,
        'if self.variant == "stop_paper" else noise_var',
        "if True else noise_var",
    ),
    Mutant(
        28,
        "untied noise shares the context's weight",
        PREDICTOR,
        "self.predictor_embed if self.noise_embed is None else self.noise_embed",
        "self.predictor_embed",
    ),
    *droppos_mutants.MUTANTS,
    *degradation_mutants.MUTANTS,
    *reconstruction_mutants.MUTANTS,
)


class Only:
    """A pytest plugin: run the tests of some cases, and tell which cases have any."""

    def __init__(self, cases: set[int]) -> None:
        self.cases = cases
        self.found: set[int] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            cases = {mark.args[0] for mark in item.iter_markers("spec")} & self.cases
            self.found |= cases
            kept += [item] if cases else []
        items[:] = kept


def run_copy(cases: set[int], mutant: Mutant | None) -> int:
    """Run the tests of some cases on a copy of the source, in a fork; return pytest's exit code.

    Raises:
        ValueError: the mutant's text is not in its file exactly once, or a case has no test.
    """
    mistake = None if mutant is None else (mutant.file, mutant.right, mutant.wrong)
    return run_on_copy(mistake, lambda copy: _test(copy, cases))


def _test(copy: Path, cases: set[int]) -> int:
    only = Only(cases)
    files = [str(p) for p in sorted(copy.glob("tests/test_*.py")) if "mark.spec" in p.read_text()]
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={copy}", *files]
    code = pytest.main(options, plugins=[only])
    return int(code) if only.found == cases else int(pytest.ExitCode.NO_TESTS_COLLECTED)


def main(arguments: list[str]) -> int:
    """Print a line a mutant; return 0 if every one is caught and every case passes without it."""
    cases = {int(argument) for argument in arguments} or set(CASES)
    absent = cases - {mutant.case for mutant in MUTANTS}
    if absent:
        print(f"cases without a mutant: {sorted(absent)}")
        return 1
    clean = run_copy(cases, None)
    print(
        f"{'passed' if clean == PASSED else 'FAILED'}  {len(cases)} cases without a mistake",
        flush=True,
    )
    survivors = 0
    for mutant in (m for m in MUTANTS if m.case in cases):
        code = run_copy({mutant.case}, mutant)
        caught = code == FAILED
        survivors += not caught
        verdict = "caught" if caught else f"SURVIVED (exit {code})"
        print(f"{verdict}  case {mutant.case}: {mutant.mistake}", flush=True)
    print(f"{survivors} of {sum(m.case in cases for m in MUTANTS)} mutants survived")
    return int(clean != PASSED or survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
