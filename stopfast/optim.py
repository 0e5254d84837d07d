"""The optimiser of an objective: parameter groups, clipping, and the moving average of a teacher."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Clip = Literal["none", "global", "per_tensor"]


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """What an objective wants its parameters updated by: AdamW with these groups, after clipping."""

    groups: list[dict[str, Any]]
    """AdamW parameter groups; ``decayed`` says whether the step's weight decay applies."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: Clip = "none"
    clip_norm: float = 1.0
    clipped: list[nn.Parameter]
    """Parameters whose gradients are clipped."""


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Split each module's trainable parameters into decayed and not decayed, in the published order.

    Not decayed are tensors of one dimension and those with "bias" in their name. A mask token and a
    learned position table have three dimensions, so they are decayed, as published.
    """
    decayed, plain = [], []
    for module in modules:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        exempt = {n for n, p in named if "bias" in n or p.ndim == 1}
        decayed.append({"params": [p for n, p in named if n not in exempt], "decayed": True})
        plain.append({"params": [p for n, p in named if n in exempt], "decayed": False})
    return decayed + plain


def build_optimizer(recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Return the AdamW of a recipe; :func:`set_scalars` gives it each step's values."""
    return torch.optim.AdamW(recipe.groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)


def set_scalars(optimizer: torch.optim.Optimizer, scalars: Mapping[str, float]) -> None:
    """Set the step's ``lr`` and ``weight_decay``; groups that are not decayed keep a decay of 0."""
    for group in optimizer.param_groups:
        group["lr"] = scalars["lr"]
        group["weight_decay"] = scalars["weight_decay"] if group["decayed"] else 0.0


def clip_gradients(recipe: OptimizerRecipe) -> None:
    """Clip by the norm of all gradients together, or of each tensor on its own."""
    if recipe.clip == "global":
        nn.utils.clip_grad_norm_(recipe.clipped, recipe.clip_norm)
    elif recipe.clip == "per_tensor":
        for parameter in recipe.clipped:
            nn.utils.clip_grad_norm_([parameter], recipe.clip_norm)


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student`` over all parameters.

    Raises:
        ValueError: a teacher in half precision, in which such small updates round to nothing.
    """
    targets: list[Tensor] = list(teacher.parameters())
    sources: list[Tensor] = list(student.parameters())
    dtypes = {t.dtype for t in targets}
    if dtypes - {torch.float32, torch.float64}:
        raise ValueError(f"expected a teacher in fp32 or fp64, got {sorted(map(str, dtypes))}")
    get_ema_multi_avg_fn(momentum)(targets, sources, 0)
