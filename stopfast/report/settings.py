"""The settings of runs as tables: in short, where they differ, and whole."""

from collections.abc import Mapping
from typing import Any

from stopfast.config import (
    Config,
    DropPosConfig,
    JepaConfig,
    ReconstructionConfig,
    to_document,
)
from stopfast.report.page import Table
from stopfast.trained import TrainedRun


def summary_table(runs: Mapping[str, TrainedRun]) -> Table:
    """Return what each run is, a column for each."""
    rows = [
        ("preset", lambda run: run.config.preset),
        ("objective", lambda run: objective_name(run.config)),
        ("optimiser steps done", lambda run: f"{run.step:,}"),
        ("images of a step", lambda run: f"{run.config.data.batch_size:,}"),
        ("encoder", _encoder),
        ("predictor or decoder", _predictor),
        ("queries", _queries),
        ("masks", _masks),
        ("what the encoder sees", _view),
        ("target", _target),
        ("augmentation", _augmentation),
        ("peak learning rate", lambda run: f"{run.config.optim.lr:g}"),
        ("seed", lambda run: str(run.config.run.seed)),
    ]
    told = [(name, *(tell(run) for run in runs.values())) for name, tell in rows]
    return Table(header=("", *runs), rows=[row for row in told if any(row[1:])])


def difference_table(runs: Mapping[str, TrainedRun]) -> Table | None:
    """Return the settings of all runs in which they differ, save where they were written; None for one."""
    if len(runs) < 2:
        return None
    flat = [_flatten(to_document(run.config)) for run in runs.values()]
    shared = set(flat[0]).intersection(*flat[1:])
    names = sorted(shared - {"run.output", "run.resume"})
    rows = [(name, *(str(settings[name]) for settings in flat)) for name in names]
    return Table(
        header=("setting", *runs),
        rows=[row for row in rows if len(set(row[1:])) > 1] or [("none", *("" for _ in runs))],
        caption="Settings in which the runs differ; every other one that all have is the same."
        + (
            ""
            if all(each.keys() == shared for each in flat)
            else " What only some objectives have is under every setting."
        ),
    )


def full_table(runs: Mapping[str, TrainedRun]) -> Table:
    """Return every setting of every run, folded away."""
    flat = [_flatten(to_document(run.config)) for run in runs.values()]
    names = dict.fromkeys(name for settings in flat for name in settings)
    return Table(
        header=("setting", *runs),
        rows=[(name, *(str(settings.get(name, "")) for settings in flat)) for name in names],
        folded="Every setting",
    )


def objective_name(config: Config) -> str:
    """Say what is learned by the name that it is known under."""
    objective = config.objective
    if isinstance(objective, DropPosConfig):
        name, noisy = "DropPos", _noisy(config)
    elif isinstance(objective, JepaConfig):
        name, noisy = _QUERIES[config.noise.variant][0], False
    elif objective.degrade.kind == "none":
        name, noisy = "MAE", _noisy(config)
    else:
        name, noisy = f"Beyond Masking, {objective.degrade.kind}", _noisy(config)
    return f"{name}, with StoP's noise" if noisy else name


def mask_kind(config: Config) -> str:
    """Say whether masks are as published, mended, or something between."""
    mask = config.jepa.mask
    switches = (mask.edge_inclusive, mask.truncate == "random", mask.truncate_over == "global")
    return "corrected" if all(switches) else "mixed" if any(switches) else "faithful"


def _encoder(run: TrainedRun) -> str:
    model, size = run.config.model, run.config.data.transforms.size
    return (
        f"width {model.embed_dim}, {model.depth} blocks, {model.num_heads} heads, "
        f"patch {model.patch_size} at {size[0]}x{size[1]}"
    )


def _predictor(run: TrainedRun) -> str:
    model = run.config.model
    return f"width {model.predictor_embed_dim}, {model.predictor_depth} blocks"


_QUERIES = {
    "ijepa": ("I-JEPA", "mask token + position"),
    "stop": ("StoP", "position + projected noise, std {0:g} ({1} covariance)"),
    "stop_off": ("StoP switched off", "position alone"),
    "stop_paper": (
        "StoP as in the paper",
        "position + projected noise, variance {0:g}, + mask token",
    ),
}
"""By variant of the predictor, its name, and what its queries are."""


def _noisy(config: Config) -> bool:
    return config.noise.variant in ("stop", "stop_paper")


def _queries(run: TrainedRun) -> str:
    config = run.config
    objective, noise = config.objective, config.noise
    if isinstance(objective, DropPosConfig):
        return "features + projected noise" if _noisy(config) else ""
    if isinstance(objective, ReconstructionConfig) and not objective.mask_ratio:
        return ""
    return _QUERIES[noise.variant][1].format(noise.noise_var, noise.cov)


def _masks(run: TrainedRun) -> str:
    objective = run.config.objective
    if isinstance(objective, JepaConfig):
        return f"multi-block, {mask_kind(run.config)}"
    masked = f"{100 * objective.mask_ratio:g} % of the patches" if objective.mask_ratio else "none"
    if isinstance(objective, DropPosConfig):
        masked += f", and the positions of {100 * objective.position_mask_ratio:g} % of the rest"
    return masked


def _view(run: TrainedRun) -> str:
    objective = run.config.objective
    if isinstance(objective, DropPosConfig) or objective.degrade.kind == "none":
        return "the image"
    degrade = objective.degrade
    told = {
        "zoomed-in": f", without {degrade.margin} pixels on each side",
        "zoomed-out": f", {2 * degrade.margin} pixels smaller",
    }
    return f"the image {degrade.kind}{told.get(degrade.kind, '')}"


def _target(run: TrainedRun) -> str:
    objective = run.config.objective
    if isinstance(objective, JepaConfig):
        return "features of the target encoder"
    if isinstance(objective, ReconstructionConfig):
        by = {"patch": "patch", "channel": "channel of a patch"}.get(objective.target_norm)
        return f"pixels, normalised by {by}" if by else "pixels"
    told = f"positions, smoothed by {objective.sigma:g}" if objective.sigma else "positions"
    told += ", falling to 0" if objective.sigma and objective.sigma_decay else ""
    return f"{told}; pixels" if objective.multi_task else told


def _augmentation(run: TrainedRun) -> str:
    transforms = run.config.data.transforms
    low, high = transforms.crop_scale
    told = [f"crops of {100 * low:g} to {100 * high:g} % of the area"]
    for name in ("flip", "gray", "blur"):
        share = getattr(transforms, name)
        if share:
            told.append(f"{name} {100 * share:g} %")
    return ", ".join(told)


def _flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
