"""Put stopfast's implementations under a user's own model, in place, and take them out again."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stopfast.block import Block
from stopfast.flat_adamw import FlatAdamW
from stopfast.kernels.ops import EAGER, Ops, resolve_ops
from stopfast.predictor import Predictor, Variant

_BLOCK = {
    f"{name}.{kind}"
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}
_PREDICTOR = {
    "mask_token", "predictor_pos_embed", "predictor_embed.weight", "predictor_embed.bias",
    "predictor_norm.weight", "predictor_norm.bias", "predictor_proj.weight", "predictor_proj.bias",
}  # fmt: skip
_TOLERANCE = 1e-5
_TOKENS = (5, 8)  # sequence lengths of a trial
_NOISE = ("noise_var", "noise_std")  # attributes that say how much noise a predictor adds


class FastForward:
    """A module's forward, computed by a stopfast module that holds the same parameters.

    An object and no closure, so that a deep copy of the owner is one of this too, over the copy's
    parameters. A call with further arguments goes to the owner's own forward.
    """

    def __init__(self, owner: nn.Module, fast: nn.Module, shared: tuple[str, ...] = ()) -> None:
        self.owner, self.fast, self.shared = owner, fast, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The owner's forward."""
        positional = 3 if isinstance(self.fast, Predictor) else 1
        if len(args) != positional or (kwargs and positional == 1):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        # Sharding and conversion may replace what the owner holds itself; what its layers hold is shared.
        for name in self.shared:
            self.fast._parameters[name] = self.owner._parameters[name]
        return self.fast(*args, **kwargs)


@dataclass
class Accelerated:
    """What :func:`accelerate` did; :meth:`undo` takes it back."""

    ops: Ops
    replaced: list[str] = field(default_factory=list)
    """Names of the modules that compute by stopfast now."""
    kept: dict[str, str] = field(default_factory=dict)
    """Names of modules that look like ones of these, and why they were left alone."""
    _restore: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def loss(self, prediction: Tensor, features: Tensor, masks: Tensor | list[Tensor]) -> Tensor:
        """Smooth-L1 of predictions against layer-normed target features, without gathering them.

        Args:
            prediction: [M * E * B, Ky, D] in the order (target mask, context mask, image).
            features: [B, N, D] of the target encoder, as they come out of it.
            masks: M target index tensors int64 [B, Ky], or one.
        """
        index = masks[None] if isinstance(masks, Tensor) else torch.stack(masks)
        return self.ops.target_smooth_l1(prediction, features, index)

    def undo(self) -> None:
        """Give every module its own implementation back; the parameters stay as they are now."""
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()
        self.replaced.clear()


def accelerate(
    model: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
    *,
    ops: Ops | str = "auto",
    variant: Variant | None = None,
    noise_var: float | None = None,
    optimizer: torch.optim.AdamW | None = None,
    teachers: Iterable[tuple[nn.Module, nn.Module]] = (),
) -> Accelerated:
    """Compute a model's transformer blocks and I-JEPA / StoP predictors by stopfast, in place.

    And, if they are given, its loss (``Accelerated.loss``), its optimiser and its teachers' average.

    Parameters, state_dict, hooks of the replaced modules and their classes stay what they are. A block
    is one like timm's, MAE's or I-JEPA's (``norm1``, ``attn.qkv``, ``attn.proj``, ``norm2``,
    ``mlp.fc1``, ``mlp.fc2`` and nothing else that learns); a predictor is one with the published keys.
    Each is replaced only if a copy of it, with random weights that hide nothing, computes in fp32 what
    the replacement computes from them. Modules of stopfast get the operations. Hooks on the layers
    inside a replaced module are not called while it is replaced.

    Args:
        model: a module, or several.
        ops: the operations that compute from now on.
        variant: what a predictor computes, where it does not say so by ``apply_stop``; default: I-JEPA
            or StoP switched off, whichever its output agrees with.
        noise_var: the noise of a predictor, in place of its own ``noise_var``.
        optimizer: becomes a :class:`stopfast.flat_adamw.FlatAdamW`, with its state; learning-rate
            schedulers are to be made after this.
        teachers: (student, teacher) pairs whose average the optimiser computes from now on, with the
            momentum that its groups have as ``"teacher_momentum"``.

    Returns:
        What was replaced, what was kept and why, a fused loss, and ``undo()``.

    Raises:
        ValueError: nothing that could be replaced, another optimiser than ``torch.optim.AdamW``, or
            teachers without an optimiser.
    """
    named, pairs = _named(model), list(teachers)
    if optimizer is not None and type(optimizer) is not torch.optim.AdamW:
        raise ValueError(f"expected optimizer as torch.optim.AdamW, got {type(optimizer).__name__}")
    if pairs and optimizer is None:
        raise ValueError("expected an optimizer that computes the average of the teachers")
    done = Accelerated(resolve_ops(ops))
    inside: set[nn.Module] = set()
    for name, module in named.items():
        if module in inside:
            continue
        if _has_ops(module):
            _give_ops(done, name, module)
        elif {n for n, _ in module.named_parameters()} >= _PREDICTOR:
            inside |= _replace(done, name, module, _candidates(module, variant, noise_var))
        elif (
            own := {n for n, _ in module.named_parameters()}
        ) <= _BLOCK and "attn.qkv.weight" in own:
            inside |= _replace(done, name, module, [_fast_block])
    if not done.replaced:
        reasons = "".join(f"; {name or 'the model'}: {why}" for name, why in done.kept.items())
        raise ValueError(
            "expected a model with blocks of norm1, attn.qkv, attn.proj, norm2, mlp.fc1 and mlp.fc2, a "
            f"predictor with the published keys, or modules of stopfast{reasons}"
        )
    if optimizer is not None:
        _replace_optimizer(done, optimizer, pairs)
    return done


def _replace_optimizer(
    done: Accelerated,
    optimizer: Any,  # noqa: ANN401
    pairs: list[tuple[nn.Module, nn.Module]],
) -> None:
    """Turn the object itself into a FlatAdamW, since loops, scalers and schedulers hold it."""
    state, kind, before = optimizer.state_dict(), type(optimizer), optimizer.__dict__
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    average: dict[Tensor, Tensor] = {
        own: theirs
        for student, teacher in pairs
        for own, theirs in zip(student.parameters(), teacher.parameters(), strict=True)
        if own in trained
    }
    flat = FlatAdamW(optimizer.param_groups, teachers=average, ops=done.ops)
    flat.load_state_dict(state)
    for name, hooks in before.items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(flat, name, hooks)
    optimizer.__class__, optimizer.__dict__ = FlatAdamW, flat.__dict__

    def restore() -> None:
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.__class__, optimizer.__dict__ = kind, before
        optimizer.load_state_dict(state)

    done._restore.append(restore)
    done.replaced.append("optimizer")


def _named(
    model: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """Every module once, outer ones first."""
    if isinstance(model, nn.Module):
        return dict(model.named_modules())
    parts = model.items() if isinstance(model, Mapping) else enumerate(model)
    found: dict[str, nn.Module] = {}
    for prefix, part in parts:
        found |= {f"{prefix}.{name}".rstrip("."): m for name, m in part.named_modules()}
    return found


def _has_ops(module: nn.Module) -> bool:
    return isinstance(getattr(module, "ops", None), Ops)


def _give_ops(done: Accelerated, name: str, module: Any) -> None:  # noqa: ANN401
    before = module.ops
    module.ops = done.ops
    done._restore.append(lambda: setattr(module, "ops", before))
    done.replaced.append(name)


class _Trial(NamedTuple):
    """A possible replacement, and a call that both must agree on."""

    fast: nn.Module
    calls: list[tuple[Any, ...]]
    silence: tuple[nn.Module, ...] = ()
    """Modules whose noise has to be off meanwhile."""


_Candidate = Callable[[Any], _Trial]


def _replace(
    done: Accelerated, name: str, module: nn.Module, candidates: list[_Candidate]
) -> set[nn.Module]:
    """Replace by the first candidate whose output agrees; return the modules that are settled by it."""
    random = [m for m in module.modules() if getattr(m, "p", 0) or getattr(m, "drop_prob", 0)]
    reason = f"{type(random[0]).__name__} is random there" if random else ""
    for candidate in [] if random else candidates:
        try:
            stirred = _stirred(module)
            reason = _disagreement(stirred, candidate(stirred))
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not reason:
            _install(done, name, module, candidate(module).fast)
            return set(module.modules())
    done.kept[name] = reason
    return set()


def _install(done: Accelerated, name: str, module: Any, fast: nn.Module) -> None:  # noqa: ANN401
    for part in fast.modules():
        if _has_ops(part):
            part.ops = done.ops  # type: ignore[assignment]
    before = module.__dict__.get("forward")
    own = tuple(n for n in ("mask_token", "predictor_pos_embed") if n in fast._parameters)
    module.forward = FastForward(module, fast, own)

    def restore() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    done._restore.append(restore)
    done.replaced.append(name)


def _disagreement(module: nn.Module, trial: _Trial) -> str:
    """Why the two do not compute the same, or nothing."""
    amounts = [(m, n, getattr(m, n)) for m in trial.silence for n in _NOISE if hasattr(m, n)]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        for owner, attribute, _ in amounts:
            setattr(owner, attribute, 0.0)
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            pairs = [(trial.fast(*call), module(*call)) for call in trial.calls]
    finally:
        for owner, attribute, amount in amounts:
            setattr(owner, attribute, amount)
    for got, expected in pairs:
        if not isinstance(expected, Tensor):
            return f"its output is a {type(expected).__name__}"
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        if not error <= _TOLERANCE:
            return f"its output differs from the replacement's by {error:.1e} (relative)"
    return ""


def _stirred(module: nn.Module) -> nn.Module:
    """A copy in fp32 whose weights hide nothing.

    As they are initialised, branches are a small addition to what they are added to, or none: an
    activation, a causal mask or an attention bias would pass for another.
    """
    stirred = copy.deepcopy(module).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stirred.parameters():
            wide = parameter.shape[1:].numel() ** -0.5 if parameter.ndim == 2 else 0.5
            drawn = torch.randn(parameter.shape, generator=generator) * wide
            # Scales of norms are vectors too: around 1 or 0 is the same to a test.
            parameter.copy_(drawn + (0.5 if parameter.ndim == 1 else 0.0))
    return stirred


def _fast_block(block: Any) -> _Trial:  # noqa: ANN401
    """A block of ours with the layers of ``block``."""
    width = block.attn.proj.out_features
    with torch.device("meta"):
        fast = Block(
            width,
            block.attn.num_heads,
            mlp_ratio=block.mlp.fc1.out_features / width,
            qkv_bias=block.attn.qkv.bias is not None,
            qk_scale=getattr(block.attn, "scale", None),
            norm_layer=nn.LayerNorm,
            ops=EAGER,
        )
    fast.norm1, fast.norm2 = block.norm1, block.norm2
    fast.attn.qkv, fast.attn.proj = block.attn.qkv, block.attn.proj
    fast.mlp.fc1, fast.mlp.fc2 = block.mlp.fc1, block.mlp.fc2
    return _Trial(fast, [(_random(block.attn.qkv.weight, 2, n, width),) for n in _TOKENS])


def _candidates(
    module: Any,  # noqa: ANN401
    variant: Variant | None,
    noise_var: float | None,
) -> list[_Candidate]:
    stop = getattr(module, "apply_stop", None)
    possible: list[Variant]
    if variant is not None:
        possible = [variant]
    elif stop is None:
        possible = ["ijepa", "stop_off"]
    else:
        possible = ["stop" if stop else "stop_off"]
    return [partial(_fast_predictor, variant=chosen, noise_var=noise_var) for chosen in possible]


def _fast_predictor(theirs: Any, variant: Variant, noise_var: float | None) -> _Trial:  # noqa: ANN401
    """A predictor of ours with the layers of ``theirs``."""
    embed, positions = theirs.predictor_embed, theirs.predictor_pos_embed
    own = getattr(theirs, "noise_var", None)
    if variant in ("stop", "stop_paper") and own is None:
        raise ValueError(f"expected an attribute noise_var for variant {variant!r}, found none")
    with torch.device("meta"):
        fast = Predictor(
            positions.shape[1],
            embed.in_features,
            embed.out_features,
            depth=0,
            num_heads=1,
            grid_size=(1, positions.shape[1]),
            variant=variant,
            noise_var=float(own or 0.0) if noise_var is None else noise_var,
            ops=EAGER,
        )
    for name in ("predictor_embed", "predictor_norm", "predictor_proj"):
        setattr(fast, name, getattr(theirs, name))
    fast.mask_token, fast.predictor_pos_embed = theirs.mask_token, positions
    fast.predictor_blocks = nn.ModuleList(_fast_block(b).fast for b in theirs.predictor_blocks)
    x = _random(embed.weight, 2, 3, embed.in_features)
    places = torch.arange(7, device=x.device) % positions.shape[1]
    context, first, second = (
        places[None, k : k + n].expand(2, -1) for k, n in ((0, 3), (3, 2), (5, 2))
    )
    return _Trial(fast, [(x, [context], [first, second])], (theirs, fast))


def _random(like: Tensor, *shape: int) -> Tensor:
    """Random input that leaves the generators alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)
