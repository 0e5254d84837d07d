"""The published programs' YAML files: each is its preset, and what is wrong in one is said at once."""

from dataclasses import replace
from pathlib import Path

import pytest

from stopfast.config import Config
from stopfast.presets import PRESETS
from stopfast.published_yaml import from_yaml

# The published files' keys, with the values of the released recipes.
YAML = """
data:
  batch_size: {gpu_batch}
  color_jitter_strength: 0.0
  crop_scale:
  - 0.3
  - 1.0
  crop_size: {side}
  image_folder: imagenet/1k
  num_workers: 8
  pin_mem: true
  root_path: /data/
  use_color_distortion: {augmented}
  use_gaussian_blur: {augmented}
  use_horizontal_flip: {augmented}
logging:
  folder: /logs/run/
  write_tag: jepa
mask:
  aspect_ratio: [0.75, 1.5]
  enc_mask_scale: [0.85, 1.0]
  min_keep: 10
  num_enc_masks: 1
  num_pred_masks: 4
  patch_size: {patch}
  pred_mask_scale: [0.15, 0.2]{mask}
meta:
  copy_data: false
  load_checkpoint: false
  model_name: {model}
  pred_depth: {predictor_depth}
  read_checkpoint: null{meta}
optimization:
  epochs: {epochs}
  final_lr: {final_lr}
  final_weight_decay: 0.4
  ipe_scale: 1.0
  lr: {lr}
  start_lr: 0.0002
  warmup: {warmup}
  weight_decay: 0.04{optimization}
"""
OF_IJEPA = {
    "augmented": "false",
    "mask": "\n  allow_overlap: false",
    "meta": "\n  pred_emb_dim: 384\n  use_bfloat16: true",
    "optimization": "\n  ema:\n  - 0.996\n  - 1.0",
}
H = {"side": 224, "patch": 16, "predictor_depth": 12, "epochs": 300, "warmup": 40}
H |= {"lr": "1e-3", "final_lr": "1.0e-06"}
IJEPA_H = {**OF_IJEPA, **H, "model": "vit_huge"}


def of_stop(half: str, var: float, fixed: str = "") -> dict[str, str]:
    return {
        "augmented": "true",
        "mask": "",
        "meta": f"\n  emb_dim: 384\n  target_blocks: 1\n  use_float16: {half}",
        "optimization": f"\n  clip_grad: 0{fixed}\nstop_params:\n  apply_stop: true\n  var: {var}",
    }


FIXED = "".join(f"\n  fix_{what}_thres: 250\n  fix_{what}_strategy: const" for what in ("lr", "wd"))
STOP_L = H | {"epochs": 600, "warmup": 15, "lr": "8.0e-4", "final_lr": "1e-4"}
FILES = {
    "ijepa-vit-h14": IJEPA_H | {"gpu_batch": 128, "patch": 14},
    "ijepa-vit-h16-448": IJEPA_H | {"gpu_batch": 16, "side": 448},
    "ijepa-vit-g16": IJEPA_H
    | {"gpu_batch": 16, "model": "vit_giant", "predictor_depth": 16, "epochs": 44, "warmup": 3},
    "stop-vit-b16": STOP_L
    | of_stop("true", 0.25)
    | {"gpu_batch": 64, "model": "deit_base", "predictor_depth": 6},
    "stop-vit-l16": STOP_L | of_stop("false", 0.25) | {"gpu_batch": 64, "model": "deit_large"},
    "stop-vit-h16": H | of_stop("true", 0.2, FIXED) | {"gpu_batch": 64, "model": "deit_huge"},
}


def read(text: str, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return from_yaml(path)


@pytest.mark.parametrize("name", FILES)
def test_published_file_is_its_preset(name, tmp_path):
    config, preset = read(YAML.format(**FILES[name]), tmp_path), PRESETS[name]()
    per_process = preset.data.batch_size // preset.step.accumulate
    assert config == replace(
        preset,
        preset="from-yaml",
        data=replace(preset.data, batch_size=per_process, root=Path("/data/imagenet/1k")),
        step=replace(preset.step, accumulate=1),
        run=replace(preset.run, output=Path("/logs/run")),
    )


IJEPA, STOP = (YAML.format(**FILES[name]) for name in ("ijepa-vit-h14", "stop-vit-h16"))


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        (IJEPA, "load_checkpoint: false", "load_checkpoint: true", {"run.resume": True}),
        (
            IJEPA,
            "allow_overlap: false",
            "allow_overlap: true",
            {"objective.mask.allow_overlap": True},
        ),
        (IJEPA, "use_bfloat16: true", "use_bfloat16: false", {"step.precision": "fp32"}),
        (IJEPA, "num_workers: 8", "num_workers: 0", {"data.threads": 1}),
        (IJEPA, "  pin_mem: true\n", "", {"data.threads": 8}),
        (IJEPA, "vit_huge", "vit_tiny", {"model.embed_dim": 192, "model.num_heads": 3}),
        (IJEPA, "- 0.996", "- 0.99", {"optim.ema": (0.99, 1.0)}),
        (IJEPA, "ipe_scale: 1.0", "ipe_scale: 1.25", {"optim.ipe_scale": 1.25}),
        (IJEPA, "strength: 0.0", "strength: 0.5", {"data.transforms.gray": 0.0}),
        (IJEPA, "flip: false", "flip: true", {"data.transforms.flip": 0.5}),
        (
            IJEPA,
            "num_enc_masks: 1",
            "num_enc_masks: 2",
            {"objective.mask.nenc": 2, "objective.mask.npred": 4},
        ),
        (IJEPA, "weight_decay: 0.04", "weight_decay: 5e-2", {"optim.weight_decay": 0.05}),
        (STOP, "apply_stop: true", "apply_stop: false", {"noise.variant": "stop_off"}),
        (STOP, "target_blocks: 1", "target_blocks: 4", {"objective.target_blocks": 4}),
        (STOP, "emb_dim: 384", "emb_dim: 192", {"model.predictor_embed_dim": 192}),
        (STOP, "wd_strategy: const", "wd_strategy: linear", {"optim.fix_wd_strategy": "linear"}),
        (STOP, "lr_strategy: const", "lr_strategy: linear", {"optim.fix_lr_strategy": "linear"}),
        (STOP, "lr_thres: 250", "lr_thres: 99", {"optim.fix_lr_thres": 99}),
        (STOP, "wd_thres: 250", "wd_thres: 99", {"optim.fix_wd_thres": 99}),
        (
            STOP,
            "clip_grad: 0",
            "clip_grad: 3",
            {"optim.clip": "global", "optim.clip_norm": 3, "optim.clip_encoder_only": True},
        ),
    ],
)
def test_settings_of_files(text, old, new, expected, tmp_path):
    assert text.count(old) == 1
    config = read(text.replace(old, new), tmp_path)
    for name, value in expected.items():
        found = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value


@pytest.mark.parametrize(
    ("text", "old", "new", "messages"),
    [
        (IJEPA, "pred_depth", "depth", ["meta.depth: no setting", "meta.pred_depth: expected"]),
        (IJEPA, "\nmeta:", "\nextra: {a: 1}\nmeta:", ["extra.a"]),
        (IJEPA, "\nmeta:", "\nextra: 1\nmeta:", ["extra: expected a group"]),
        (STOP, "clip_grad: 0", "ema: [0.9, 1.0]", ["optimization.ema", "optimization.clip_grad"]),
        (STOP, "stop_params", "stop", ["expected stop_params (StoP) or optimization.ema"]),
        (IJEPA, "lr: 1e-3", "lr: fast", ["optimization.lr: expected a number, got 'fast'"]),
        (IJEPA, "lr: 1e-3", "lr: .inf", ["optimization.lr: expected a number"]),
        (IJEPA, "lr: 1e-3", "lr: 1e999", ["optimization.lr: expected a number"]),
        (IJEPA, "lr: 1e-3", f"lr: 1{'0' * 400}", ["optimization.lr: expected a number"]),
        (IJEPA, "lr: 1e-3", f"lr: 1{'0' * 5000}", ["expected a YAML file"]),
        (IJEPA, "lr: 1e-3", "lr: 2021-13-13", ["expected a YAML file"]),
        (IJEPA, "lr: 1e-3", "lr: true", ["optimization.lr: expected a number"]),
        (IJEPA, "epochs: 300", "epochs: 1.5", ["optimization.epochs: expected an integer"]),
        (IJEPA, "epochs: 300", "epochs: 0", ["epochs > 0"]),
        (IJEPA, "use_bfloat16: true", "use_bfloat16: 1", ["use_bfloat16: expected true or false"]),
        (IJEPA, "[0.75, 1.5]", "[0.75]", ["mask.aspect_ratio: expected a list of two numbers"]),
        (IJEPA, "vit_huge", "resnet50", ["meta.model_name", "giant", "resnet50"]),
        (IJEPA, "/data/", "3", ["data.root_path: expected text"]),
        (IJEPA, "checkpoint: null", "checkpoint: a.tar", ["read_checkpoint", "load_published"]),
        (STOP, "lr_strategy: const", "lr_strategy: step", ["fix_lr_strategy: expected const"]),
        (STOP, "strength: 0.0", "strength: 0.5", ["color_jitter_strength: expected 0"]),
        (IJEPA, "lr: 1e-3", "lr: 1e-3\n  lr: 2e-3", ["lr more than once"]),
        (IJEPA, "[0.75, 1.5]", "&a [*a, *a]", ["no aliases"]),
        (IJEPA, "[0.75, 1.5]", "[" * 5000, ["at most 3 levels"]),
        (IJEPA, "lr: 1e-3", "lr: !!python/name:os.system", ["expected a YAML file", "os.system"]),
        (IJEPA, "write_tag: jepa", f"write_tag: {'a' * 70000}", ["at most 65536 bytes"]),
        (IJEPA, IJEPA, "just text", ["expected groups of settings"]),
        (IJEPA, IJEPA, "", ["expected groups of settings"]),
        (IJEPA, IJEPA, "a: [", ["expected a YAML file"]),
        (IJEPA, "jepa", "\x00", ["expected a YAML file"]),
    ],
)
def test_files_that_are_refused(text, old, new, messages, tmp_path):
    """With the file's name, and with all that is wrong at once."""
    assert text.count(old) == 1
    with pytest.raises(ValueError) as error:
        read(text.replace(old, new), tmp_path)
    for message in ("config.yaml", *messages):
        assert message in str(error.value)
