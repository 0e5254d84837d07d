"""Time the predictor, forward and backward: `python -m benchmarks.predictor`.

ViT-B shapes; in fp32 on the CPU, or on a GPU with `--device cuda --precision bf16`. Nothing is timed
unless output and every gradient of every arm agree with the published arm, given the same noise; what
is timed draws its own. Goal: 1.5 times StoP's published arm.

`published` is what each program does, and they differ: StoP recomputes attention and MLP of every
block in the backward, I-JEPA never does. Each mode has the other choices as arms of their own, and
the strongest opponent: no recomputation and fused library attention. On a GPU the fused operations and
the compiled opponent are arms too, and each arm's peak memory is told.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks.harness import compare, peak_bytes, print_table, relative_error, write_results
from benchmarks.published import PublishedPredictor
from stopfast.predictor import Predictor

PATCHES, WIDTH = 196, 768  # ViT-B/16 at 224; the predictor's own sizes are its defaults
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
GOAL = 1.5
OURS, THEIRS = "stopfast", "published"
CHOICES = {"none": "not recomputing", "full": "recomputing", "early": "recomputing, early stop"}
MODES: dict[str, bool | None] = {"I-JEPA": None, "StoP": True}


@dataclass(frozen=True)
class Args:
    """Predictor of ViT-B: the published programs' way and the library."""

    rounds: int = 7
    warmup: int = 1
    threads: int | None = None
    """Threads of torch; its own default when left out."""
    images: int = 8
    targets: int = 4
    context_tokens: int = 80
    target_tokens: int = 36
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast."""
    save: bool = False
    """Write the samples and their provenance under benchmarks/results."""


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    contexts: list[Tensor]
    targets: list[Tensor]
    noise: list[Tensor] | None
    cotangent: Tensor
    autocast: torch.dtype | None


def draw_inputs(args: Args, apply_stop: bool | None) -> Inputs:
    """Explicit noise for StoP, so that every arm computes the same numbers."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)

    def indices(count: int) -> Tensor:
        scores = torch.rand(args.images, PATCHES, generator=generator)
        return scores.argsort(dim=1)[:, :count].sort(dim=1).values

    size = (args.images, args.target_tokens, WIDTH)
    noise = (
        [0.25 * normal(size).to(args.device) for _ in range(args.targets)] if apply_stop else None
    )
    return Inputs(
        x=normal((args.images, args.context_tokens, WIDTH)).to(args.device).requires_grad_(),
        contexts=[indices(args.context_tokens).to(args.device)],
        targets=[indices(args.target_tokens).to(args.device) for _ in range(args.targets)],
        noise=noise,
        cotangent=normal((args.targets * args.images, *size[1:])).to(args.device),
        autocast=torch.bfloat16 if args.precision == "bf16" else None,
    )


def build_arms(mode: str, device: str) -> dict[str, nn.Module]:
    """One set of weights in every arm. Biases are drawn too: zeros would hide a lost one."""
    apply_stop = MODES[mode]
    torch.manual_seed(0)
    shared = {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "apply_stop": apply_stop}
    published = partial(PublishedPredictor, PATCHES, WIDTH, **shared)
    program, other = ("full", "none") if mode == "StoP" else ("none", "full")
    arms: dict[str, nn.Module] = {
        THEIRS: published(checkpointing=program),
        CHOICES[other]: published(checkpointing=other),
        CHOICES["early"]: published(checkpointing="early"),
        "SDPA, not recomputing": published(sdpa=True),
        OURS: Predictor(PATCHES, WIDTH, **shared),
    }
    compiled: dict[str, nn.Module] = {}
    if device == "cuda":
        arms[f"{OURS}, fused"] = Predictor(PATCHES, WIDTH, **shared, ops="fused")
        compiled["SDPA, not recomputing, compiled"] = published(sdpa=True)
        arms |= compiled
    with torch.no_grad():
        for parameter in arms[THEIRS].parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    for name, arm in arms.items():
        arm.load_state_dict(arms[THEIRS].state_dict(), strict=True)
        arm.to(device)
        if name in compiled:
            arm.compile()
    return arms


def step(arm: nn.Module, inputs: Inputs) -> Tensor:
    """Forward and backward from fresh gradients, as a training step has them."""
    arm.zero_grad(set_to_none=True)
    inputs.x.grad = None
    with torch.autocast(
        inputs.x.device.type, inputs.autocast or torch.bfloat16, enabled=inputs.autocast is not None
    ):
        prediction = arm(inputs.x, inputs.contexts, inputs.targets, noise=inputs.noise)
    prediction.backward(inputs.cotangent.to(prediction.dtype))
    return prediction.detach()


def results(arm: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    prediction = step(arm, inputs)
    return {
        "output": prediction,
        "gradient of x": inputs.x.grad,
        **{f"gradient of {name}": p.grad for name, p in arm.named_parameters()},
    }


def worst_error(arm: nn.Module, expected: dict[str, Tensor | None], inputs: Inputs) -> float:
    """Largest relative error of an arm; exits when any is beyond the tolerance."""
    tolerance = TOLERANCE["fp32" if inputs.autocast is None else "bf16"]
    got = results(arm, inputs)
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        sys.exit(f"not timed: relative errors above {tolerance} of the published arm: {wrong}")
    return max(errors.values())


def run_mode(mode: str, args: Args) -> dict[str, object]:
    inputs = draw_inputs(args, MODES[mode])
    arms = build_arms(mode, args.device)
    expected = results(arms[THEIRS], inputs)
    errors = {name: worst_error(arm, expected, inputs) for name, arm in arms.items()}

    def timed(arm: nn.Module) -> Callable[[], object]:
        return lambda: step(arm, inputs)

    # Equal numbers need given noise; a real step draws its own, each arm in its own way.
    inputs = replace(inputs, noise=None)
    timings = compare({n: timed(a) for n, a in arms.items()}, args.rounds, args.warmup, args.device)
    shape = f"{args.images} images, {args.targets} x ({args.context_tokens}+{args.target_tokens})"
    threads = f"{torch.get_num_threads()} thread(s)"
    print_table(f"{mode} predictor, {shape} tokens, {threads}", timings, THEIRS)
    ratios = {name: timing.median / timings[OURS].median for name, timing in timings.items()}
    for name, ratio in ratios.items():
        if name != OURS:
            goal = f" (goal: {GOAL})" if name == THEIRS and mode == "StoP" else ""
            print(f"{mode}: {OURS} is {ratio:.2f} times as fast as {name}{goal}")
    print(f"{mode}: largest relative error of {OURS}: {errors[OURS]:.1e}")
    figures = {name: timing.as_dict() for name, timing in timings.items()}
    peaks = {name: peak_bytes(timed(arm), torch.device(args.device)) for name, arm in arms.items()}
    if args.device == "cuda":
        print(f"{mode}: peak memory in MiB { ({n: (p or 0) >> 20 for n, p in peaks.items()}) }")
    return {"timings": figures, "ratios": ratios, "relative_errors": errors, "peak_bytes": peaks}


def main(args: Args) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    modes = {mode: run_mode(mode, args) for mode in MODES}
    if args.save:
        payload = {"args": asdict(args), "goal": GOAL, "modes": modes}
        print(write_results("predictor", payload, args.device))


if __name__ == "__main__":
    main(tyro.cli(Args))
