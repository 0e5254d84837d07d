"""``--step.fast`` and the switches that it turns on: each can be taken back, and each changes something."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.step.arms.ours import WITHOUT
from stopfast import commands
from stopfast.build import fastest
from stopfast.cli import main
from stopfast.encoder import VisionTransformer
from stopfast.kernels import ops as kernel_ops
from stopfast.presets import PRESETS

GPU = torch.device("cuda", 0)
CONFIG = PRESETS["stop-vit-b16"]()
FAST = {
    "attention": "triton", "compile": True, "bucket": 8, "copies": True, "target_stream": True,
    "graphs": True, "skip_unused": True, "ahead": True,
}  # fmt: skip


def settings(monkeypatch, capsys, *flags: str) -> dict:
    monkeypatch.setattr(commands, "choose_device", lambda name: GPU)
    arguments = ["stop-vit-b16", "--step.precision", "bf16", *flags, "--dry-run"]
    assert main(["pretrain", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        ((), {}),
        (("--step.no-graphs",), {"graphs": False}),
        (("--step.bucket", "4", "--step.attention", "sdpa"), {"bucket": 4, "attention": "sdpa"}),
        (("--step.no-copies", "--step.no-compile"), {"copies": False, "compile": False}),
    ],
    ids=str,
)
def test_flags_go_before_fast(flags, other, monkeypatch, capsys):
    for order in (("--step.fast", *flags), (*flags, "--step.fast")):
        found = settings(monkeypatch, capsys, *order)
        assert {name: found["step"][name] for name in FAST} == {**FAST, **other}
        assert found["optim"]["optimizer"] == "adamw_ema"


@pytest.mark.parametrize("name", ["droppos-vit-b16", "mae-vit-b16", "beyond-zoomed-out"])
def test_lengths_that_stay_need_no_buckets(name):
    """Nor our attention, which takes padded lengths, nor a stream for a teacher that is not there."""
    step = fastest(PRESETS[name](), GPU).step
    assert (step.attention, step.bucket, step.target_stream) == ("auto", 1, False)
    assert step.compile and step.graphs == (step.precision != "fp16")


def test_fast_on_a_cpu_leaves_the_rest_alone():
    fast = fastest(CONFIG, torch.device("cpu"))
    assert fast == replace(CONFIG, step=replace(CONFIG.step, fast=True))


def test_compiled_blocks_call_what_a_gpu_is_given(monkeypatch):
    """As on a GPU that nobody has measured: the choice is made while a block is traced."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "unmeasured")
    monkeypatch.setattr(kernel_ops, "_is_gpu", lambda device: True)
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=(8,), patch_size=4, embed_dim=8, depth=1, num_heads=2)
    images = torch.randn(2, 3, 8, 8)
    expected = encoder(images)
    block = encoder.blocks[0]
    block._forward = torch.compile(block._forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize("name", WITHOUT)
def test_an_ablation_turns_something_off(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "unmeasured")
    config = replace(CONFIG, step=replace(CONFIG.step, precision="bf16"))
    fast = fastest(config, GPU)
    unmeasured = {"fused layer_norm", "fused linear_gelu"}  # eager on a GPU without a table
    assert (WITHOUT[name](fast, GPU) == fast) == (name in unmeasured)
