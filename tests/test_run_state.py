"""Which settings a resume may change: those named, and no other."""

from dataclasses import fields, is_dataclass, replace

import pytest

from stopfast.config import to_document
from stopfast.presets import demo
from stopfast.run_state import _FREE, different_settings

CONFIG = demo()
NAMES = [
    (section.name, entry.name)
    for section in fields(CONFIG)
    if is_dataclass(getattr(CONFIG, section.name))
    for entry in fields(getattr(CONFIG, section.name))
]
MAY_CHANGE = {
    "run": {"output", "resume", "dry_run", "device", "log_every", "checkpoint_every", "tensorboard"}
    | {"wandb"},
    "data": {"root", "digits", "threads", "loader", "hardware_share", "broken", "max_broken"},
    "step": {"fast", "ops", "attention", "compile", "skip_unused", "bucket", "ahead", "copies"}
    | {"target_stream", "graphs"},
    "optim": {"optimizer"},
    "monitor": {"every", "images", "labelled", "labelled_images"},
}


@pytest.mark.parametrize(("section", "name"), NAMES, ids=".".join)
def test_change(section, name):
    saved = to_document(CONFIG)
    other = {**saved, section: {**saved[section], name: "another"}}
    free = name in MAY_CHANGE.get(section, ())
    told = f"{section}.{name}: another instead of {saved[section][name]}"
    assert different_settings(saved, other) == ([] if free else [told])
    assert free == (name in _FREE.get(section, ()))


def test_preset_and_nothing():
    saved = to_document(CONFIG)
    assert different_settings(saved, to_document(demo())) == []
    other = to_document(replace(CONFIG, preset="other"))
    assert different_settings(saved, other) == ["preset: other instead of demo"]
