"""The command line from end to end: train, stop, go on, evaluate, and refuse what cannot work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from stopfast.checkpoint import load_checkpoint, newest_checkpoint
from stopfast.cli import main
from stopfast.config import Config, from_document, to_document
from stopfast.data.digits import digits_folder
from stopfast.data.images import Images
from stopfast.env import dali_problem
from stopfast.step import TrainStep

pytestmark = pytest.mark.skipif(dali_problem() is not None, reason="NVIDIA DALI is not installed")

SMALL = ["--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"]
SMALL += ["--model.predictor-embed-dim", "16", "--model.predictor-depth", "1"]
AUGMENTED = ["--data.transforms.flip", "0.5", "--data.transforms.gray", "0.2"]
AUGMENTED += ["--data.transforms.blur", "0.5"]
SHORT = [*SMALL, "--optim.epochs", "1", "--optim.warmup", "0.5", "--run.log-every", "5"]
SHORT += ["--monitor.every", "0"]


@pytest.fixture
def workplace(tmp_path, monkeypatch, tmp_path_factory) -> Path:
    """An empty folder to run in; the digits are written once for all tests."""
    shared = tmp_path_factory.getbasetemp() / "digits"
    digits_folder(shared)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(shared)
    monkeypatch.chdir(tmp_path)
    # Verdicts on these images are nobody else's.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
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
        status = main(["pretrain", "demo", "--run.output", "runs/parts", *SHORT])
        assert status == 128 + number
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


@pytest.mark.parametrize("loader", ["dali", "pil"])
def test_killed_run_goes_on_from_its_last_checkpoint(loader, workplace):
    """SIGKILL at step 16, in a process of its own; checkpoints every 5 steps, of which two are kept.

    The losses of all steps and the final weights are bit by bit those of the run that nobody killed.
    """
    arguments = ["pretrain", "demo", *SHORT, *AUGMENTED, "--data.loader", loader]
    arguments += ["--monitor.every", "5"]  # a look falls on the step of the last checkpoint
    killed = [*arguments, "--run.checkpoint-every", "5", "--run.log-every", "1"]
    done = subprocess.run([sys.executable, "-c", KILLED, *killed], check=False)
    assert done.returncode == -signal.SIGKILL
    checkpoints = sorted(p.name for p in Path("runs/demo").glob("step-*"))
    assert checkpoints == ["step-0000010", "step-0000015"]
    assert main([*killed, "--run.resume"]) == 0
    assert main([*arguments, "--run.output", "runs/whole"]) == 0
    whole, parts = final_state("runs/whole"), final_state("runs/demo")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert losses("runs/demo") == losses("runs/whole") and len(losses("runs/whole")) == 19
    looks = [(Path(run) / "monitors.csv").read_text() for run in ("runs/demo", "runs/whole")]
    assert looks[0] == looks[1] and looks[0].count("\n") == 6


def losses(run: str) -> list[tuple[int, float]]:
    rows = map(json.loads, (Path(run) / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_resume_refuses_other_data(workplace, monkeypatch, capsys):
    """Another list of images behind the same settings; the same one elsewhere is no other."""
    arguments = ["pretrain", "cifar10", *SHORT, "--run.output", "runs/one", "--data.root"]
    for place in ("first", "second"):
        shutil.copytree(workplace / "runs" / "digits" / "train", workplace / place)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        main([*arguments, "first"])
    next((workplace / "first" / "3").iterdir()).unlink()
    capsys.readouterr()
    assert main([*arguments, "first", "--run.resume"]) == 2
    assert "got another images: 1257 instead of 1258" in capsys.readouterr().err
    image = next((workplace / "first" / "4").iterdir())
    shutil.copy(image, workplace / "first" / "3" / "extra.jpg")
    assert main([*arguments, "first", "--run.resume"]) == 2
    assert "got another fingerprint" in capsys.readouterr().err
    assert main([*arguments, "second", "--run.resume"]) == 0


def test_too_few_images(workplace, capsys):
    assert main(["pretrain", "demo", "--data.batch-size", "5000"]) == 2
    assert "at least one batch of 5000" in capsys.readouterr().err
    assert not Path("runs/demo").exists()


def test_one_broken_image(workplace, capsys):
    """It is named before anything is trained, and may be left out."""
    shutil.copytree(workplace / "runs" / "digits" / "train", workplace / "images")
    cut = next((workplace / "images" / "3").iterdir())
    cut.write_bytes(cut.read_bytes()[:-200])
    arguments = ["pretrain", "cifar10", *SHORT, "--data.root", "images", "--run.output", "runs/one"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"3/{cut.name}" in error and "--data.broken skip" in error
    assert not Path("runs/one").exists()
    labelled = ["--monitor.every", "7", "--monitor.labelled", "both"]
    Path("both").mkdir()
    for split in ("train", "test"):
        (Path("both") / split).symlink_to(workplace / "images")
    assert main([*arguments, *labelled, "--data.broken", "skip"]) == 0
    out = capsys.readouterr().out
    assert f"3/{cut.name}" in out and "1,257 images" in out


def test_slow_reader_is_told(workplace, monkeypatch, capsys):
    read = Images.read

    def slow(self: Images, sample: int) -> bytes:
        time.sleep(0.01)
        return read(self, sample)

    def waiting() -> list[int]:
        asked = ["--data.batch-size", "128", "--run.log-every", "3"]
        asked += ["--run.output", f"runs/{time.time_ns()}"]
        assert main(["pretrain", "demo", *SHORT, *asked]) == 0
        found = re.findall(r"(\d+) % waiting for data, (\d+) % computing", capsys.readouterr().out)
        assert all(int(a) + int(b) == 100 for a, b in found)
        return [int(a) for a, _ in found[1:]]  # the first stretch has the loader's beginning in it

    usual = waiting()
    monkeypatch.setattr(Images, "read", slow)
    assert min(waiting()) > 60 > max(usual)


def test_compiled_run_is_the_eager_one(workplace):
    """Fifty steps on decoded images under torch.compile, against the eager loop."""
    arguments = ["pretrain", "demo", *SMALL, "--optim.epochs", "3", "--optim.warmup", "0.5"]
    arguments += ["--monitor.every", "0"]
    assert main([*arguments, "--run.output", "runs/eager"]) == 0
    assert main([*arguments, "--run.output", "runs/compiled", "--step.compile"]) == 0
    eager, compiled = losses("runs/eager"), losses("runs/compiled")
    assert len(eager) == 57 and eager != compiled
    assert [b for _, b in compiled] == pytest.approx([a for _, a in eager], rel=1e-4)


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
    assert (
        len(
            re.findall(
                r"loss \d\.\d+, lr .*, \d+ images/s, \d+ % waiting for data, \d+ % computing, ", out
            )
        )
        == 4
    )
    path = newest_checkpoint(Path("runs/demo"))
    _, documents = load_checkpoint(path)
    config = from_document(Config, documents["config"])
    assert config.model.embed_dim == 32 and to_document(config) == documents["config"]
    asked = ["--data", "runs/digits", "--probes", "knn", "--save", "result.json"]
    assert main(["evaluate", "runs/demo", *asked]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("result.json").read_text())
    assert result["figures"]["raw pixels"]["knn"]["value"] > 0.85 and "paired differences" in out
    assert result["test_images"] == 539 and len(result["figures"]) == 3
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
    assert not list(Path("runs").glob("demo/step-*"))


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("stopfast.step.TrainStep.__call__", None),  # may have cut an update in two
        ("stopfast.monitors.Monitors.look", 7),
        ("stopfast.train.train_batches", None),
        ("stopfast.train.memory_in_use", 5),
        ("stopfast.train.save_run", None),  # nothing could be saved; the next run begins anew
    ],
)
@pytest.mark.parametrize("failure", [OSError, RuntimeError])
def test_failure(where, steps, failure, workplace, monkeypatch, capsys):
    """What fails between two steps leaves a checkpoint of those done, under their number."""
    arguments = ["pretrain", "demo", *SHORT, "--monitor.every", "7", "--data.loader", "pil"]

    def fail(*_, warn=True, **__):
        if warn:  # the look that comes before the first step does not
            raise failure("disk on fire")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        assert main(arguments) == 2
    assert "disk on fire" in capsys.readouterr().err
    names = [p.name for p in Path("runs").glob("demo/step-*")]
    assert names == ([] if steps is None else [f"step-{steps:07d}"])
    if steps == 7:
        assert main([*arguments, "--run.resume"]) == 0
        looks = (Path("runs/demo") / "monitors.csv").read_text().splitlines()[1:]
        assert [line.partition(",")[0] for line in looks] == ["0", "7", "14", "19"]
        assert main([*arguments, "--run.output", "runs/whole"]) == 0
        whole, parts = final_state("runs/whole"), final_state("runs/demo")
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
        assert losses("runs/demo") == losses("runs/whole")


def test_failing_logger_costs_no_run(workplace, monkeypatch):
    class Failing:
        def write(self, step, row):
            raise RuntimeError("no network")

        def close(self):
            raise RuntimeError("no network")

    monkeypatch.setattr("stopfast.train.open_sinks", lambda *_: [Failing()])
    with pytest.warns(RuntimeWarning, match="Failing fails.*no network") as told:
        assert main(["pretrain", "demo", *SHORT]) == 0
    assert len([w for w in told if "no network" in str(w.message)]) == 1
    assert newest_checkpoint(Path("runs/demo")).name == "step-0000019"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_fused_on_a_cpu_is_refused_before_anything_is_written(workplace):
    command = [sys.executable, "-m", "stopfast.cli", "pretrain", "demo", "--step.ops", "fused"]
    free = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, check=False, env=free, capture_output=True, text=True)
    assert done.returncode == 2 and "--step.ops fused cannot run on cpu" in done.stderr
    assert not Path("runs/demo").exists()


def test_one_process_a_run(workplace, capsys):
    Path("runs/demo").mkdir()
    with FileLock(Path("runs/demo/.lock")):
        assert main(["pretrain", "demo", *SHORT]) == 2
    assert "another process trains" in capsys.readouterr().err
    assert main(["pretrain", "demo", *SHORT, "--run.resume"]) == 0
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "flag", "value"),
    [
        ("demo", "objective.mask.npred", 3),
        ("stop-vit-b16", "objective.degrade.margin", 16),
        ("droppos-vit-b16", "objective.sigma", 0.5),
        ("beyond-zoomed-in-corrected", "objective.degrade.edge-weight", 0.5),
    ],
)
def test_dry_run_prints_the_settings(preset, flag, value, workplace, capsys):
    assert main(["pretrain", preset, "--dry-run", f"--{flag}", str(value)]) == 0
    document = found = json.loads(capsys.readouterr().out)
    for name in flag.replace("-", "_").split("."):
        found = found[name]
    assert found == value and from_document(Config, document).preset == preset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "cifar10"], "--data.root"),
        (["pretrain", "cifar10", "--data.root", "absent"], "absent, which is not there"),
        (["pretrain", "demo", "--optim.epochs", "0"], "epochs"),
        (["pretrain", "demo", "--step.accumulate", "3"], "accumulate=3"),
        (["pretrain", "demo", "--objective.mask.min-keep", "60"], "min_keep=60"),
        (["pretrain", "demo", "--model.patch-size", "5"], "patch size 5"),
        (["pretrain", "demo", "--model.depth", "0"], "depth"),
        (["pretrain", "demo", "--objective.target-blocks", "9"], "target_blocks"),
        (["pretrain", "demo", "--run.device", "cuda"], "CUDA"),
        (["pretrain", "demo", "--model.colour", "blue"], "colour"),
        (["pretrain", "demo", "--preset", "cifar10"], "preset"),
        (["pretrain", "cifar"], "is it 'cifar10'?"),
        (["predict"], "usage"),
        ([], "usage"),
    ],
)
def test_requests_that_cannot_work(arguments, message, workplace, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (workplace / "runs" / "digits").unlink()
    before = set(workplace.rglob("*"))
    try:
        status = main(arguments)
    except SystemExit as exit_:  # the parser's own
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert set(workplace.rglob("*")) == before
