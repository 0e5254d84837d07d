"""The layers of the library, from its source: what may import what, and how large a file is."""

import ast
import os
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["stopfast", "kernels", "tests", "benchmarks"]

ALONE = ("stopfast.config",)  # packages that import nothing else of ours
ONLY_IMPORTED_BY = {"stopfast.train": {"stopfast.commands", "stopfast.demo"}}
MAY_IMPORT_INSIDE_FUNCTIONS = {"stopfast", "stopfast.cli"}
NEVER_IMPORTED_BY_THE_LIBRARY = ("benchmarks", "tests")

# What takes steps knows of an objective what the protocol says, and of its settings nothing.
LOOP = ("train", "step", "monitors", "run_state", "checkpoint", "journal", "progress")
OBJECTIVES = "stopfast.objectives"
SETTINGS_OF_OBJECTIVES = {"DropPosConfig", "JepaConfig", "ReconstructionConfig"}

KERNELS = "stopfast.kernels"
KERNELS_SEEN_FROM_OUTSIDE = f"{KERNELS}.ops"
ANY_SIBLING = (KERNELS,)
# By the role of a file in kernels/: what it may import besides the standard library.
KERNEL_IMPORTS = {
    "package": (),
    "arguments": ("torch",),
    "noise": ("torch", f"{KERNELS}.arguments"),
    "reference": ("torch", f"{KERNELS}.arguments", f"{KERNELS}.noise"),
    "reference_losses": ("torch", f"{KERNELS}.arguments"),
    "case_arguments": ("torch", f"{KERNELS}.arguments"),
    "cases": ("torch", f"{KERNELS}.case_arguments"),
    "ops": ("torch", *ANY_SIBLING),
    "attention_backends": ("torch", "xformers", *ANY_SIBLING),
    "helper": ("torch", "triton", "numpy", *ANY_SIBLING),
    "kernel": ("torch", "triton", f"{KERNELS}.arguments", f"{KERNELS}._*"),
}

LINES, KERNEL_LINES, KERNEL_PARAMETERS = 400, 250, 8


class Import(NamedTuple):
    """One imported module; ``lazy`` inside a function, ``typed`` under ``if TYPE_CHECKING``."""

    module: str
    line: int
    lazy: bool
    typed: bool


def _module(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("stopfast", *parts) if parts[0] == "kernels" else parts)


def _within(module: str, package: str) -> bool:
    if package.endswith("*"):
        return module.startswith(package[:-1])
    return module == package or module.startswith(package + ".")


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _targets(node: ast.AST, path: str, modules: set[str]) -> list[str]:
    """The modules that one node imports, by statement or by a call with a literal name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = _module(path).split(".")
            climb = node.level - (PurePosixPath(path).name == "__init__.py")
            base = ".".join([*package[: len(package) - climb], *filter(None, [base])])
        names = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in modules else base for name in names]
    if isinstance(node, ast.Call) and _dotted(node.func, {}).endswith(
        ("import_module", "__import__")
    ):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def _imports(path: str, tree: ast.AST, modules: set[str]) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool, typed: bool) -> Iterator[Import]:
        for target in _targets(node, path, modules):
            yield Import(target, getattr(node, "lineno", 0), lazy, typed)
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and _dotted(node.test, {}).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, lazy, True)
            children = node.orelse
        else:
            children = ast.iter_child_nodes(node)
        for child in children:
            yield from walk(child, lazy, typed)

    return walk(tree, False, False)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes evaluated when a module is imported; of a function, its decorators and defaults."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        children = [*node.decorator_list, node.args]
    elif isinstance(node, ast.Lambda):
        children = [node.args]
    for child in children:
        yield from _run_at_import(child)


def _role(path: str) -> str:
    """The role of a file of kernels/: only a file that holds a fused kernel is a kernel file."""
    stem = PurePosixPath(path).stem
    if stem in KERNEL_IMPORTS:
        return stem
    return "package" if stem == "__init__" else "helper" if stem.startswith("_") else "kernel"


def _check_imports(path: str, imports: list[Import]) -> Iterator[str]:
    module, in_kernels = _module(path), path.startswith("kernels/")
    for target, line, lazy, _ in imports:
        top, at = target.partition(".")[0], f"{path}:{line}"
        if in_kernels and top not in sys.stdlib_module_names:
            role = _role(path)
            if not any(_within(target, allowed) for allowed in KERNEL_IMPORTS[role]):
                yield f"kernel imports: {at}: {role} file imports {target}"
        if not in_kernels and _within(target, KERNELS) and target != KERNELS_SEEN_FROM_OUTSIDE:
            yield f"kernels from outside: {at}: imports {target}"
        if top == "stopfast":
            for alone in ALONE:
                if _within(module, alone) and not _within(target, alone):
                    yield f"alone: {at}: imports {target}"
            if lazy and module not in MAY_IMPORT_INSIDE_FUNCTIONS:
                yield f"inside a function: {at}: imports {target}"
        for owner, importers in ONLY_IMPORTED_BY.items():
            if _within(target, owner) and module not in importers and not _within(module, owner):
                yield f"importers table: {at}: imports {target}"
        if top in NEVER_IMPORTED_BY_THE_LIBRARY:
            yield f"library alone: {at}: imports {target}"


def _check_loop(path: str, tree: ast.Module, imports: list[Import]) -> Iterator[str]:
    """No objective of a name: nothing of the package but its protocol, no settings under any name."""
    if not any(_within(_module(path), f"stopfast.{name}") for name in LOOP):
        return
    for target, line, _, _ in imports:
        if _within(target, OBJECTIVES) and target != OBJECTIVES:
            yield f"loop: {path}:{line}: imports {target}"
    for node in ast.walk(tree):
        named = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}.get(type(node), "")
        if named and (name := getattr(node, named)) in SETTINGS_OF_OBJECTIVES:
            yield f"loop: {path}:{getattr(node, 'lineno', 0)}: names {name}"


def _check_nothing_at_import(path: str, tree: ast.Module) -> Iterator[str]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in _run_at_import(tree):
        if isinstance(node, ast.Call) and _dotted(node.func, aliases).startswith("torch.cuda."):
            yield f"at import: {path}:{node.lineno}: calls {_dotted(node.func, aliases)}"
        if isinstance(node, (ast.Name, ast.Attribute)):
            dotted = _dotted(node, aliases)
            if dotted in ("os.environ", "os.getenv"):
                yield f"at import: {path}:{node.lineno}: reads {dotted}"


def _check_size(path: str, source: str, tree: ast.Module) -> Iterator[str]:
    kernel = path.startswith("kernels/") and _role(path) == "kernel"
    lines, limit = len(source.splitlines()), KERNEL_LINES if kernel else LINES
    if lines > limit:
        yield f"lines: {path}: {lines} of at most {limit}"
    public = path.startswith("kernels/") and _role(path) != "helper"
    for node in tree.body if public else []:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            a = node.args
            count = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            if count > KERNEL_PARAMETERS:
                yield f"parameters: {path}:{node.lineno}: {node.name} has {count}"


def _check_cycles(imports: dict[str, list[Import]]) -> Iterator[str]:
    """Importing a module also runs the packages it lies in, save those already being imported."""
    graph: dict[str, set[str]] = {}
    for module, found in imports.items():
        graph[module] = set()
        for target in (i.module for i in found if not i.typed):
            names = target.split(".")
            run = {".".join(names[:end]) for end in range(1, len(names) + 1)}
            graph[module] |= {
                name for name in run & imports.keys() if name == target or not _within(module, name)
            }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"cycle: {' <- '.join(error.args[1])}"


def check(files: dict[str, str]) -> list[str]:
    """Every breach of a rule in ``files``, source texts by their path in the repository."""
    modules = {_module(path) for path in files}
    breaches: list[str] = []
    library: dict[str, list[Import]] = {}
    for path, source in files.items():
        tree = ast.parse(source, path)
        breaches += _check_size(path, source, tree)
        if path.startswith(("stopfast/", "kernels/")):
            library[_module(path)] = imports = list(_imports(path, tree, modules))
            breaches += _check_imports(path, imports)
            breaches += _check_loop(path, tree, imports)
            breaches += _check_nothing_at_import(path, tree)
    return breaches + list(_check_cycles(library))


def _sources() -> dict[str, str]:
    # The walk does not follow links, so the folder behind stopfast/kernels is read once.
    found = [ROOT / "setup.py"]
    for top in FOLDERS:
        for folder, _, names in os.walk(ROOT / top):
            found += [Path(folder, name) for name in names if name.endswith(".py")]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(found)
    }


def test_the_rules_hold():
    assert check(_sources()) == []


def test_each_file_is_read_once():
    sources = _sources()
    assert "kernels/__init__.py" in sources
    assert "stopfast/__init__.py" in sources
    assert not [path for path in sources if path.startswith("stopfast/kernels/")]


# A small library that keeps every rule; each planted text replaces or joins one of its files.
SOUND = {
    "kernels/__init__.py": "",
    "kernels/_launch.py": "import numpy\nimport triton",
    "kernels/fused.py": "import math\nimport torch\nimport triton.language as tl\n"
    "from stopfast.kernels._launch import x\nfrom stopfast.kernels.arguments import y\n"
    "from stopfast.kernels._philox import z\ndef f(a, b, c, d, e, f, g, h): ...",
    "kernels/ops.py": "from torch import Tensor\nfrom stopfast.kernels import fused, reference",
    "kernels/_philox.py": "import triton",
    "kernels/arguments.py": "from torch import Tensor",
    "kernels/noise.py": "import torch",
    "kernels/cases.py": "from stopfast.kernels.case_arguments import y",
    "kernels/case_arguments.py": "from stopfast.kernels.arguments import y",
    "kernels/reference.py": "import math\nimport torch.nn.functional as F\n"
    "from stopfast.kernels.noise import words",
    "kernels/reference_losses.py": "import torch\nfrom stopfast.kernels.arguments import y",
    "stopfast/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    "    from stopfast.encoder import X\ndef f():\n    import stopfast.encoder",
    "stopfast/cli.py": "def main():\n    from stopfast import commands\n    commands.run()",
    "stopfast/commands.py": "from stopfast import train\ndef run():\n    train.run()",
    "stopfast/config/__init__.py": "from stopfast.config.model import Model",
    "stopfast/config/model.py": "from dataclasses import dataclass",
    "stopfast/data/__init__.py": "from stopfast.data.loader import Loader",
    "stopfast/data/loader.py": "from stopfast import encoder\nfrom . import sampler",
    "stopfast/data/sampler.py": "import os, torch, typing\nif typing.TYPE_CHECKING:\n"
    "    from stopfast.data.loader import Loader\ndef f():\n    torch.cuda.synchronize()\n"
    "    return os.environ['X']",
    "stopfast/encoder.py": "from stopfast.kernels.ops import EAGER",
    "stopfast/monitors.py": "from stopfast.objectives import Objective",
    "stopfast/objectives/__init__.py": "from typing import Protocol",
    "stopfast/objectives/jepa.py": "from stopfast.config import JepaConfig",
    "stopfast/step/__init__.py": "from stopfast.objectives import Objective",
    "stopfast/train.py": "import stopfast.data.loader\nfrom stopfast import config, encoder",
    "tests/test_train.py": "import os\nfrom stopfast import train\nX = os.environ.get('X')",
}

PLANTED = [
    ("kernel imports", "kernels/fused.py", "import numpy"),
    ("kernel imports", "kernels/fused.py", "from stopfast.kernels import reference"),
    ("kernel imports", "kernels/fused.py", "from .reference import attention"),
    ("kernel imports", "kernels/fused.py", "from stopfast.config import Config"),
    ("kernel imports", "kernels/deep/fused.py", "from ..reference import attention"),
    ("kernel imports", "kernels/fused.py", "from stopfast.kernels.noise import words"),
    ("kernel imports", "kernels/cases.py", "from stopfast.kernels import reference"),
    ("kernel imports", "kernels/case_arguments.py", "from stopfast.kernels import reference"),
    ("kernel imports", "kernels/reference_losses.py", "import triton"),
    ("kernel imports", "kernels/arguments.py", "import triton"),
    ("kernel imports", "kernels/noise.py", "from stopfast.kernels import _launch"),
    ("kernel imports", "kernels/reference.py", "import triton"),
    ("kernel imports", "kernels/reference.py", "import stopfast.kernels._launch"),
    ("kernel imports", "kernels/ops.py", "import triton"),
    ("kernel imports", "kernels/_launch.py", "import rich"),
    ("kernel imports", "kernels/__init__.py", "import torch"),
    ("kernels from outside", "stopfast/encoder.py", "from stopfast.kernels import reference"),
    ("kernels from outside", "stopfast/encoder.py", "from stopfast.kernels.fused import f"),
    ("kernels from outside", "stopfast/encoder.py", "import stopfast.kernels"),
    ("kernels from outside", "stopfast/data/loader.py", "from ..kernels import reference"),
    ("alone", "stopfast/config/model.py", "from stopfast import __version__"),
    ("alone", "stopfast/config/model.py", "from .. import encoder"),
    ("importers table", "stopfast/verify.py", "from stopfast.train import run"),
    ("importers table", "stopfast/verify.py", "from stopfast import train"),
    ("importers table", "stopfast/verify.py", "import stopfast.train as t"),
    ("loop", "stopfast/train.py", "from stopfast.objectives.jepa import Jepa"),
    ("loop", "stopfast/monitors.py", "from stopfast.objectives import jepa"),
    ("loop", "stopfast/step/__init__.py", "from ..objectives.jepa import Jepa"),
    ("loop", "stopfast/train.py", "from stopfast.config import JepaConfig as Settings"),
    ("loop", "stopfast/train.py", "from stopfast import config\nX = config.DropPosConfig"),
    ("loop", "stopfast/run_state.py", "def f(x: object):\n    return isinstance(x, JepaConfig)"),
    ("library alone", "stopfast/encoder.py", "from tests.helpers import x"),
    ("library alone", "stopfast/encoder.py", "import benchmarks"),
    ("inside a function", "stopfast/encoder.py", "def f():\n    from . import config"),
    (
        "inside a function",
        "stopfast/encoder.py",
        "class A:\n    async def f(self):\n        import stopfast.config",
    ),
    (
        "inside a function",
        "stopfast/encoder.py",
        "from importlib import import_module\ndef f():\n    import_module('stopfast.config')",
    ),
    (
        "inside a function",
        "kernels/ops.py",
        "def f():\n    from stopfast.kernels import fused",
    ),
    ("cycle", "stopfast/encoder.py", "import stopfast.encoder"),
    ("cycle", "stopfast/data/sampler.py", "from stopfast.data.loader import Loader"),
    ("cycle", "stopfast/data/sampler.py", "from stopfast.data import Loader"),
    ("cycle", "stopfast/encoder.py", "from stopfast.data.sampler import f"),
    ("cycle", "kernels/_launch.py", "from stopfast.kernels import fused"),
    ("at import", "stopfast/encoder.py", "import torch\nX = torch.cuda.is_available()"),
    ("at import", "stopfast/encoder.py", "import torch as t\nif t.cuda.is_available(): ..."),
    ("at import", "stopfast/encoder.py", "from torch import cuda\nclass A:\n    n = cuda.f()"),
    ("at import", "stopfast/encoder.py", "import torch\ndef f(n=torch.cuda.device_count()): ..."),
    ("at import", "kernels/fused.py", "import torch\n@torch.cuda.nvtx.range('x')\ndef f(): ..."),
    ("at import", "stopfast/encoder.py", "import os\nX = os.environ.get('X')"),
    ("at import", "stopfast/encoder.py", "from os import environ as e\nX = e['X']"),
    ("at import", "stopfast/encoder.py", "import os\nX = os.getenv('X')"),
    ("lines", "stopfast/encoder.py", "\n" * 401),
    ("lines", "tests/test_train.py", "\n" * 401),
    ("lines", "kernels/fused.py", "\n" * 251),
    ("parameters", "kernels/fused.py", "def f(a, b, c, d, e, f, g, h, i): ..."),
    ("parameters", "kernels/ops.py", "def f(a, b, c, d, /, e, f, g, *, h, i): ..."),
    ("parameters", "kernels/reference.py", "def f(a, b, c, d, e, f, g, *h, **i): ..."),
]


def test_a_sound_library_passes():
    assert check(SOUND) == []


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_breach_is_found(rule, path, source):
    breaches = check({**SOUND, path: source})
    assert [breach.partition(":")[0] for breach in breaches] == [rule]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("stopfast/encoder.py", "\n" * 400),
        ("kernels/fused.py", "\n" * 250),
        ("kernels/fused.py", "def _f(a, b, c, d, e, f, g, h, i): ..."),
        ("kernels/_philox.py", "import triton\ndef f(a, b, c, d, e, f, g, h, i): ..."),
        ("stopfast/encoder.py", "def f(a, b, c, d, e, f, g, h, i): ..."),
    ],
)
def test_the_limits_themselves_are_allowed(path, source):
    assert check({**SOUND, path: source}) == []
