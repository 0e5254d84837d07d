"""The optimiser of an objective: parameter groups, clipping, and the moving average of a teacher."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stopfast.env import has_symbol
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import Ops, resolve_ops

Clip = Literal["none", "global", "per_tensor"]
Implementation = Literal["auto", "adamw_ema", "torch", "apex"]
Pairs = Sequence[tuple[nn.Module, nn.Module]]
Schedule = Callable[[int], float]
TOKENS = ("mask_token", "cls_token", "mask_pos_token")
"""Learned tokens, by their last name."""


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


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How an objective's weights are updated: AdamW's schedules and constants, and the clipping."""

    lr: Schedule
    """Learning rate of step 1, 2, ..."""
    weight_decay: Schedule
    momentum: Schedule | None = None
    """Of the teachers' average; None without teachers."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: Clip = "none"
    clip_norm: float = 1.0
    decay_tokens: bool = True
    """Whether mask and class tokens are decayed."""

    def recipe(
        self, modules: Sequence[nn.Module], clipped: Sequence[nn.Module] | None = None
    ) -> OptimizerRecipe:
        """The recipe for modules, of which all are clipped, or only ``clipped``."""
        chosen = modules if clipped is None else clipped
        return OptimizerRecipe(
            groups=parameter_groups(modules, () if self.decay_tokens else TOKENS),
            betas=self.betas,
            clip=self.clip,
            clip_norm=self.clip_norm,
            clipped=[p for module in chosen for p in module.parameters() if p.requires_grad],
        )

    def scalars(self, step: int) -> dict[str, float]:
        """``lr``, ``weight_decay`` and, with teachers, ``momentum`` of a step."""
        found = {"lr": self.lr(step), "weight_decay": self.weight_decay(step)}
        return found if self.momentum is None else {**found, "momentum": self.momentum(step)}


def parameter_groups(
    modules: Iterable[nn.Module], undecayed: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Split each module's trainable parameters into decayed and not decayed, in the published order.

    Not decayed are tensors of one dimension, those with "bias" in their name, and those whose last name
    is in ``undecayed``. A mask token and a learned position table have three dimensions, so they are
    decayed, as published, unless named.
    """
    decayed, plain = [], []
    for module in modules:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        exempt = {
            n for n, p in named if "bias" in n or p.ndim == 1 or n.rpartition(".")[2] in undecayed
        }
        decayed.append({"params": [p for n, p in named if n not in exempt], "decayed": True})
        plain.append({"params": [p for n, p in named if n in exempt], "decayed": False})
    return decayed + plain


def build_optimizer(
    recipe: OptimizerRecipe,
    pairs: Pairs = (),
    implementation: Implementation = "auto",
    ops: Ops | str = "auto",
    copies: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """Return an AdamW whose ``step`` also moves the teachers, unless a ``GradScaler`` leaves it out.

    :func:`set_scalars` gives it each step's values.

    Args:
        recipe: groups and constants.
        pairs: (student, teacher) modules with equal parameters.
        implementation: ``"adamw_ema"`` is :class:`stopfast.flat_adamw.FlatAdamW`, ``"torch"`` is PyTorch's
            fused AdamW and ``"apex"`` is NVIDIA apex's FusedAdam, each with an average of its own pass.
        ops: what computes ``"adamw_ema"``.
        copies: dtype of the compute copies that ``"adamw_ema"`` keeps, or None.

    Raises:
        ValueError: an implementation that is unknown, not installed, or keeps no copies that are asked
            for; teachers in half precision.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": recipe.betas, "eps": recipe.eps}
    if implementation == "adamw_ema":
        teachers = _teachers(recipe, pairs)
        return FlatAdamW(
            recipe.groups, **settings, teachers=teachers, ops=resolve_ops(ops), copies=copies
        )
    if copies is not None:
        raise ValueError(
            f"expected the optimizer 'adamw_ema', which keeps copies, got {implementation!r}"
        )
    if implementation in (
        "auto",
        "torch",
    ):  # what no measurement has shown to be faster is not automatic
        optimizer = torch.optim.AdamW(recipe.groups, **settings, fused=True)
    elif implementation == "apex":
        optimizer = _apex_fused_adam()(recipe.groups, **settings, adam_w_mode=True)
    else:
        raise ValueError(f"expected auto, adamw_ema, torch or apex, got {implementation!r}")
    if pairs:
        optimizer.register_step_post_hook(partial(_average, pairs))
    return optimizer


def _teachers(recipe: OptimizerRecipe, pairs: Pairs) -> dict[Tensor, Tensor]:
    """The teacher of each parameter that is trained; the others have nothing to follow.

    Raises:
        ValueError: a parameter that is not trained and of which the teacher differs.
    """
    trained = {parameter for group in recipe.groups for parameter in group["params"]}
    teachers: dict[Tensor, Tensor] = {}
    for student, teacher in pairs:
        theirs = zip(student.named_parameters(), teacher.parameters(), strict=True)
        for (name, parameter), followed in theirs:
            if parameter in trained:
                teachers[parameter] = followed
            elif not torch.equal(parameter, followed):
                raise ValueError(f"{name}: expected a teacher that equals what is not trained")
    return teachers


def _average(pairs: Pairs, optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Move the teachers after a step of an optimiser that does not do it itself."""
    found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler whose steps are fused
    if isinstance(found_inf, Tensor) and found_inf.item():
        return
    for student, teacher in pairs:
        update_teacher(teacher, student, optimizer.param_groups[0]["teacher_momentum"])


def _apex_fused_adam() -> Any:  # noqa: ANN401
    """NVIDIA's optimiser.

    Raises:
        ValueError: it is not installed.
    """
    if not has_symbol("apex.optimizers", "FusedAdam"):
        raise ValueError(
            "expected apex.optimizers.FusedAdam for the optimizer 'apex', which is not installed: build "
            "NVIDIA's apex from https://github.com/NVIDIA/apex; PyPI's package of that name is another"
        )
    return import_module("apex.optimizers").FusedAdam


def set_scalars(optimizer: torch.optim.Optimizer, scalars: Mapping[str, float]) -> None:
    """Set the step's ``lr``, ``weight_decay`` and, with teachers, ``momentum``.

    Groups that are not decayed keep a decay of 0. The momentum goes by the name ``"teacher_momentum"``.
    """
    for group in optimizer.param_groups:
        group["lr"] = scalars["lr"]
        group["weight_decay"] = scalars["weight_decay"] if group["decayed"] else 0.0
        group["teacher_momentum"] = scalars.get("momentum")


def clip_gradients(recipe: OptimizerRecipe) -> None:
    """Clip by the norm of all gradients together, or of each tensor on its own."""
    if recipe.clip == "global":
        nn.utils.clip_grad_norm_(recipe.clipped, recipe.clip_norm)
    elif recipe.clip == "per_tensor":
        # As clip_grad_norm_ does with each, in an eighth of the launches.
        gradients = [p.grad for p in recipe.clipped if p.grad is not None]
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients))  # type: ignore[attr-defined]
            scales = (recipe.clip_norm / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(scales.unbind()))  # type: ignore[attr-defined]


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
