"""What is searched for: attention's backend, operations worth fusing, tiles of each kernel."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.libraries import library_arms
from benchmarks.tuning.contest import Candidate, Phase
from benchmarks.tuning.verified import Kind
from stopfast.kernels._tiles import CHOICES, Tiles
from stopfast.kernels.attention import attention
from stopfast.kernels.attention_backends import attention_backend
from stopfast.kernels.cases import CASES, Case, Shape
from stopfast.kernels.ops import EAGER, FUSED

BY_NAME = {case.name: case for case in CASES}
CHOSEN = (
    "layer_norm",
    "linear_gelu",
    "target_smooth_l1",
    "multiblock_masks",
    "position_cross_entropy",
    "patch_mse",
)
"""Operations of which the table says whether ``ops='auto'`` fuses them."""
TILED = (
    "attention",
    "linear_gelu",
    "layer_norm",
    "adamw_ema",
    "predictor_tokens",
    "target_smooth_l1",
    "patch_mse",
    "position_cross_entropy",
)
"""Operations whose kernels have tiles to choose, by what is to be gained in a step."""
_IN_TRAINING: dict[str, Kind] = {
    "layer_norm": "autocast",
    "predictor_tokens": "autocast",
    "adamw_ema": "fp32",
    "multiblock_masks": "fp32",
}
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Problem(NamedTuple):
    """An operation at a shape."""

    label: str
    shape: Shape
    kind: Kind
    phase: Phase = "both"
    weight: int = 1
    """How many blocks of a model have it."""


def kind_of(operation: str, device: torch.device) -> Kind:
    """Return the precision that an operation has in training; in the interpreter fp32."""
    return _IN_TRAINING.get(operation, "bf16") if device.type == "cuda" else "fp32"


def problems(operation: str, device: torch.device) -> list[Problem]:
    """Return the shapes of the published models; without a GPU the tests' first."""
    case, kind = BY_NAME[operation], kind_of(operation, device)
    if device.type != "cuda":
        return [Problem("rehearsal", case.tested[0], kind)]
    return [Problem(label, shape, kind) for label, shape in case.timed.items()]


def attention_problems(device: torch.device) -> list[Problem]:
    """Return attention's shapes, each also with padding; a target encoder's needs no gradients."""
    if device.type != "cuda":
        tested = BY_NAME["attention"].tested
        return [Problem("rehearsal", tested[number], "fp32") for number in (0, 5)]
    found = []
    for model, heads, wide, narrow, patches, context, target, images, depth, above in (
        ("ViT-B/16", 12, 64, 32, 196, 53, 36, 64, 12, 6),
        ("ViT-L/16", 16, 64, 24, 196, 53, 35, 64, 24, 12),
        ("ViT-H/14", 16, 80, 24, 256, 68, 44, 128, 32, 12),
    ):
        for step in (1, 8):
            kept, wanted = (-(-length // step) * step for length in (context, target))
            queried = {"B": 4 * images, "N": kept + wanted, "H": heads, "d": narrow, "slots": kept}
            seen: Shape = {"B": images, "N": kept, "H": heads, "d": wide, "slots": kept}
            padding = {"lengths": (context, target)} if step > 1 else {}
            label = model + " padded" * (step > 1)
            for part, shape, weight in (
                ("predictor", queried, above - 1),
                ("predictor, last", {**queried, "R": wanted}, 1),
                ("context", seen, depth),
            ):
                shape = {**shape, **padding}
                found.append(Problem(f"{label} {part}", shape, "bf16", "both", weight))
        whole: Shape = {"B": images, "N": patches, "H": heads, "d": wide}
        found.append(Problem(f"{model} target", whole, "bf16", "inference", depth))
    return found


def backends() -> dict[str, Candidate]:
    """Return attention's backends, each alone; one whose library is missing is left out."""
    # Not that of FUSED, which hands on to SDPA what the kernel does not take.
    found = {"triton": Candidate(attention)}
    for name, backend in _SDPA.items():

        def alone(backend: SDPBackend = backend, **named: Any) -> object:  # noqa: ANN401
            with sdpa_kernel(backend):
                return EAGER.attention(**named)

        found[name] = Candidate(alone)
    for name in ("xformers", "flex"):
        try:
            found[name] = Candidate(attention_backend(name))
        except ValueError:
            continue
    return found


def alternatives(case: Case, compiled: bool) -> dict[str, Candidate]:
    """Return what computes an operation, the fused one first."""
    eager = getattr(EAGER, case.name)
    found = {"fused": Candidate(getattr(FUSED, case.name)), "eager": Candidate(eager)}
    if compiled:
        found["torch.compile"] = Candidate(torch.compile(eager))
    return found | {name: Candidate(function) for name, function in library_arms(case.name)}


def phase_of(kernel: str) -> Phase:
    """Return the part of an operation that a kernel runs in."""
    return "backward" if kernel.endswith(("_backward", "_noise_weight")) else "forward"


def snapped(kernel: str, entry: Tiles) -> Tiles:
    """Return the nearest tiles that a table may hold: a heuristic's need not be among them."""
    return {
        name: min(CHOICES[kernel][name], key=lambda choice: abs(choice - value))
        for name, value in entry.items()
    }


def neighbours(kernel: str, entry: Tiles) -> Iterator[Tiles]:
    """Tiles that differ from an entry's in one step of one name, or of one size and the warps."""
    choices, start = CHOICES[kernel], snapped(kernel, entry)
    if start != entry:
        yield start

    def moved(base: Tiles, name: str, by: int) -> Tiles | None:
        place = choices[name].index(base[name]) + by
        return {**base, name: choices[name][place]} if 0 <= place < len(choices[name]) else None

    for name in choices:
        for by in (-1, 1):
            alone = moved(start, name, by)
            if alone is None:
                continue
            yield alone
            both = moved(alone, "num_warps", by) if name in ("ROWS", "COLUMNS", "BLOCK") else None
            if both is not None:
                yield both
