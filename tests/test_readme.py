"""What the README shows works: its example, its commands' settings, its links."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.report.report import markdown
from benchmarks.report.tables import operations
from stopfast.cli import main
from tests.test_published_yaml import FILES, YAML

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_example():
    example, accelerated = (text for language, text in BLOCKS if language == "python")
    *statements, expression = example.strip().splitlines()
    names: dict = {}
    exec("\n".join(statements), names)
    assert tuple(eval(expression, names)) == (4 * 8, 36, 768)
    names["model"] = names["predictor"]
    exec(accelerated, names)
    assert names["predictor"].ops.name == "auto"


def commands(kind: str) -> list[list[str]]:
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    parts = [shlex.split(part) for line in lines for part in line.split("&&")]
    parts = [part[1:] if "=" in part[0] else part for part in parts]
    return [p[2:] for p in parts if p[0].endswith("stopfast") and p[1] == kind]


@pytest.mark.parametrize("arguments", commands("pretrain"), ids=" ".join)
def test_pretrain_commands_resolve(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "--from-yaml":
        Path(arguments[1]).write_text(YAML.format(**FILES["ijepa-vit-h14"]))
    asked = [a for a in arguments if a != "--dry-run"]
    assert main(["pretrain", *asked, "--dry-run"]) == 0


@pytest.mark.parametrize("kind", ["evaluate", "finetune", "report", "export"])
def test_commands_on_runs_parse(kind, tmp_path, monkeypatch, capsys):
    """They get as far as the run or its images, which are not there."""
    monkeypatch.chdir(tmp_path)
    (arguments,) = commands(kind)
    assert main([kind, *arguments]) == 2
    assert "expected a " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_links():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_table_of_operations():
    """It is the one that the cases and the newest results make: `python -m benchmarks report`."""
    assert markdown(operations()) in README


def test_verify_commands_parse(capsys):
    """The one for a fresh machine runs (in test_verify); that on a run gets as far as the run."""
    fresh, own = commands("verify")
    assert fresh[:2] == ["--config", "demo"]
    assert main(["verify", *own]) == 2
    assert "expected" in capsys.readouterr().err
