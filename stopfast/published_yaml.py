"""Configuration files of the published I-JEPA and StoP programs, read as they are."""

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from stopfast.config import (
    Config,
    DataConfig,
    JepaConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    Transforms,
)
from stopfast.models import SHAPES, Shape

MAX_BYTES = 1 << 16
MAX_DEPTH = 3
"""Levels of a file: groups, their keys, and lists."""


def from_yaml(path: str | Path) -> Config:
    """Return the settings of a published I-JEPA or StoP configuration file.

    A file with ``stop_params`` is StoP's, one with ``optimization.ema`` I-JEPA's. ``data.root_path`` and
    ``image_folder`` together are the folder of the images, ``logging.folder`` is the run's,
    ``meta.load_checkpoint`` resumes it. What the files leave to their program is added: StoP's average
    goes from 0.996 to 1, its ``clip_grad`` (0 is off) clips the encoder alone; flip and blur have
    probability 0.5, and colour distortion of strength 0 is grayscale with probability 0.2. StoP without
    ``apply_stop`` is the variant ``stop_off``, which is not I-JEPA.

    ``data.batch_size`` is that of one process, and the files do not say how many there were: for a
    published run of 2,048 images a step, set ``data.batch_size`` to 2048 and ``step.accumulate`` to 2048
    over the file's number.

    ``data.pin_mem``, ``meta.copy_data`` and ``logging.write_tag`` have no counterpart and are not used.

    Args:
        path: YAML file of at most 64 KiB, without aliases.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not such a file; every key that is unknown, missing or of a wrong type is named. A
            jitter of colours (``data.color_jitter_strength``) and a start from another checkpoint
            (``meta.read_checkpoint``) are not offered.
    """
    document = _read(Path(path))
    try:
        return _config(_values(document))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> object:
    """The document in a file; strict where PyYAML would be lenient or could be made to work for ever.

    Raises:
        ValueError: too large, too deep, not YAML, aliases, or a key that comes twice.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got more")
    try:
        _check_events(content)
        # yaml.safe_load with a class that differs in one thing: it refuses keys that come twice.
        return yaml.load(content, Loader=_StrictLoader)
    # A number or a date that looks like one and is none is a ValueError of the loader.
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: expected a YAML file: {error}") from error


def _check_events(content: bytes) -> None:
    depth = 0
    for event in yaml.parse(content, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"expected no aliases, got *{event.anchor}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} levels, got more")


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise ValueError(f"expected each key once, got {', '.join(twice)} more than once")
        return super().construct_mapping(node, deep)


def _number(value: object) -> float:
    # YAML 1.1, which PyYAML reads, has no numbers such as 1e-3: they arrive as text.
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError("a number")


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("an integer")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _pair(value: object) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2:
        try:
            return _number(value[0]), _number(value[1])
        except ValueError:
            pass
    raise ValueError("a list of two numbers")


def _model(value: object) -> Shape:
    family, _, size = str(value).partition("_")
    if family not in ("vit", "deit") or size not in SHAPES:
        raise ValueError(f"vit_ or deit_ and one of {', '.join(SHAPES)}")
    return SHAPES[size]


def _strategy(value: object) -> object:
    if value not in ("const", "linear"):
        raise ValueError("const or linear")
    return value


def _nothing(value: object) -> None:
    if value is not None:
        raise ValueError(
            "null, since a run goes on from its own checkpoints alone "
            "(stopfast.published.load_published reads the published ones)"
        )


_COMMON: dict[str, Callable[[object], Any]] = {
    "data.batch_size": _integer,
    "data.color_jitter_strength": _number,
    "data.crop_scale": _pair,
    "data.crop_size": _integer,
    "data.image_folder": _text,
    "data.num_workers": _integer,
    "data.pin_mem": _switch,
    "data.root_path": _text,
    "data.use_color_distortion": _switch,
    "data.use_gaussian_blur": _switch,
    "data.use_horizontal_flip": _switch,
    "logging.folder": _text,
    "logging.write_tag": _text,
    "mask.aspect_ratio": _pair,
    "mask.enc_mask_scale": _pair,
    "mask.min_keep": _integer,
    "mask.num_enc_masks": _integer,
    "mask.num_pred_masks": _integer,
    "mask.patch_size": _integer,
    "mask.pred_mask_scale": _pair,
    "meta.copy_data": _switch,
    "meta.load_checkpoint": _switch,
    "meta.model_name": _model,
    "meta.pred_depth": _integer,
    "meta.read_checkpoint": _nothing,
    "optimization.epochs": _integer,
    "optimization.final_lr": _number,
    "optimization.final_weight_decay": _number,
    "optimization.ipe_scale": _number,
    "optimization.lr": _number,
    "optimization.start_lr": _number,
    "optimization.warmup": _number,
    "optimization.weight_decay": _number,
}
_IJEPA = {
    **_COMMON,
    "mask.allow_overlap": _switch,
    "meta.pred_emb_dim": _integer,
    "meta.use_bfloat16": _switch,
    "optimization.ema": _pair,
}
_STOP = {
    **_COMMON,
    "meta.emb_dim": _integer,
    "meta.target_blocks": _integer,
    "meta.use_float16": _switch,
    "optimization.clip_grad": _number,
    "optimization.fix_lr_strategy": _strategy,
    "optimization.fix_lr_thres": _number,
    "optimization.fix_wd_strategy": _strategy,
    "optimization.fix_wd_thres": _number,
    "stop_params.apply_stop": _switch,
    "stop_params.var": _number,
}
# What no number depends on, and the thresholds, which most files of StoP do without.
_DEFAULTS = {
    "data.pin_mem": False,
    "logging.write_tag": "",
    "meta.copy_data": False,
    "meta.load_checkpoint": False,
    "meta.read_checkpoint": None,
    "optimization.fix_lr_strategy": "const",
    "optimization.fix_lr_thres": -1.0,
    "optimization.fix_wd_strategy": "const",
    "optimization.fix_wd_thres": -1.0,
}


def _values(document: object) -> dict[str, Any]:
    """Return the checked values of a file as ``group.key``; optional ones are there, too.

    Raises:
        ValueError: all that is wrong with them.
    """
    if not isinstance(document, dict):
        raise ValueError(f"expected groups of settings, got {reprlib.repr(document)}")
    problems, given = [], {}
    for group, keys in document.items():
        if isinstance(keys, dict):
            given.update({f"{group}.{key}": value for key, value in keys.items()})
        else:
            problems.append(f"{group}: expected a group of settings, got {reprlib.repr(keys)}")
    is_stop = "stop_params" in document
    if not is_stop and "optimization.ema" not in given:
        raise ValueError("expected stop_params (StoP) or optimization.ema (I-JEPA), got neither")
    program, schema = ("StoP", _STOP) if is_stop else ("I-JEPA", _IJEPA)
    problems += [f"{name}: no setting of {program}" for name in given if name not in schema]
    values = {}
    for name, check in schema.items():
        if name not in given:
            if name in _DEFAULTS:
                values[name] = _DEFAULTS[name]
            else:
                problems.append(f"{name}: expected for {program}, got none")
            continue
        try:
            values[name] = check(given[name])
        except ValueError as expected:
            problems.append(f"{name}: expected {expected}, got {reprlib.repr(given[name])}")
    strength = values.get("data.color_jitter_strength")
    if values.get("data.use_color_distortion") and strength:
        problems.append(
            "data.color_jitter_strength: expected 0, since jitter of colours is not offered, "
            f"got {strength}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return values


def _config(values: Mapping[str, Any]) -> Config:
    """Return the settings of checked values."""
    is_stop = "stop_params.var" in values
    side = values["data.crop_size"]
    half = values["meta.use_float16" if is_stop else "meta.use_bfloat16"]
    return Config(
        preset="from-yaml",
        data=DataConfig(
            root=Path(values["data.root_path"]) / values["data.image_folder"],
            batch_size=values["data.batch_size"],
            threads=values["data.num_workers"] or 1,
            transforms=Transforms(
                size=(side, side),
                crop_scale=values["data.crop_scale"],
                flip=0.5 if values["data.use_horizontal_flip"] else 0.0,
                gray=0.2 if values["data.use_color_distortion"] else 0.0,
                blur=0.5 if values["data.use_gaussian_blur"] else 0.0,
            ),
        ),
        model=ModelConfig(
            patch_size=values["mask.patch_size"],
            **values["meta.model_name"]._asdict(),
            predictor_embed_dim=values["meta.emb_dim" if is_stop else "meta.pred_emb_dim"],
            predictor_depth=values["meta.pred_depth"],
        ),
        noise=_noise(values) if is_stop else NoiseConfig(variant="ijepa"),
        objective=JepaConfig(
            mask=MaskConfig(
                enc_mask_scale=values["mask.enc_mask_scale"],
                pred_mask_scale=values["mask.pred_mask_scale"],
                aspect_ratio=values["mask.aspect_ratio"],
                nenc=values["mask.num_enc_masks"],
                npred=values["mask.num_pred_masks"],
                min_keep=values["mask.min_keep"],
                allow_overlap=values.get("mask.allow_overlap", False),
            ),
            target_blocks=values.get("meta.target_blocks", 1),
        ),
        optim=_stop_optim(values) if is_stop else _optim(values, values["optimization.ema"]),
        step=StepConfig(precision="bf16" if half else "fp32"),
        run=RunConfig(output=Path(values["logging.folder"]), resume=values["meta.load_checkpoint"]),
    )


def _noise(values: Mapping[str, Any]) -> NoiseConfig:
    variant = "stop" if values["stop_params.apply_stop"] else "stop_off"
    return NoiseConfig(variant=variant, noise_var=values["stop_params.var"])


def _optim(values: Mapping[str, Any], ema: tuple[float, float]) -> OptimConfig:
    return OptimConfig(
        epochs=values["optimization.epochs"],
        warmup=values["optimization.warmup"],
        start_lr=values["optimization.start_lr"],
        lr=values["optimization.lr"],
        final_lr=values["optimization.final_lr"],
        weight_decay=values["optimization.weight_decay"],
        final_weight_decay=values["optimization.final_weight_decay"],
        ema=ema,
        ipe_scale=values["optimization.ipe_scale"],
    )


def _stop_optim(values: Mapping[str, Any]) -> OptimConfig:
    optim = replace(
        _optim(values, (0.996, 1.0)),
        fix_lr_thres=values["optimization.fix_lr_thres"],
        fix_lr_strategy=values["optimization.fix_lr_strategy"],
        fix_wd_thres=values["optimization.fix_wd_thres"],
        fix_wd_strategy=values["optimization.fix_wd_strategy"],
    )
    norm = values["optimization.clip_grad"]
    if not norm:
        return optim
    return replace(optim, clip="global", clip_norm=norm, clip_encoder_only=True)
