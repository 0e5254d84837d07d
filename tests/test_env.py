"""The report on the installation, with fake libraries on the path in place of the real ones."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stopfast import env
from stopfast.kernels import ops
from stopfast.kernels._launch import watch_launches

LIBRARIES = {"torch", "triton", "nvidia", "xformers", "apex", "amp_C", "flash_attn", "timm"}
TORCH_13 = {
    "torch/__init__.py": "from torch import cuda, version\n__version__ = '2.15.0+cu132'",
    "torch/version.py": "cuda = '13.2'",
    "torch/cuda.py": "def is_available():\n    return False",
}
ATTENTION = "def memory_efficient_attention(): ..."


def _record(cuda: int | None) -> str:
    return json.dumps({"version": {"cuda": cuda, "torch": "2.10.0+cu128"}})


def _xformers(cuda: int | None) -> dict[str, str]:
    return {
        "xformers/__init__.py": "",
        "xformers/cpp_lib.json": _record(cuda),
        "xformers/ops.py": ATTENTION,
        "xformers/_cpp_lib.py": "_cpp_library_load_exception = None",
    }


def _metadata(name: str, version: str) -> dict[str, str]:
    folder = f"{name.replace('-', '_')}-{version}.dist-info"
    return {f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}


def _dali(build: int) -> dict[str, str]:
    return {
        "nvidia/dali/__init__.py": "def pipeline_def(): ...",
        **_metadata(f"nvidia-dali-cuda{build}", "2.0.0"),
    }


def _ours(name: str) -> bool:
    return name.partition(".")[0] in LIBRARIES


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write fake packages; nothing but them and the standard library can be found meanwhile."""
    real = {name: module for name, module in sys.modules.items() if _ours(name)}
    for name in real:
        del sys.modules[name]
    outside = [
        entry for entry in sys.path if not entry.endswith(("site-packages", "dist-packages"))
    ]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *outside])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in repr(f)])

    def write(files: dict[str, str]) -> None:
        for path, text in files.items():
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if _ours(name)]:
        del sys.modules[name]
    sys.modules.update(real)


APEX = {
    "absent": ({}, "missing", "build it from its repository"),
    "unrelated": (
        {"apex/__init__.py": ""},
        "not used",
        "the installed 'apex' is not NVIDIA's (no apex.optimizers.FusedAdam); not used."
        " NVIDIA's has no PyPI package: build it from its repository",
    ),
    "unrelated, raising": (
        {"apex/__init__.py": "import pyramid_that_is_not_there"},
        "not used",
        "is not NVIDIA's",
    ),
    "NVIDIA's": (
        {
            "apex/__init__.py": "",
            "apex/optimizers/__init__.py": "class FusedAdam: ...",
            "amp_C.py": "",
        },
        "available",
        "apex.optimizers.FusedAdam",
    ),
    "NVIDIA's, normalization only": (
        {
            "apex/__init__.py": "",
            "apex/normalization/__init__.py": "class FusedLayerNorm: ...",
            "amp_C.py": "",
        },
        "available",
        "apex.normalization.FusedLayerNorm",
    ),
    "NVIDIA's, Python only": (
        {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: ..."},
        "not used",
        "without its CUDA extensions",
    ),
    "NVIDIA's, raising": (
        {
            "apex/__init__.py": "print('noise')\nraise RuntimeError('needs\\nPyTorch 0.4')",
            "apex/optimizers/__init__.py": "class FusedAdam: ...",
        },
        "not used",
        "importing apex.optimizers raised RuntimeError: needs",
    ),
    "NVIDIA's, exiting": (
        {
            "apex/__init__.py": "raise SystemExit('no GPU')",
            "apex/optimizers/__init__.py": "class FusedAdam: ...",
        },
        "not used",
        "SystemExit: no GPU",
    ),
}


@pytest.mark.parametrize("case", APEX)
def test_apex(case, install, capfd):
    files, status, note = APEX[case]
    install(files)
    finding = env.apex()
    assert finding.status == status
    assert note in finding.note
    assert "\n" not in finding.note
    assert capfd.readouterr() == ("", "")


XFORMERS = {
    "absent": ({}, "13.2", "missing", "optional"),
    "CUDA 12 beside 13": (
        _xformers(1208),
        "13.2",
        "not used",
        "built for CUDA 12 (torch 2.10.0+cu128), torch is for CUDA 13",
    ),
    "CUDA 13 beside 13": (_xformers(1300), "13.2", "available", "memory_efficient_attention"),
    "CUDA 12 beside 12": (_xformers(1208), "12.6", "available", "memory_efficient_attention"),
    "beside a CPU torch": (_xformers(1208), None, "not used", "torch is not built for CUDA"),
    "built for the CPU": (_xformers(None), "13.2", "not used", "not built for CUDA"),
    "no record": ({"xformers/__init__.py": ""}, "13.2", "not used", "cpp_lib.json"),
    "a damaged record": (
        {"xformers/__init__.py": "", "xformers/cpp_lib.json": "{"},
        "13.2",
        "not used",
        "cpp_lib.json",
    ),
    "no attention": (
        {**_xformers(1300), "xformers/ops.py": ""},
        "13.2",
        "not used",
        "no xformers.ops.memory_efficient_attention",
    ),
    "binary does not load": (
        {**_xformers(1300), "xformers/_cpp_lib.py": "_cpp_library_load_exception = OSError()"},
        "13.2",
        "not used",
        "does not load",
    ),
}


@pytest.mark.parametrize("case", XFORMERS)
def test_xformers(case, install):
    files, cuda, status, note = XFORMERS[case]
    install(files)
    finding = env.xformers(cuda)
    assert finding.status == status
    assert note in finding.note


def test_a_mismatched_xformers_is_not_imported(install):
    install(_xformers(1208))
    assert "CUDA 12" in env.xformers("13.2").note
    assert "xformers" not in sys.modules


DALI = {
    "absent": ({}, "13.2", "missing", "pip install 'stopfast[dali-cuda13]'"),
    "absent, CUDA 12": ({}, "12.8", "missing", "pip install 'stopfast[dali-cuda12]'"),
    "absent, no CUDA": ({}, None, "missing", "pip install 'stopfast[dali-cuda13]'"),
    "13 beside 13": (_dali(130), "13.2", "used", "CUDA 13"),
    "12 beside 12": (_dali(120), "12.8", "used", "CUDA 12"),
    "13 beside a CPU torch": (_dali(130), None, "used", "CUDA 13"),
    "12 beside 13": (
        _dali(120),
        "13.2",
        "not used",
        "nvidia-dali-cuda120 is for CUDA 12, torch for CUDA 13: "
        "pip uninstall nvidia-dali-cuda120, then pip install 'stopfast[dali-cuda13]'",
    ),
    "13 beside 12": (_dali(130), "12.8", "not used", "pip install 'stopfast[dali-cuda12]'"),
    "13 beside 11": (_dali(130), "11.8", "not used", "no DALI for CUDA 11"),
    "both": (
        {**_dali(120), **_dali(130)},
        "13.2",
        "not used",
        "pip uninstall nvidia-dali-cuda130 nvidia-dali-cuda120, then",
    ),
    "raising": (
        {**_dali(130), "nvidia/dali/__init__.py": "raise OSError('libcuda')"},
        "13.2",
        "not used",
        "importing nvidia.dali raised OSError: libcuda; reinstall",
    ),
    "hollow": (
        {**_dali(130), "nvidia/dali/__init__.py": ""},
        "13.2",
        "not used",
        "no pipeline_def",
    ),
}


@pytest.mark.parametrize("case", DALI)
def test_dali(case, install, monkeypatch):
    files, cuda, status, note = DALI[case]
    install(files)
    finding = env.dali(cuda)
    assert finding.status == status
    assert note in finding.note
    monkeypatch.setattr(env, "_torch_cuda", lambda: cuda)
    problem = env.dali_problem()
    assert problem == (None if status == "used" else f"nvidia-dali: {finding.note}")


BY_SYMBOL = {
    "triton": (
        env.triton,
        {"triton/__init__.py": "def jit(): ..."},
        "available",
        "triton.jit",
    ),
    "an empty folder named triton": (
        env.triton,
        {"triton/notes.txt": ""},
        "not used",
        "the installed 'triton' has no triton.jit",
    ),
    "flash-attn": (
        env.flash_attn,
        {"flash_attn/__init__.py": "def flash_attn_func(): ..."},
        "available",
        "flash_attn.flash_attn_func",
    ),
    "flash-attn for another CUDA": (
        env.flash_attn,
        {"flash_attn/__init__.py": "raise ImportError('libcudart.so.12: no such file')"},
        "not used",
        "ImportError: libcudart.so.12",
    ),
    "timm": (env.timm, {"timm/__init__.py": ""}, "available", ""),
    "torch": (env.torch, TORCH_13, "used", "built for CUDA 13.2; no GPU found"),
    "torch, damaged": (
        env.torch,
        {"torch/__init__.py": "raise OSError('libtorch')"},
        "not used",
        "OSError: libtorch",
    ),
    "torch, driver too old": (
        env.torch,
        {**TORCH_13, "torch/cuda.py": "def is_available():\n    raise RuntimeError('driver')"},
        "used",
        "the GPU cannot be used: RuntimeError: driver",
    ),
}


@pytest.mark.parametrize("case", BY_SYMBOL)
def test_by_symbol(case, install):
    examine, files, status, note = BY_SYMBOL[case]
    install(files)
    finding = examine()
    assert finding.status == status
    assert note in finding.note


def test_versions_are_those_of_the_distributions(install):
    install({"timm/__init__.py": "", **_metadata("timm", "1.2.3"), **_dali(130)})
    assert env.timm().version == "1.2.3"
    assert env.dali("13.2").version == "2.0.0"


def test_has_symbol(install):
    install({"apex/__init__.py": "here = 1\nprint('noise')", "timm/__init__.py": "1 / 0"})
    assert env.has_symbol("apex", "here")
    assert not env.has_symbol("apex", "elsewhere")
    assert not env.has_symbol("apex.absent", "here")
    assert not env.has_symbol("timm", "here")


def test_missing_everything(install):
    findings = {finding.name: finding for finding in env.report()}
    missing = {name for name, finding in findings.items() if finding.status == "missing"}
    assert missing == {
        "torch", "triton", "nvidia-dali", "xformers", "apex", "flash-attn", "timm"
    }  # fmt: skip
    assert findings["stopfast"].status == findings["python"].status == "used"


def test_a_failing_examination_is_a_line(monkeypatch):
    def fail() -> env.Finding:
        raise ValueError("unforeseen")

    monkeypatch.setattr(env, "timm", fail)
    [finding] = [finding for finding in env.report() if finding.name == "timm"]
    assert finding.note == "could not be examined: ValueError: unforeseen"


def test_the_line_on_operations_is_true():
    assert ops.resolve_ops("auto") is ops.AUTO
    x = torch.randn(2, 3)
    with watch_launches() as launches:
        ops.AUTO.layer_norm(x, None, None, 1e-6)
    assert not launches
    assert "ops='auto' is EAGER on the CPU" in env.operations().note


def test_command_line():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "stopfast.env"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "python", "stopfast", "operations", "torch", "triton", "nvidia-dali", "xformers", "apex",
        "flash-attn", "timm",
    ]  # fmt: skip
