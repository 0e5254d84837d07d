"""One case per operation: its inputs, the work it does, and the shapes it is tested and timed at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stopfast.kernels.arguments import AdamWBuffers, MaskSettings, Noise, Places

Shape = dict[str, Any]
Arguments = dict[str, Any]
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


def _normal(
    *shape: int, dtype: torch.dtype, device: torch.device, grad: bool = True, scale: float = 1.0
) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def _lengths(shape: Shape, device: torch.device) -> Tensor | None:
    if "lengths" not in shape:
        return None
    return torch.tensor(shape["lengths"], dtype=torch.int32, device=device)


def _index(*shape: int, rows: int, device: torch.device) -> Tensor:
    """Random positions, with those at both ends among them."""
    index = torch.randint(rows, shape, device=device)
    if index.numel() > 1:
        index.view(-1)[0], index.view(-1)[-1] = 0, rows - 1
    return index


def _predictor_tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    m, e, b = shape["M"], shape["E"], shape["B"]
    kx, ky, grid = shape["Kx"], shape["Ky"], shape["N"]
    d, p = shape["D"], shape["P"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    draws = shape.get("noise")
    tied, projected = shape.get("tied", True), shape.get("projected", True)
    weight = _normal(p, d, scale=d**-0.5, **like)
    own = _normal(p, shape.get("C", d), scale=d**-0.5, **like)
    noise = None
    if draws is not None:
        noise_weight = (weight if tied else own) if projected else None
        channels = noise_weight.shape[1] if noise_weight is not None else p
        explicit = shape.get("explicit", False)
        noise = Noise(
            seed=torch.tensor([2**40 + 7, 5], device=device),
            sample_ids=torch.arange(b, device=device) + 3,
            std=0.25,
            weight=noise_weight,
            on_queries=draws in ("masked", "both"),
            on_context=draws in ("context", "both"),
            queries=_normal(m, e * b, ky, channels, **like) if explicit else None,
            context=_normal(e * b, kx, channels, **like) if explicit else None,
        )
    return {
        "x": _normal(e * b, kx, d, **like),
        "places": Places(
            _index(e * b, kx, rows=grid, device=device),
            _index(m, b, ky, rows=grid, device=device),
            _lengths(shape, device),
        ),
        "weight": weight,
        "bias": _normal(p, **like) if shape.get("bias", True) else None,
        "pos_embed": _normal(grid, p, grad=shape.get("learned", False), **like),
        "offset": _normal(p, **like) if shape.get("offset", True) else None,
        "noise": noise,
    }


def _predictor_tokens_flops(shape: Shape) -> int:
    rows = shape["E"] * shape["B"] * shape["Kx"]
    noisy = shape["M"] * shape["E"] * shape["B"] * shape["Ky"]
    return 2 * shape["P"] * shape["D"] * (rows + noisy * (shape.get("noise") is not None))


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    b, n, heads, d = shape["B"], shape["N"], shape["H"], shape["d"]
    rows = shape.get("R")
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "packed": _normal(b, n, (3 if rows is None else 2) * heads * d, **like),
        "num_heads": heads,
        "scale": d**-0.5,
        "queries": None if rows is None else _normal(b, rows, heads * d, **like),
        "lengths": _lengths(shape, device),
        "context_slots": shape.get("slots", 0),
    }


def _layer_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    rows, width = shape["rows"], shape["C"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    affine = shape.get("affine", True)
    return {
        "x": _normal(*rows, width, **like),
        "weight": _normal(width, **like) if affine else None,
        "bias": _normal(width, **like) if affine else None,
        "eps": 1e-6,
        "residual": _normal(*rows, width, **like) if shape.get("residual", True) else None,
    }


def _linear_gelu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    rows, width, hidden = shape["rows"], shape["C"], shape["F"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "x": _normal(*rows, width, **like),
        "weight": _normal(hidden, width, scale=width**-0.5, **like),
        "bias": _normal(hidden, **like) if shape.get("bias", True) else None,
    }


def _target_smooth_l1(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    m, e, b, ky = shape["M"], shape["E"], shape["B"], shape["Ky"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "prediction": _normal(m * e * b, ky, shape["D"], scale=2.0, **like),
        "features": _normal(b, shape["T"], shape["D"], grad=False, **like),
        "index": _index(m, b, ky, rows=shape["T"], device=device),
        "lengths": _lengths(shape, device),
    }


def _adamw_ema(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    size = shape["numel"]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": device, "grad": False}
    if dtype == torch.float64:
        wide["dtype"] = dtype
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    teacher, copies = shape.get("teacher", True), shape.get("copies", True)
    scalars = [1e-3, 0.04, 0.996, shape.get("step", 3.0), 0.9, 0.999, 1e-8]
    flag = shape.get("found_inf")
    return {
        "buffers": AdamWBuffers(
            param=_normal(size, **wide),
            grad=_normal(size, dtype=dtype, device=device, grad=False),
            exp_avg=_normal(size, scale=0.1, **wide),
            exp_avg_sq=_normal(size, scale=0.1, **wide).square(),
            average=_normal(size, **wide) if teacher else None,
            param_copy=torch.zeros(size, dtype=low, device=device) if copies else None,
            average_copy=torch.zeros(size, dtype=low, device=device)
            if copies and teacher
            else None,
        ),
        "scalars": torch.tensor(scalars, dtype=torch.float64, device=device),
        "found_inf": None if flag is None else torch.tensor(float(flag), device=device),
        "grad_scale": torch.tensor(1024.0, device=device) if "scale" in shape else None,
    }


def _multiblock_masks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    return {
        "seed": torch.tensor([2**40 + 7, shape.get("iteration", 5)], device=device),
        "sample_ids": torch.arange(shape["B"], device=device),
        "target_size": shape["target"],
        "context_size": shape["context"],
        "settings": MaskSettings(
            grid=shape["grid"],
            nenc=shape.get("E", 1),
            npred=shape.get("M", 4),
            min_keep=shape.get("min_keep", 10),
            allow_overlap=shape.get("allow_overlap", False),
            edge_inclusive=shape.get("edge_inclusive", False),
        ),
    }


_STOP = {"M": 2, "E": 2, "B": 3, "Kx": 7, "Ky": 5, "N": 16, "D": 24, "P": 20, "noise": "masked"}
_VIT_B = {"M": 4, "E": 1, "B": 64, "Kx": 53, "Ky": 36, "N": 196, "D": 768, "P": 384}
_VIT_L = {**_VIT_B, "Ky": 35, "D": 1024}
_VIT_H14 = {**_VIT_B, "B": 128, "Kx": 68, "Ky": 44, "N": 256, "D": 1280}
_MODELS = {"ViT-B/16": _VIT_B, "ViT-L/16": _VIT_L, "ViT-H/14": _VIT_H14}

CASES = (
    Case(
        "predictor_tokens",
        "projection, position, Philox noise and its projection, mask token, packing",
        _predictor_tokens,
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
        _attention,
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
        _layer_norm,
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
        _linear_gelu,
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
        _target_smooth_l1,
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
        _adamw_ema,
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
        _multiblock_masks,
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
)  # fmt: skip
