"""The settings of runs as tables: in short, where they differ, and whole."""

from collections.abc import Mapping
from typing import Any

from stopfast.config import Config, to_document
from stopfast.report.page import Table
from stopfast.trained import TrainedRun


def summary_table(runs: Mapping[str, TrainedRun]) -> Table:
    """Return what each run is, a column for each."""
    rows = [
        ("preset", lambda run: run.config.preset),
        ("optimiser steps done", lambda run: f"{run.step:,}"),
        ("images of a step", lambda run: f"{run.config.data.batch_size:,}"),
        ("encoder", _encoder),
        ("predictor", _predictor),
        ("queries", _queries),
        ("masks", lambda run: mask_kind(run.config)),
        ("augmentation", _augmentation),
        ("peak learning rate", lambda run: f"{run.config.optim.lr:g}"),
        ("seed", lambda run: str(run.config.run.seed)),
    ]
    return Table(
        header=("", *runs), rows=[(name, *(tell(r) for r in runs.values())) for name, tell in rows]
    )


def difference_table(runs: Mapping[str, TrainedRun]) -> Table | None:
    """Return the settings in which runs differ, save where they were written; None for one run."""
    if len(runs) < 2:
        return None
    flat = [_flatten(to_document(run.config)) for run in runs.values()]
    names = sorted({name for settings in flat for name in settings} - {"run.output", "run.resume"})
    rows = [(name, *(str(settings.get(name)) for settings in flat)) for name in names]
    return Table(
        header=("setting", *runs),
        rows=[row for row in rows if len(set(row[1:])) > 1] or [("none", *("" for _ in runs))],
        caption="Settings in which the runs differ; every other one is the same.",
    )


def full_table(runs: Mapping[str, TrainedRun]) -> Table:
    """Return every setting of every run, folded away."""
    flat = [_flatten(to_document(run.config)) for run in runs.values()]
    names = dict.fromkeys(name for settings in flat for name in settings)
    return Table(
        header=("setting", *runs),
        rows=[(name, *(str(settings.get(name)) for settings in flat)) for name in names],
        folded="Every setting",
    )


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


def _queries(run: TrainedRun) -> str:
    noise = run.config.noise
    return {
        "ijepa": "I-JEPA: mask token + position",
        "stop": f"StoP: position + projected noise, std {noise.noise_var:g} ({noise.cov} covariance)",
        "stop_off": "StoP switched off: position alone",
        "stop_paper": f"StoP as in the paper: variance {noise.noise_var:g}, mask token",
    }[noise.variant]


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
