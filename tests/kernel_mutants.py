"""Show that the tests of the fused operations can fail: `python -m tests.kernel_mutants [OPERATION ...]`.

Each mistake is made in a copy of the source, and that operation's tests are run on the copy, without a
GPU: they must fail, and they must pass on a copy without it. At least 95 % have to be caught.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.mutation import run_on_copy

GOAL = 0.95


class Mutant(NamedTuple):
    """A mistake: text that is once in a file of an operation, and what it becomes."""

    operation: str
    mistake: str
    file: str
    right: str
    wrong: str


TESTS = {
    "predictor_tokens": (
        "tests/test_kernels.py",
        "tests/test_real_shapes.py",
        "tests/test_partial_sums.py",
    ),
    "target_smooth_l1": ("tests/test_kernels.py", "tests/test_real_shapes.py"),
    "attention": (
        "tests/test_kernels.py",
        "tests/test_real_shapes.py",
        "tests/test_attention_backends.py",
        "tests/test_attention.py",
    ),
    "layer_norm": ("tests/test_kernels.py", "tests/test_dtypes.py", "tests/test_partial_sums.py"),
    "linear_gelu": (
        "tests/test_kernels.py",
        "tests/test_dtypes.py",
        "tests/test_linear_gelu.py",
        "tests/test_partial_sums.py",
    ),
    "adamw_ema": ("tests/test_kernels.py", "tests/test_adamw_ema.py"),
    "multiblock_masks": ("tests/test_kernels.py", "tests/test_fused_masks.py"),
    "position_cross_entropy": (
        "tests/test_kernels.py",
        "tests/test_real_shapes.py",
        "tests/test_dtypes.py",
        "tests/test_position_map.py",
        "tests/test_partial_sums.py",
    ),
    "patch_mse": (
        "tests/test_kernels.py",
        "tests/test_real_shapes.py",
        "tests/test_dtypes.py",
        "tests/test_partial_sums.py",
    ),
}
"""By operation, the files of its tests; of those that serve several, the tests that name it are run."""

TOKENS, GRADIENTS = "kernels/_token_kernels.py", "kernels/_token_gradients.py"
ATTENTION, NORM, GELU = (
    "kernels/_attention_kernels.py",
    "kernels/layer_norm.py",
    "kernels/linear_gelu.py",
)
UPDATE, MASKS = "kernels/adamw_ema.py", "kernels/multiblock_masks.py"
PHILOX, LOSS, WRAPPER = (
    "kernels/_philox.py",
    "kernels/target_smooth_l1.py",
    "kernels/predictor_tokens.py",
)

P, S, A, N = "predictor_tokens", "target_smooth_l1", "attention", "layer_norm"
G, U, M = "linear_gelu", "adamw_ema", "multiblock_masks"
POSITION, PATCH, MEANS = (
    "kernels/position_cross_entropy.py",
    "kernels/patch_mse.py",
    "kernels/_means.py",
)
E, Q = "position_cross_entropy", "patch_mse"
MUTANTS = (
    Mutant(P, "32-bit rows", TOKENS, "row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)",
           "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)"),
    Mutant(P, "last row written by nobody", TOKENS, "    inside = row < rows\n", "    inside = row < rows - 1\n"),
    Mutant(P, "padding not masked in the kernel", TOKENS,
           "        real = inside & (token < tl.load(lengths + (0 if CONTEXT else 1)))", "        real = inside"),
    Mutant(P, "the other kind's length", TOKENS,
           "        real = inside & (token < tl.load(lengths + (0 if CONTEXT else 1)))",
           "        real = inside & (token < tl.load(lengths + (1 if CONTEXT else 0)))"),
    Mutant(P, "lengths off by one", TOKENS,
           "        real = inside & (token < tl.load(lengths + (0 if CONTEXT else 1)))",
           "        real = inside & (token <= tl.load(lengths + (0 if CONTEXT else 1)))"),
    Mutant(P, "x's strides swapped", TOKENS, "x + sequence * x_sequence + token * x_token",
           "x + sequence * x_token + token * x_sequence"),
    Mutant(P, "channels beyond the width read", TOKENS, "both = real[:, None] & (d < depth)[None, :]",
           "both = real[:, None] & (d < depth + 1)[None, :]"),
    Mutant(P, "vector dropped", TOKENS, "    if added is not None:\n", "    if added is None:\n"),
    Mutant(P, "position of the next row of the table", TOKENS, "(pos_embed + position * columns)",
           "(pos_embed + position * columns + 1)"),
    Mutant(P, "context written to one sequence only", TOKENS, "        out += repeat_stride\n", ""),
    Mutant(P, "queries' first slot forgotten", TOKENS, "(sequence * slots + first_slot + token)",
           "(sequence * slots + token)"),
    Mutant(P, "image and copy swapped", TOKENS, "image = sequence % batch", "image = sequence // copies % batch"),
    Mutant(P, "places of another image", TOKENS, "at = (block * batch + image) * tokens + token",
           "at = block * tokens + token"),
    Mutant(P, "copies share noise", TOKENS,
           "token | (block << 16) | (copy << 24)", "token | (block << 16)"),
    Mutant(P, "context drawn as a query", TOKENS, "token | (copy << 24) | 0x80000000", "token | (copy << 24)"),
    Mutant(P, "noise not scaled", TOKENS, "        noise = (\n", "        noise = (1 / std) * (\n"),
    Mutant(P, "every tile draws the first channels", TOKENS, "first_quad = channel // 4", "first_quad = 0"),
    Mutant(P, "explicit draws' rows confused", TOKENS, "given = explicit + row[:, None] * channels",
           "given = explicit + image[:, None] * channels"),
    Mutant(P, "positions' rows doubled", TOKENS, "for start in range(0, rows_each, ROWS):\n        row = first + start + tl.arange(0, ROWS)\n        sequence, token, _, at, _",
           "for start in range(0, 2 * rows_each, ROWS):\n        row = first + start + tl.arange(0, ROWS)\n        sequence, token, _, at, _"),
    Mutant(P, "positions summed at the wrong place", TOKENS, "chosen = (n[:, None] == position[None, :])",
           "chosen = (n[:, None] == position[None, :] + 1)"),
    Mutant(P, "padded rows enter the weight's gradient", GRADIENTS,
           "        x = torch.where(real[:kept, None], x, 0)\n", ""),
    Mutant(P, "gradient of one copy of the context", GRADIENTS,
           "gradient[:, :, :kept].sum(0, dtype=torch.float32)", "gradient[0, :, :kept].float()"),
    Mutant(P, "vector's gradient from all slots", GRADIENTS, "on_query = gradient[:, :, kept:]",
           "on_query = gradient[:, :, : gradient.shape[2] - kept]"),
    Mutant(P, "noise missing from the tied weight's gradient", GRADIENTS,
           "to_weight, to_noise = to_weight.float() + to_noise, None", "to_weight, to_noise = to_weight.float(), None"),
    Mutant(P, "a range of rows left out", GRADIENTS, "return rows_each, triton.cdiv(rows, rows_each)",
           "return rows_each, max(1, rows // rows_each)"),
    Mutant(P, "second normal is the first", PHILOX, "n0, n1 = normal_pair(w0, w1)",
           "n0, _ = normal_pair(w0, w1)\n    n1 = n0"),
    Mutant(P, "sine's sign", PHILOX, "s = tl.where(quadrant >= 2, -s, s)", "s = tl.where(quadrant > 2, -s, s)"),
    Mutant(P, "sample in 16 bits", PHILOX, "sample.to(tl.uint32)", "(sample & 1).to(tl.uint32)"),
    Mutant(P, "step not in the counter", PHILOX, "+ step.to(tl.uint32)", "+ (step * 0).to(tl.uint32)"),
    Mutant(P, "normals interleaved wrongly", PHILOX, "tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))",
           "tl.interleave(tl.interleave(n0, n1), tl.interleave(n2, n3))"),
    Mutant(P, "bias and offset swapped", WRAPPER, "bias if is_context else offset", "offset if is_context else bias"),
    Mutant(P, "own projection of the noise ignored", WRAPPER,
           "(noise_weight if noise_weight is not None else weight) if projected", "weight if projected"),
    Mutant(S, "mean not removed", LOSS, "target - mean[:, None]", "target"),
    Mutant(S, "eps outside the root", LOSS, "/ width + 1e-5)", "/ width) + 1e-5"),
    Mutant(S, "variance unbiased", LOSS, "centred * centred, 1) / width", "centred * centred, 1) / (width - 1)"),
    Mutant(S, "beta of 2", LOSS, "slope = tl.where(size < 1.0", "slope = tl.where(size < 2.0"),
    Mutant(S, "linear part without its half", LOSS, "size - 0.5)", "size)"),
    Mutant(S, "padding counted", LOSS, "count = (rows // tokens * length).to(tl.float32) * width",
           "count = rows * 1.0 * width"),
    Mutant(S, "padding read", LOSS, "real = inside & (token < length)", "real = inside & (token <= length)"),
    Mutant(S, "image of another sequence", LOSS, "image = sequence % batch", "image = sequence // batch % batch"),
    Mutant(S, "token's stride for the image's", LOSS, "image[:, None] * features_image", "image[:, None] * features_token"),
    Mutant(S, "sign of the linear slope", LOSS, "tl.where(error > 0, 1.0, -1.0)", "tl.where(error > 0, 1.0, 1.0)"),
    Mutant(S, "incoming gradient ignored", LOSS, "(tl.load(upstream) / count)", "(1.0 / count)"),
    Mutant(A, "keys of the padding seen", ATTENTION, "return tl.where(slot < context_slots, slot < context, slot - context_slots < target)",
           "return tl.where(slot < context_slots, slot <= context, slot - context_slots < target)"),
    Mutant(A, "keys beyond the last weigh in", ATTENTION, "scores = scores * (scale * _LOG2_E) + tl.where(keys, 0.0, _LOWEST)[None, :]",
           "scores = scores * (scale * _LOG2_E)"),
    Mutant(A, "natural exponent", ATTENTION, "scores = scores * (scale * _LOG2_E) + tl.where", "scores = scores * scale + tl.where"),
    Mutant(A, "rows not normed", ATTENTION, "tl.where(real, 1.0 / tl.sum(weights, 1), 0.0)", "tl.where(real, 1.0, 0.0)"),
    Mutant(A, "padded queries answered", ATTENTION, "mixed *= tl.where(real, 1.0 / tl.sum(weights, 1), 0.0)[:, None]",
           "mixed *= (1.0 / tl.sum(weights, 1))[:, None]"),
    Mutant(A, "target queries taken for context", ATTENTION, "real = (row < rows) & _real(first + row, context_slots, context, target)\n\n    far",
           "real = (row < rows) & _real(row, context_slots, context, target)\n\n    far"),
    Mutant(A, "delta dropped", ATTENTION, "weights * (slope - tl.sum(weights * slope, 1)[:, None])", "weights * slope"),
    Mutant(A, "scale missing from the keys' gradient", ATTENTION, "(dk_tile * scale).to(", "dk_tile.to("),
    Mutant(A, "scale missing from the queries' gradient", ATTENTION, "input_precision=\"ieee\") * scale\n", "input_precision=\"ieee\")\n"),
    Mutant(A, "values' gradient from the first rows alone", ATTENTION, "dv_tile = tl.dot(tl.trans(low), up_tile, dv_tile,", "dv_tile = tl.dot(tl.trans(low), up_tile, dv_tile * 0,"),
    Mutant(A, "upstream's strides swapped", ATTENTION, "image * upstream_batch + head + far * upstream_row", "image * upstream_row + head + far * upstream_batch"),
    Mutant(N, "residual dropped", NORM, "value += tl.load(residual + at", "value += 0 * tl.load(residual + at"),
    Mutant(N, "eps outside the root", NORM, "tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)", "tl.rsqrt(tl.sum(centred * centred, 1) / width) + eps"),
    Mutant(N, "bias dropped", NORM, "    if bias is not None:\n        result +=", "    if bias is None:\n        result +="),
    Mutant(N, "mean of the gradient kept", NORM, "slope - tl.sum(slope, 1)[:, None] / width - normal * along", "slope - normal * along"),
    Mutant(N, "gradient through the sum lost", NORM, "gradient += tl.load(through_total", "gradient += 0 * tl.load(through_total"),
    Mutant(G, "bias of the other stripe", GELU, "column + COLUMNS // 4, rows", "column, rows"),
    Mutant(G, "tanh's approximation", GELU, "slope *= _distribution(value) + value * density", "slope *= _distribution(value)"),
    Mutant(G, "sign of the lower half", GELU, "return tl.where(x < 0, lower, 1.0 - lower)", "return tl.where(x < 0, 1.0 - lower, lower)"),
    Mutant(G, "depth's end read unmasked", GELU, "held = channel < depth - start", "held = channel < depth"),
    Mutant(G, "rows of other programs skipped", GELU, "range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS)",
           "range(tl.program_id(0) * ROWS, tl.program_id(0) * ROWS + ROWS, tl.num_programs(0) * ROWS)"),
    Mutant(U, "average of the old weights", UPDATE, "teacher += follow * (value - teacher)", "teacher += follow * (value * (1 + shrink) - teacher)"),
    Mutant(U, "second moment not corrected", UPDATE, "root = tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))", "root = tl.sqrt(1.0 - 0.0 * tl.exp(step * tl.log(beta2)))"),
    Mutant(U, "decay of the updated weights", UPDATE, "gain1 * (slope - mean)", "gain1 * slope"),
    Mutant(U, "written in spite of an overflow", UPDATE, "end = tl.where(tl.load(found_inf) == 0, numel, 0)", "end = tl.where(tl.load(found_inf) == 0, numel, numel)"),
    Mutant(U, "gradient not unscaled", UPDATE, "slope = tl.div_rn(slope, scale)", "slope = tl.div_rn(slope, 1.0)"),
    Mutant(U, "last block left out", UPDATE, "for block in range(BLOCKS):", "for block in range(BLOCKS - 1):"),
    Mutant(M, "last place never drawn", MASKS, "target_down, target_right = rows - target_height + EDGE", "target_down, target_right = rows - target_height"),
    Mutant(M, "words of the other block", MASKS, "odd = block % 2 == 1", "odd = block % 2 == 0"),
    Mutant(M, "redrawn at the same place", MASKS, "key, NPRED + copy, attempt, sample", "key, NPRED + copy, 0, sample"),
    Mutant(M, "constraints never dropped", MASKS, "NPRED - attempt // FAILURES", "NPRED"),
    Mutant(M, "one patch too few accepted", MASKS, "(kept <= min_keep)", "(kept < min_keep)"),
    Mutant(M, "targets allowed in contexts", MASKS, "tl.where(inside, 0, member)", "tl.where(inside, member, member)"),
    Mutant(M, "unused slots not zeroed", MASKS, "unused = (patch >= kept)", "unused = (patch > kept)"),
    Mutant(E, "distance not squared", POSITION, "-(distance * distance) * sharpness", "-tl.abs(distance) * sharpness"),
    Mutant(E, "sigma not squared", POSITION, "tl.maximum(spread * spread, ", "tl.maximum(spread, "),
    Mutant(E, "twice the variance", POSITION, "1.0 / tl.maximum(", "0.5 / tl.maximum("),
    Mutant(E, "no floor at sigma 0", POSITION, "tl.maximum(spread * spread, SMALLEST_SPREAD)", "(spread * spread)"),
    Mutant(E, "rows normed for columns", POSITION, "apart = (label if BY_ROW else place)", "apart = (place if BY_ROW else label)"),
    Mutant(E, "always normed by row", POSITION, 'by_row = smoothing.norm == "row"', "by_row = True"),
    Mutant(E, "places beyond the axis in the sums", POSITION, "tl.where((every < SIDE)[None, :], _near(apart, sharpness), 0.0)", "_near(apart, sharpness)"),
    Mutant(E, "sums end with the logits", POSITION, "        DOWN=down,\n", "        DOWN=triton.cdiv(positions, across),\n"),
    Mutant(E, "axes of the label swapped", POSITION, "_shares(label // ACROSS, sharpness, DOWN", "_shares(label % ACROSS, sharpness, DOWN"),
    Mutant(E, "labels made up to 1", POSITION, "tl.log(all_mass) * all_smoothed - expected", "tl.log(all_mass) - expected / all_smoothed"),
    Mutant(E, "gradient of labels that add up to 1", POSITION, "(all_smoothed / all_mass)", "(1.0 / all_mass)"),
    Mutant(E, "logits beyond the last", POSITION, "& (position < positions))", "& (position <= positions))"),
    Mutant(E, "last column's neighbour", POSITION, "(across < ACROSS)[None, :]", "(across <= ACROSS)[None, :]"),
    Mutant(E, "highest logit not subtracted", POSITION, "highest = tl.where(inside, tl.max(tl.max(value, 2), 1), 0.0)", "highest = tl.where(inside, 0.0, 0.0)"),
    Mutant(E, "confident from above only", POSITION, "likely >= wanted", "likely > wanted"),
    Mutant(E, "the confident kept", POSITION, "tl.where(likely >= wanted, 0.0, counted)", "tl.where(likely >= wanted, counted, 0.0)"),
    Mutant(E, "confidence not a probability", POSITION, "highest - tl.log(all_mass))", "highest)"),
    Mutant(E, "own share of the other axis", POSITION, "_own_share(by_column, label % ACROSS, WIDE)", "_own_share(by_column, label // ACROSS, WIDE)"),
    Mutant(E, "ignored whether asked or not", POSITION, "    if IGNORE_CONFIDENT:\n", "    if True:\n"),
    Mutant(E, "all patches count", POSITION, "counted = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)", "counted = tl.where(inside, 1.0, 0.0)"),
    Mutant(E, "weights forgotten going back", POSITION, "tl.load(upstream) / divisor) * counted", "tl.load(upstream) / divisor) * tl.where(counted > 0, 1.0, 0.0)"),
    Mutant(E, "incoming gradient ignored", POSITION, "tl.load(upstream) / divisor)", "1.0 / divisor)"),
    Mutant(E, "a batch without weight divided by", POSITION, "tl.where(divisor == 0.0, 0.0, tl.load(upstream) / divisor)", "(tl.load(upstream) / divisor)"),
    Mutant(E, "no weight, no number", MEANS, "tl.where(weight == 0.0, 1.0, weight)", "weight"),
    Mutant(E, "strides swapped", POSITION, "row // visible * logits_image + row % visible * logits_patch", "row // visible * logits_patch + row % visible * logits_image"),
    Mutant(E, "sums of the first programs", MEANS, "at = start + tl.arange(0, BLOCK)", "at = tl.arange(0, BLOCK)"),
    Mutant(Q, "sums of the first programs", MEANS, "at = start + tl.arange(0, BLOCK)", "at = tl.arange(0, BLOCK)"),
    Mutant(Q, "mean of a batch of nothing", MEANS, "tl.where(weight == 0.0, 1.0, weight)", "weight"),
    Mutant(Q, "sum for the mean", PATCH, "mean_of(sums, prediction.numel())", "mean_of(sums, 1)"),
    Mutant(Q, "biased variance of a patch", PATCH, "(SIDE * SIDE * CHANNELS - 1)", "(SIDE * SIDE * CHANNELS)"),
    Mutant(Q, "biased variance of a channel", PATCH, "(SIDE * SIDE - 1)", "(SIDE * SIDE)"),
    Mutant(Q, "eps outside the root", PATCH, "CHANNELS - 1) + eps0)", "CHANNELS - 1)) + eps0"),
    Mutant(Q, "eps inside the root", PATCH, "tl.sqrt(tl.sum(target * target, 1) / (SIDE * SIDE - 1))", "tl.sqrt(tl.sum(target * target, 1) / (SIDE * SIDE - 1) + eps0)"),
    Mutant(Q, "one eps for all channels", PATCH, "(deviation + eps[None, :])", "(deviation + eps0)"),
    Mutant(Q, "mean of the patch left in", PATCH, "target - mean[:, None, None]", "target"),
    Mutant(Q, "mean of the channel left in", PATCH, "target - mean[:, None, :]", "target"),
    Mutant(Q, "pixels beyond the patch in the sum", PATCH, "target = tl.where(both, target - mean[:, None, :], 0.0)", "target = target - mean[:, None, :]"),
    Mutant(Q, "channels before pixels", PATCH, "value = (pixel * CHANNELS)[:, None] + channel[None, :]", "value = pixel[:, None] + (channel * SIDE * SIDE)[None, :]"),
    Mutant(Q, "pixels by columns", PATCH, "(pixel // SIDE).to(tl.int64) * images_row + (pixel % SIDE).to(tl.int64) * images_column", "(pixel % SIDE).to(tl.int64) * images_row + (pixel // SIDE).to(tl.int64) * images_column"),
    Mutant(Q, "patches by columns", PATCH, "images.shape[3] // side,", "images.shape[2] // side,"),
    Mutant(Q, "index ignored", PATCH, "    if index is not None:\n        patch = ", "    if index is not None:\n        patch = 0 * "),
    Mutant(Q, "patch of another image", PATCH, "corner = image * images_image", "corner = row % 2 * images_image"),
    Mutant(Q, "dense rows of the image assumed", PATCH, "*images.stride(),", "*images.stride()[:2], images.shape[3], 1,"),
    Mutant(Q, "prediction's strides swapped", PATCH, "image * prediction_image + patch * prediction_token", "image * prediction_token + patch * prediction_image"),
    Mutant(Q, "half the gradient", PATCH, "(2.0 * tl.load(upstream) / count)", "(tl.load(upstream) / count)"),
    Mutant(Q, "incoming gradient ignored", PATCH, "(2.0 * tl.load(upstream) / count)", "(2.0 / count)"),
    Mutant(Q, "gradient of the sum", PATCH, "(2.0 * tl.load(upstream) / count)", "(2.0 * tl.load(upstream))"),
)  # fmt: skip


def run_tests(copy: Path, operation: str) -> int:
    """Run one operation's tests inside a copy of the source; return pytest's exit code."""
    shared = ["tests/test_kernels.py", "tests/test_real_shapes.py", "tests/test_dtypes.py"]
    ignored = ["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={copy}"]
    for files in (shared, [f for f in TESTS[operation] if f not in shared]):
        chosen = [str(copy / f) for f in files if f in TESTS[operation] and (copy / f).exists()]
        if not chosen:
            continue
        named = ["-k", operation] if files is shared else []
        code = pytest.main([*ignored, *chosen, *named])
        if code != pytest.ExitCode.OK:
            return int(code)
    return 0


def main(operations: list[str]) -> int:
    """Print a line a mutant; return 0 if enough are caught and every operation passes without one."""
    chosen = set(operations) or set(TESTS)
    if chosen - set(TESTS):
        print(f"expected operations from {sorted(TESTS)}, got {sorted(chosen)}")
        return 1
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    import_module(
        "torch._dynamo"
    )  # and Triton with it, before the forks, so that each copy need not
    clean = True
    for operation in sorted(chosen):
        code = run_on_copy(None, lambda copy, name=operation: run_tests(copy, name))
        clean = clean and code == 0
        print(
            f"{'passed' if code == 0 else f'FAILED ({code})'}  {operation} without a mistake",
            flush=True,
        )
    caught, survivors = 0, []
    for mutant in (m for m in MUTANTS if m.operation in chosen):
        mistake = (mutant.file, mutant.right, mutant.wrong)
        code = run_on_copy(mistake, lambda copy, name=mutant.operation: run_tests(copy, name))
        verdict = "caught" if code == pytest.ExitCode.TESTS_FAILED else f"SURVIVED ({code})"
        caught += code == pytest.ExitCode.TESTS_FAILED
        survivors += [] if verdict == "caught" else [mutant]
        print(f"{verdict}  {mutant.operation}: {mutant.mistake}", flush=True)
    total = caught + len(survivors)
    share = caught / total if total else 1.0
    print(f"{caught} of {total} mutants caught ({share:.0%}, goal {GOAL:.0%})")
    return int(not clean or share < GOAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
