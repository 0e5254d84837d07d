"""Every Python example of the documentation runs, each in a namespace and a folder of its own."""

import re
import sys
from pathlib import Path

import pytest
import torch

from stopfast.cli import main
from stopfast.export import export_run
from stopfast.finetuning import RECIPES, finetune_settings
from stopfast.presets import PRESETS
from tests.small_runs import settings, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list:
    """The examples, by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"```{language}\n(.*?)```", text, flags=re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{page.stem}-{line}"))
    return found


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with what the examples read: a run, and a file of the published programs."""
    write_checkpoint(tmp_path / "runs" / "demo", settings("square"))
    export_run(tmp_path / "runs" / "demo", tmp_path / "jepa-latest.pth.tar", format="pth")
    monkeypatch.chdir(tmp_path)
    # Here the folder `kernels` would pass for the library of that name.
    elsewhere = [p for p in sys.path if Path(p or ROOT).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", elsewhere)
    return tmp_path


@pytest.mark.parametrize("example", blocks("python"))
def test_example(example, workplace):
    for library in ("timm", "transformers"):
        if re.search(rf"^(import|from) {library}\b", example, flags=re.MULTILINE):
            pytest.importorskip(library)
    with torch.random.fork_rng():
        exec(compile(example, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("example", blocks("bash"))
def test_command(example, workplace):
    for line in example.strip().splitlines():
        program, *arguments = line.split()
        assert program == "stopfast"
        assert main(arguments) == 0


def test_links_and_names():
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (page.parent / link).exists(), link
        paths = re.findall(r"`((?:kernels|stopfast|tests|benchmarks)/[\w./]+)`", text)
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert not missing, f"{page.name}: {missing}"


def _setting(config, flag):
    for name in flag.replace("-", "_").split("."):
        config = getattr(config, name, "absent")
    return config


def test_switches_of_the_presets():
    """What the page on faithful and corrected presets says of them."""
    text = (ROOT / "docs" / "faithful-and-corrected.md").read_text()
    table = text.split("## Mended by the corrected presets")[1].split("\n## ")[0]
    families = {
        "I-JEPA and StoP": "(ijepa|stop)-vit",
        "DropPos": "droppos-",
        "Beyond Masking": "beyond-",
    }
    for family, names in families.items():
        part = table.split(f"### {family}\n")[1].split("\n### ")[0]
        rows = re.findall(r"\| `--([\w.-]+)` \| `?(\w+)`? \| `?(\w+)`? \|", part)
        assert len(rows) == part.count("\n| ") - 1
        twins = [n for n in PRESETS if re.match(names, n) and f"{n}-corrected" in PRESETS]
        assert twins
        for name in twins:
            pair = PRESETS[name](), PRESETS[f"{name}-corrected"]()
            for flag, *expected in rows:
                assert [str(_setting(config, flag)) for config in pair] == expected
    kinds = [PRESETS[name]() for name in ("demo", "droppos-demo", "mae-demo")]
    for flag in re.findall(r"`--([\w-]+\.[\w.-]+)", text):
        assert any(_setting(config, flag) != "absent" for config in kinds), flag


def test_recipes_of_the_table():
    text = (ROOT / "docs" / "fine-tuning.md").read_text()
    table = text.split("\n## Recipes\n")[1]
    rows = re.findall(r"\| `([\w-]+)` \|.*\| (\d+) \| (\d+) \| ([\d.e-]+) \|", table)
    told = {name: (int(e), int(b), pytest.approx(float(lr))) for name, e, b, lr in rows}
    assert told == {n: (r.epochs, r.batch_size, r.top_lr) for n, r in RECIPES.items()}


def test_flags_of_fine_tuning(capsys):
    with pytest.raises(SystemExit):
        finetune_settings(["--recipe", "droppos-b", "--help"])
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) | {"--recipe"}
    text = (ROOT / "docs" / "fine-tuning.md").read_text()
    assert not set(re.findall(r"--[a-z][\w.-]*", text)) - known
