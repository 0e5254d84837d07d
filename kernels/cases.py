"""One case per operation: its inputs, the work it does, and the shapes it is tested and timed at."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stopfast.kernels import case_arguments
from stopfast.kernels.case_arguments import Arguments, Shape

Make = Callable[[Shape, torch.dtype, torch.device], Arguments]


class Case(NamedTuple):
    """What is known of one operation beside its definition."""

    name: str
    """Its field of ``Ops``."""
    fuses: str
    """What its kernels do in one go."""
    make: Make
    """Arguments by name, for a shape, a dtype and a device; what is differentiable requires a gradient."""
    flops: Callable[[Shape], int]
    """Floating-point operations of the forward pass that the operation cannot do without."""
    tested: tuple[Shape, ...]
    timed: dict[str, Shape]
    """Shapes of published models, by name."""
    in_place: bool = False
    """Whether it writes its arguments and returns nothing."""


def moved_bytes(arguments: Arguments, results: object) -> int:
    """Bytes of all tensors that go in and come out, each once: the least traffic of a forward pass."""
    tensors = pytree.tree_leaves((arguments, results))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _predictor_tokens_flops(shape: Shape) -> int:
    rows = shape["E"] * shape["B"] * shape["Kx"]
    noisy = shape["M"] * shape["E"] * shape["B"] * shape["Ky"]
    return 2 * shape["P"] * shape["D"] * (rows + noisy * (shape.get("noise") is not None))


_STOP = {"M": 2, "E": 2, "B": 3, "Kx": 7, "Ky": 5, "N": 16, "D": 24, "P": 20, "noise": "masked"}
_VIT_B = {"M": 4, "E": 1, "B": 64, "Kx": 53, "Ky": 36, "N": 196, "D": 768, "P": 384}
_VIT_L = {**_VIT_B, "Ky": 35, "D": 1024}
_VIT_H14 = {**_VIT_B, "B": 128, "Kx": 68, "Ky": 44, "N": 256, "D": 1280}
_MODELS = {"ViT-B/16": _VIT_B, "ViT-L/16": _VIT_L, "ViT-H/14": _VIT_H14}

CASES = (
    Case(
        "predictor_tokens",
        "projection, position, Philox noise and its projection, mask token, packing",
        case_arguments.predictor_tokens,
        _predictor_tokens_flops,
        tested=(
            {**_STOP, "noise": None},
            _STOP,
            {**_STOP, "noise": "context", "offset": False},
            {**_STOP, "noise": "both", "bias": False, "learned": True},
            {**_STOP, "noise": "both", "tied": False, "C": 16},
            {**_STOP, "noise": "both", "projected": False},
            {**_STOP, "noise": "both", "explicit": True, "learned": True},
            {**_STOP, "noise": "both", "lengths": (4, 3), "learned": True},
            {**_STOP, "Kx": 1, "Ky": 1, "B": 1, "M": 1, "E": 1},
            {**_STOP, "Kx": 33, "Ky": 129, "N": 144, "D": 70, "P": 132, "B": 1},
            {**_STOP, "B": 0},
        ),
        timed={name: {**shape, "noise": "masked"} for name, shape in _MODELS.items()},
    ),
    Case(
        "attention",
        "softmax attention of the packed projection; backward in one pass",
        case_arguments.attention,
        lambda s: 4 * s["B"] * s["H"] * s.get("R", s["N"]) * s["N"] * s["d"],
        tested=(
            {"B": 2, "N": 1, "H": 2, "d": 32},
            {"B": 2, "N": 7, "H": 3, "d": 24},
            {"B": 2, "N": 33, "H": 1, "d": 64},
            {"B": 1, "N": 128, "H": 2, "d": 24},
            {"B": 2, "N": 33, "H": 2, "d": 24, "R": 9, "slots": 24},
            {"B": 2, "N": 24, "H": 2, "d": 32, "lengths": (9, 6), "slots": 16},
            {"B": 2, "N": 24, "H": 2, "d": 32, "lengths": (9, 6), "slots": 16, "R": 8},
            {"B": 0, "N": 7, "H": 2, "d": 32},
        ),
        timed={
            "ViT-B/16 predictor": {"B": 256, "N": 89, "H": 12, "d": 32},
            "ViT-L/16 predictor": {"B": 256, "N": 88, "H": 16, "d": 24},
            "ViT-H/14 predictor": {"B": 512, "N": 112, "H": 16, "d": 24},
            "ViT-B/16 predictor, last": {"B": 256, "N": 89, "H": 12, "d": 32, "R": 36, "slots": 53},
            "ViT-B/16 context": {"B": 64, "N": 53, "H": 12, "d": 64},
            "ViT-L/16 context": {"B": 64, "N": 53, "H": 16, "d": 64},
        },
    ),
    Case(
        "layer_norm",
        "residual sum and LayerNorm",
        case_arguments.layer_norm,
        lambda s: 0,
        tested=(
            {"rows": (2, 7), "C": 33},
            {"rows": (1, 129), "C": 64, "residual": False},
            {"rows": (3, 1), "C": 1, "affine": False},
            {"rows": (0, 7), "C": 33},
        ),
        timed={
            "ViT-B/16 predictor": {"rows": (256, 89), "C": 384},
            "ViT-B/16 context": {"rows": (64, 53), "C": 768},
            "ViT-L/16 context": {"rows": (64, 53), "C": 1024},
            "ViT-H/14 context": {"rows": (128, 68), "C": 1280},
        },
    ),
    Case(
        "linear_gelu",
        "projection, bias and erf-GELU; backward with the bias's gradient",
        case_arguments.linear_gelu,
        lambda s: 2 * s["rows"][0] * s["rows"][1] * s["C"] * s["F"],
        tested=(
            {"rows": (2, 7), "C": 33, "F": 65},
            {"rows": (1, 129), "C": 64, "F": 16, "bias": False},
            {"rows": (1, 1), "C": 5, "F": 3},
            {"rows": (0, 7), "C": 33, "F": 65},
        ),
        timed={
            "ViT-B/16 predictor": {"rows": (256, 89), "C": 384, "F": 1536},
            "ViT-B/16 context": {"rows": (64, 53), "C": 768, "F": 3072},
            "ViT-H/14 context": {"rows": (128, 68), "C": 1280, "F": 5120},
        },
    ),
    Case(
        "target_smooth_l1",
        "norm and gather of the targets, smooth-L1, mean; its gradient",
        case_arguments.target_smooth_l1,
        lambda s: 0,
        tested=(
            {"M": 2, "E": 2, "B": 3, "Ky": 7, "T": 16, "D": 24},
            {"M": 2, "E": 1, "B": 3, "Ky": 7, "T": 16, "D": 33, "lengths": (3, 5)},
            {"M": 1, "E": 1, "B": 1, "Ky": 1, "T": 1, "D": 2},
            {"M": 1, "E": 1, "B": 1, "Ky": 129, "T": 40, "D": 130},
        ),
        timed={name: {**shape, "T": shape["N"]} for name, shape in _MODELS.items()},
    ),
    Case(
        "adamw_ema",
        "AdamW, the teacher's average, bf16 copies of both",
        case_arguments.adamw_ema,
        lambda s: 0,
        tested=(
            {"numel": 1},
            {"numel": 1029},
            {"numel": 257, "teacher": False, "step": 1.0},
            {"numel": 33, "copies": False, "scale": True, "found_inf": False},
            {"numel": 33, "scale": True, "found_inf": True},
            {"numel": 0},
        ),
        timed={"ViT-B/16": {"numel": 85_646_592}, "ViT-L/16": {"numel": 303_098_880}},
        in_place=True,
    ),
    Case(
        "multiblock_masks",
        "draw, subtract, redraw and compact the masks of a batch",
        case_arguments.multiblock_masks,
        lambda s: 0,
        tested=(
            {"B": 5, "grid": (14, 14), "target": (6, 6), "context": (13, 13)},
            {"B": 3, "grid": (7, 9), "target": (3, 2), "context": (5, 6), "E": 2, "min_keep": 12},
            # No context is free of the targets: constraints drop one by one.
            {"B": 3, "grid": (8, 8), "target": (7, 7), "context": (6, 6), "M": 2, "min_keep": 20},
            {"B": 2, "grid": (1, 1), "target": (1, 1), "context": (1, 1), "M": 1, "min_keep": 0,
             "allow_overlap": True, "edge_inclusive": True},
            {"B": 0, "grid": (14, 14), "target": (6, 6), "context": (13, 13)},
        ),
        timed={
            "14x14": {"B": 128, "grid": (14, 14), "target": (6, 6), "context": (13, 13)},
            "16x16": {"B": 128, "grid": (16, 16), "target": (7, 6), "context": (15, 15)},
        },
    ),
    Case(
        "position_cross_entropy",
        "labels smoothed on the grid, log-softmax, weighted mean; its gradient",
        case_arguments.position_cross_entropy,
        lambda s: 0,
        tested=(
            {"B": 3, "V": 7, "grid": (4, 4)},
            {"B": 2, "V": 5, "grid": (3, 7), "norm": "row", "sigma": 1.7},
            # The published grid is wider than the image's, and its last entries are never used.
            {"B": 2, "V": 9, "grid": (8, 8), "L": 33, "sigma": 2.0},
            {"B": 2, "V": 9, "grid": (9, 4), "L": 13, "norm": "row", "confident": True},
            {"B": 3, "V": 11, "grid": (2, 3), "sigma": 0.8, "confident": True},
            {"B": 1, "V": 33, "grid": (5, 5), "sigma": 0.0},
            {"B": 2, "V": 3, "grid": (4, 4), "weighted": False},
            {"B": 1, "V": 1, "grid": (1, 1)},
            {"B": 1, "V": 3, "grid": (32, 32), "sigma": 1 / 800},
            {"B": 0, "V": 7, "grid": (4, 4)},
        ),
        timed={
            "ViT-B/16": {"B": 64, "V": 49, "grid": (14, 14)},
            "ViT-L/16": {"B": 128, "V": 49, "grid": (14, 14)},
            "ViT-B/16 released grid": {"B": 64, "V": 49, "grid": (16, 16), "L": 196},
            "ViT-B/16 at 384": {"B": 64, "V": 144, "grid": (24, 24)},
        },
    ),
    Case(
        "patch_mse",
        "patches of the images and their norm, squared error, mean; its gradient",
        case_arguments.patch_mse,
        lambda s: 0,
        tested=(
            {"B": 3, "size": (16, 24), "p": 4, "K": 7},
            {"B": 2, "size": (15, 10), "p": 5, "norm": "channel"},
            {"B": 2, "size": (14, 28), "p": 7, "norm": "none", "C": 1, "K": 5},
            {"B": 2, "size": (12, 8), "p": 4, "norm": "channel", "C": 4, "K": 3, "channels_last": True},
            {"B": 2, "size": (8, 8), "p": 8, "C": 2},
            {"B": 1, "size": (2, 2), "p": 2, "norm": "channel", "C": 1},
            {"B": 1, "size": (32, 32), "p": 32},
            {"B": 0, "size": (16, 24), "p": 4},
            {"B": 2, "size": (16, 24), "p": 4, "K": 0},
        ),
        timed={
            "ViT-B/16 masked": {"B": 64, "size": (224, 224), "p": 16, "K": 147},
            "ViT-B/16 whole, by channel": {"B": 128, "size": (224, 224), "p": 16, "norm": "channel"},
            "ViT-H/14 masked": {"B": 128, "size": (224, 224), "p": 14, "K": 192},
        },
    ),
)  # fmt: skip
