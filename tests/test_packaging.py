"""What is built from a clean copy holds the kernels under one name, and imports from anywhere."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTED = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]


class Builds(NamedTuple):
    """The archives, and the wheel unpacked."""

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path
    unpacked: Path


def _run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run without the settings that change where Python looks; ``path`` is its PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def _python(code: str, cwd: Path, path: Path | None = None) -> str:
    done = _run(sys.executable, "-c", code, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _copy(target: Path) -> Path:
    """The files that git does not ignore: a build must leave nothing beside the originals."""
    for name in _run(*LISTED, cwd=ROOT).stdout.split("\0"):
        source = ROOT / name
        if name and os.path.lexists(source):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def _build(*command: str, cwd: Path) -> None:
    done = _run(sys.executable, "-m", *command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> Builds:
    # Not in a copy without its history (an unpacked sdist): git says what belongs to the project.
    if not shutil.which("git") or _run(*LISTED, cwd=ROOT).returncode:
        pytest.skip("needs a git checkout")
    top = tmp_path_factory.mktemp("packaging")
    direct, both = top / "direct", top / "both"
    pip = ["pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    _build(*pip, "--wheel-dir", str(direct), ".", cwd=_copy(top / "one"))
    # Without a choice of format, `build` makes the sdist and then the wheel out of that sdist.
    _build("build", "--no-isolation", "--outdir", str(both), cwd=_copy(top / "two"))
    [wheel], [sdist], [wheel_of_sdist] = (
        list(folder.glob(pattern))
        for folder, pattern in ((direct, "*.whl"), (both, "*.tar.gz"), (both, "*.whl"))
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(top / "unpacked")
    return Builds(wheel, sdist, wheel_of_sdist, top / "unpacked")


def _members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_nothing_else(builds):
    members = _members(builds.wheel)
    modules = {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert {f"stopfast/{path.as_posix()}" for path in modules} <= members
    assert {"stopfast/kernels/__init__.py", "stopfast/py.typed"} <= members
    tops = {member.split("/")[0] for member in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stopfast"}
    assert not [member for member in members if "test" in member.lower()]


def test_the_wheel_of_the_sdist_is_the_same(builds):
    assert _members(builds.wheel_of_sdist) == _members(builds.wheel)


def test_the_sdist_holds_the_kernels_once(builds):
    with tarfile.open(builds.sdist) as archive:
        members = [name.partition("/")[2] for name in archive.getnames()]
    assert "kernels/__init__.py" in members
    assert not [member for member in members if member.startswith("stopfast/kernels")]


def test_kernels_import_from_the_unpacked_wheel(builds, tmp_path):
    code = "import stopfast.kernels; print(stopfast.kernels.__file__)"
    found = Path(_python(code, cwd=tmp_path, path=builds.unpacked))
    assert found == builds.unpacked / "stopfast" / "kernels" / "__init__.py"


@pytest.mark.parametrize("code", ["import kernels.ops", "import kernels; kernels.ops"])
def test_the_folder_is_empty_as_kernels(code):
    """And it imports: libraries look for Hugging Face's package of that name."""
    done = _run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode != 0 and "kernels" in done.stderr.splitlines()[-1]
    assert _run(sys.executable, "-c", "import kernels", cwd=ROOT).returncode == 0


def test_the_library_alone_does_not_import_torch(builds, tmp_path):
    code = "import sys, stopfast; print(stopfast.__file__, 'torch' in sys.modules)"
    found, torch = _python(code, cwd=tmp_path, path=builds.unpacked).rsplit(" ", 1)
    assert Path(found).is_relative_to(builds.unpacked)
    assert torch == "False"
