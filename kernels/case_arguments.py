"""Random arguments of each operation by name, for a shape of its case, a dtype and a device.

What is differentiable requires a gradient. Each docstring says what a shape may hold.
"""

from typing import Any

import torch
from torch import Tensor

from stopfast.kernels.arguments import (
    AdamWBuffers,
    MaskSettings,
    Noise,
    PatchTarget,
    Places,
    Smoothing,
)

Shape = dict[str, Any]
Arguments = dict[str, Any]


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


def predictor_tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """M, E, B, Kx, Ky, N, D, P as in the definition; noise: on which tokens; and its options."""
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


def attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """B, N, H, d; R: as many queries of their own, the N slots being theirs from ``slots`` on."""
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


def layer_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """rows: all axes but the last; C; affine, residual."""
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


def linear_gelu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """rows: all axes but the last; C to F; bias."""
    rows, width, hidden = shape["rows"], shape["C"], shape["F"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "x": _normal(*rows, width, **like),
        "weight": _normal(hidden, width, scale=width**-0.5, **like),
        "bias": _normal(hidden, **like) if shape.get("bias", True) else None,
    }


def target_smooth_l1(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """M, E, B, Ky, D as in the definition; T positions of the target encoder."""
    m, e, b, ky = shape["M"], shape["E"], shape["B"], shape["Ky"]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "prediction": _normal(m * e * b, ky, shape["D"], scale=2.0, **like),
        "features": _normal(b, shape["T"], shape["D"], grad=False, **like),
        "index": _index(m, b, ky, rows=shape["T"], device=device),
        "lengths": _lengths(shape, device),
    }


def adamw_ema(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """numel; teacher, copies, step, found_inf, scale."""
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


def multiblock_masks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """B, grid, size of target and context; E and M blocks of them, min_keep, and the rules."""
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


def position_cross_entropy(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """B, V, grid; L; norm, confident, sigma; weighted: whether any patch counts."""
    b, v, grid = shape["B"], shape["V"], shape["grid"]
    positions = shape.get("L", grid[0] * grid[1])
    wide: dict[str, Any] = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32}
    # Half of the patches kept their position, and count for nothing.
    weight = torch.rand(b, v, device=device, **wide) * (torch.rand(b, v, device=device) < 0.5)
    return {
        "logits": _normal(b, v, positions, dtype=dtype, device=device, scale=2.0),
        "index": _index(b, v, rows=positions, device=device),
        "weight": weight * shape.get("weighted", True),
        "sigma": torch.tensor(shape.get("sigma", 1.0), device=device, **wide),
        "smoothing": Smoothing(grid, shape.get("norm", "column"), shape.get("confident", False)),
    }


def patch_mse(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """B, C, size of the image, p; K patches of it, all without; norm, channels_last."""
    b, channels, size, side = shape["B"], shape.get("C", 3), shape["size"], shape["p"]
    every, norm = size[0] // side * (size[1] // side), shape.get("norm", "patch")
    tokens = shape.get("K", every)
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    # Below one, as images are, and so that the eps of a norm shows.
    images = _normal(b, channels, *size, grad=False, scale=0.05, **like)
    if shape.get("channels_last"):
        images = images.contiguous(memory_format=torch.channels_last)
    eps = {"none": (), "patch": (1e-3,), "channel": (1e-3, 3e-3, 2e-3, 4e-3)[:channels]}[norm]
    return {
        "prediction": _normal(b, tokens, side * side * channels, **like),
        "images": images,
        "index": _index(b, tokens, rows=every, device=device) if "K" in shape else None,
        "target": PatchTarget(side, norm, eps),
    }
