"""Losses of the published program and of stopfast, step by step: `python -m benchmarks curves`.

Same weights, images, masks and noise. In fp32 the two stay together for many steps; sooner or later AdamW
makes the rounding of small gradients visible, as it does between two runs of one program on two
machines. The target encoder begins as the encoder's copy, as in training.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

from benchmarks.engine.options import Cell, Options
from benchmarks.engine.results import FOLDER, all_results
from benchmarks.engine.runner import Bench
from benchmarks.engine.runner import run as measure
from benchmarks.step.arms import ARMS, OURS, PUBLISHED
from benchmarks.step.workload import MODELS, Precision, Workload, build_workload
from stopfast.config import DataConfig
from stopfast.data.digits import digits_folder
from stopfast.data.images import open_images, split_folder
from stopfast.data.loader import TrainPlan, train_batches


@dataclass(frozen=True, kw_only=True)
class CurveOptions(Options):
    """Losses of the published program and of stopfast, step by step."""

    root: Path | None = None
    """Folder or tar of images, or a folder with ``train/`` of that kind; by default handwritten digits."""
    steps: int = 200
    masks: Path | None = None
    """File of masks to replay; see ``python -m benchmarks step --help``."""

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if set(self.model) - set(MODELS):
            raise ValueError(f"expected models of {list(MODELS)}, got {list(self.model)}")
        if self.precision == "fp16" or self.steps < 1:
            raise ValueError(f"expected fp32 or bf16 and steps > 0, got {self}")


OPTIONS = CurveOptions


def plan(options: CurveOptions) -> Iterator[Cell]:
    """The published program's curve for each model and batch, and then the others'."""
    gpu = options.place.type == "cuda"
    for model in options.model or (("vit-b16",) if gpu else ("toy",)):
        for images in options.images or ((64,) if gpu else (8,)):
            problem: dict[str, str | int] = {"model": model, "images": images}
            problem |= {"precision": options.dtype, "steps": options.steps}
            wanted = ARMS if options.arm else (PUBLISHED, OURS)
            yield from (Cell("curves", arm, problem) for arm in wanted)


def _workload(cell: Cell, options: CurveOptions) -> Workload:
    precision: Precision = "bf16" if options.dtype == "bf16" else "fp32"
    model, images = str(cell.problem["model"]), int(cell.problem["images"])
    workload = build_workload(
        model, images, precision, options.place, steps=options.steps, masks=options.masks
    )
    weights = {**workload.weights, "target_encoder": workload.weights["encoder"]}
    return replace(workload, weights=weights)


def _batches(workload: Workload, options: CurveOptions) -> Generator[Tensor, None, None]:
    root = options.root or digits_folder(user_cache_path("stopfast") / "benchmarks" / "digits")
    images = open_images(split_folder(root, "train"))
    transforms = workload.config.data.transforms
    plan = TrainPlan(len(images), workload.images, transforms, workload.seed)
    data = DataConfig(root=root, batch_size=workload.images, loader="pil", transforms=transforms)
    batches = train_batches(
        images, plan, first_step=1, last_step=options.steps, device=workload.device, data=data
    )
    with closing(batches):
        for batch in batches:
            yield batch.images


def test_curves(cell: Cell, bench: Bench) -> None:
    """The loss of every step, and how far it is from the published program's."""
    options = bench.options
    assert isinstance(options, CurveOptions)
    workload = bench.shared(lambda: _workload(cell, options))
    arm = ARMS[cell.arm](workload)
    losses: list[Tensor] = []
    with closing(_batches(workload, options)) as batches:

        def step() -> None:
            workload.pixels.copy_(next(batches))  # every arm reads its images there
            number = len(losses) + 1
            losses.append(arm.step(number, workload.noise_of(number)).clone())

        bench.benchmark.pedantic(step, rounds=options.steps)
    arm.close()
    curve = torch.stack(losses).double().cpu()
    bench.info["losses"] = curve.tolist()
    bench.info["images_from"] = "digits" if options.root is None else options.root.name
    for row in bench.recorder.results.rows(kind="curves", arm=PUBLISHED, **cell.problem):
        apart = (curve / curve.new_tensor(row["extra_info"]["losses"]) - 1).abs()
        bench.info["largest_distance"] = apart.max().item()
        bench.info["median_distance"] = apart.median().item()


def run(options: CurveOptions) -> int:
    """Take the curves and print how far they are apart; the exit status. The report draws them."""
    status = measure("curves.py", options)
    chosen = options.results or FOLDER
    folder = chosen.parent.parent if chosen.suffix == ".json" else chosen
    for results in all_results(folder)[-1:]:
        for row in results.rows(kind="curves"):
            info = row["extra_info"]
            if "largest_distance" in info:
                print(
                    f"{info['key']}: largest relative distance from {PUBLISHED} "
                    f"{info['largest_distance']:.1e}, median {info['median_distance']:.1e}"
                )
    return status
