"""What the README shows works: its example, its commands' settings, its links."""

import re
import shlex
from pathlib import Path

import pytest

from stopfast.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_example():
    (example,) = (text for language, text in BLOCKS if language == "python")
    *statements, expression = example.strip().splitlines()
    names: dict = {}
    exec("\n".join(statements), names)
    assert tuple(eval(expression, names)) == (4 * 8, 36, 768)


def commands(kind: str) -> list[list[str]]:
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    parts = [shlex.split(part) for line in lines for part in line.split("&&")]
    return [p[2:] for p in parts if p[0].endswith("stopfast") and p[1] == kind]


@pytest.mark.parametrize("arguments", commands("pretrain"))
def test_pretrain_commands_resolve(arguments, capsys):
    assert main(["pretrain", *arguments, "--run.dry-run"]) == 0


def test_evaluate_commands_parse(capsys):
    """They get as far as the checkpoint, which is not there."""
    assert len(commands("evaluate")) == 2
    for arguments in commands("evaluate"):
        assert main(["evaluate", "absent", *arguments[1:]]) == 2
        assert "expected a checkpoint" in capsys.readouterr().err


def test_links():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
