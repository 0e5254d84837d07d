"""The command line from end to end: train, stop, go on, evaluate, and refuse what cannot work."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stopfast.checkpoint import load_checkpoint, newest_checkpoint
from stopfast.cli import main
from stopfast.config import Config, from_document, to_document
from stopfast.data.digits import digits_folder
from stopfast.env import dali_problem
from stopfast.evaluate import paired_interval
from stopfast.presets import PRESETS
from stopfast.step import TrainStep

pytestmark = pytest.mark.skipif(dali_problem() is not None, reason="NVIDIA DALI is not installed")

SMALL = ["--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"]
SMALL += ["--model.predictor-embed-dim", "16", "--model.predictor-depth", "1"]
SHORT = [*SMALL, "--optim.epochs", "1", "--optim.warmup", "0.5", "--run.log-every", "5"]


@pytest.fixture
def workplace(tmp_path, monkeypatch, tmp_path_factory) -> Path:
    """An empty folder to run in; the digits are written once for all tests."""
    shared = tmp_path_factory.getbasetemp() / "digits"
    digits_folder(shared)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(shared)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_at(monkeypatch, number: int, action) -> None:
    """Do something in the middle of a step."""
    whole = TrainStep.__call__

    def stopped(self: TrainStep, images: torch.Tensor, step: int):
        if step == number:
            action()
        return whole(self, images, step)

    monkeypatch.setattr(TrainStep, "__call__", stopped)


def final_state(run: str) -> dict[str, torch.Tensor]:
    tensors, documents = load_checkpoint(newest_checkpoint(Path(run)))
    assert documents["state"]["step"] == 19
    return {
        f"{file}/{name}": value for file, held in tensors.items() for name, value in held.items()
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_run_is_the_whole_run(number, workplace, monkeypatch, capsys):
    """Bit by bit: weights, average and optimiser. The stop comes in the middle of step 7."""
    assert main(["pretrain", "demo", "--run.output", "runs/whole", *SHORT]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: signal.raise_signal(number))
        assert main(["pretrain", "demo", "--run.output", "runs/parts", *SHORT]) == 0
    assert newest_checkpoint(Path("runs/parts")).name == "step-0000007"
    assert number.name in capsys.readouterr().out
    assert main(["pretrain", "demo", "--run.output", "runs/parts", *SHORT]) == 2
    assert "--run.resume" in capsys.readouterr().err
    resumed = ["--run.output", "runs/parts", "--run.resume", "--data.threads", "1"]
    assert main(["pretrain", "demo", *SHORT, *resumed]) == 0
    whole, parts = final_state("runs/whole"), final_state("runs/parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert main(["pretrain", "demo", "--run.output", "runs/whole", *SHORT]) == 0
    assert "finished before" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from stopfast.cli import main
from stopfast.step import TrainStep
whole = TrainStep.__call__
def killed(self, images, step):
    if step == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, images, step)
TrainStep.__call__ = killed
main(sys.argv[1:])
"""


def test_killed_run_goes_on_from_its_last_checkpoint(workplace):
    """SIGKILL at step 16, in a process of its own; checkpoints every 5 steps, of which two are kept."""
    arguments = ["pretrain", "demo", *SHORT, "--run.checkpoint-every", "5"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in Path("runs/demo").iterdir()) == ["step-0000010", "step-0000015"]
    assert main([*arguments, "--run.resume"]) == 0
    assert main(["pretrain", "demo", "--run.output", "runs/whole", *SHORT]) == 0
    whole, parts = final_state("runs/whole"), final_state("runs/demo")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_resume_refuses_other_settings(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        main(["pretrain", "demo", *SHORT])
    assert main(["pretrain", "demo", *SHORT, "--run.resume", "--optim.lr", "0.5"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_lines_and_checkpoint(workplace, capsys):
    """Loss, speed and waiting are printed; settings come back from the checkpoint; evaluation runs."""
    assert main(["pretrain", "demo", *SHORT]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"loss \d\.\d+, lr .*, \d+ images/s, \d+ % waiting for data", out)) == 4
    path = newest_checkpoint(Path("runs/demo"))
    _, documents = load_checkpoint(path)
    config = from_document(Config, documents["config"])
    assert config.model.embed_dim == 32 and to_document(config) == documents["config"]
    assert main(["evaluate", "runs/demo", "--data", "runs/digits", "--save", "result.json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("result.json").read_text())
    assert set(result["accuracy"]) == {"target_encoder", "untrained", "raw pixels"}
    assert result["accuracy"]["raw pixels"]["linear"] > 0.85 and "paired 95 % interval" in out
    assert result["test_images"] == 539
    for bad, message in (
        (["runs/absent"], "checkpoint"),
        ([str(path), "--data", "runs"], "one set of images|found none"),
    ):
        arguments = bad if "--data" in bad else [*bad, "--data", "runs/digits"]
        assert main(["evaluate", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_lost_loss_leaves_no_checkpoint(workplace, capsys):
    assert main(["pretrain", "demo", *SHORT, "--optim.lr", "1e30", "--optim.start-lr", "1e30"]) == 2
    assert "the loss is nan" in capsys.readouterr().err
    assert not list(Path("runs").glob("demo*"))


@pytest.mark.parametrize(("failure", "kept"), [(OSError, True), (RuntimeError, False)])
def test_failure(failure, kept, workplace, monkeypatch, capsys):
    """Unreadable data leave a checkpoint of what was done; what may have cut an update in two, none."""

    def fail() -> None:
        raise failure("disk on fire")

    stop_at(monkeypatch, 6, fail)
    assert main(["pretrain", "demo", *SHORT]) == 2
    assert "disk on fire" in capsys.readouterr().err
    assert [p.name for p in Path("runs").glob("demo/*")] == ["step-0000005"] * kept


@pytest.mark.parametrize("preset", list(PRESETS))
def test_dry_run_prints_the_settings(preset, workplace, capsys):
    assert main(["pretrain", preset, "--run.dry-run", "--mask.npred", "3"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["mask"]["npred"] == 3 and from_document(Config, document).preset == preset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "cifar10"], "--data.root"),
        (["pretrain", "cifar10", "--data.root", "absent"], "not a folder"),
        (["pretrain", "demo", "--data.batch-size", "5000"], "at least one batch of 5000"),
        (["pretrain", "demo", "--optim.epochs", "0"], "epochs"),
        (["pretrain", "demo", "--step.accumulate", "3"], "accumulate=3"),
        (["pretrain", "demo", "--mask.min-keep", "60"], "min_keep=60"),
        (["pretrain", "demo", "--model.patch-size", "5"], "patch size 5"),
        (["pretrain", "demo", "--model.depth", "0"], "depth"),
        (["pretrain", "demo", "--model.target-blocks", "9"], "target_blocks"),
        (["pretrain", "demo", "--run.device", "cuda"], "CUDA"),
        (["pretrain", "demo", "--model.colour", "blue"], "colour"),
        (["pretrain", "demo", "--preset", "cifar10"], "preset"),
        (["pretrain", "absent"], "absent"),
        (["predict"], "usage"),
        ([], "usage"),
    ],
)
def test_requests_that_cannot_work(arguments, message, workplace, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = set(workplace.rglob("*"))
    try:
        status = main(arguments)
    except SystemExit as exit_:  # the parser's own
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert set(workplace.rglob("*")) == before


def test_paired_interval():
    first = torch.tensor([1, 1, 1, 0] * 100).bool().numpy()
    second = torch.tensor([1, 0, 1, 1] * 100).bool().numpy()
    mean, low, high = paired_interval(first, second)
    assert mean == 0 and high == -low == pytest.approx(1.96 * 0.5**0.5 / 20, rel=0.01)
