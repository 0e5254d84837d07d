"""One run: an arm trained from a seed, and what its features are worth."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine.options import Precision
from benchmarks.quality.arms import EPOCHS, PIXELS, Arm, Scale, settings
from benchmarks.quality.pixels import Pixels
from stopfast.build import build_objective, build_step, fastest
from stopfast.config import Config
from stopfast.data.images import Images
from stopfast.data.loader import TrainPlan
from stopfast.evaluation.features import PixelFeatures
from stopfast.evaluation.knn import knn_predict
from stopfast.evaluation.probes import fit_linear
from stopfast.objectives import Objective
from stopfast.step import autocast

_PARTS = 20  # of the loss curve that is kept


@dataclass(frozen=True)
class Budget:
    """What every arm is given."""

    scale: Scale
    precision: Precision
    fast: bool = False

    def __post_init__(self) -> None:
        steps = self.scale.steps
        if steps < EPOCHS or steps % EPOCHS:
            raise ValueError(f"expected steps that {EPOCHS} divides, got {steps}")


@dataclass(frozen=True, eq=False)
class Data:
    """Images to train on, and labelled ones: known to the classifiers, and asked of them."""

    train: Pixels
    known: Pixels
    asked: Pixels

    @classmethod
    def load(
        cls,
        splits: tuple[Images, Images],
        counts: tuple[int, int, int],
        device: torch.device,
        threads: int,
    ) -> "Data":
        """Decode training and test images: at most so many to train on, known (of these) and asked.

        Raises:
            ValueError: photographs of several sizes, or one that cannot be decoded.
        """
        train = Pixels.load(spread(splits[0], counts[0]), device, threads)
        chosen = _places(len(train), counts[1])
        known = Pixels(train.stored[chosen.to(device)], train.labels[chosen])
        return cls(train, known, Pixels.load(spread(splits[1], counts[2]), device, threads))


def spread(images: Images, most: int) -> Images:
    """Return at most so many images, evenly spaced over all: their classes are equally frequent."""
    return images.subset(_places(len(images), most).numpy())


def _places(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def run_arm(
    arm: Arm, seed: int, budget: Budget, data: Data, device: torch.device
) -> dict[str, Any]:
    """Train an arm, and classify by its features, means over the patches of the encoder's normed output.

    ``seed`` decides weights, order and crops of the images, masks and noise, and the linear probe's
    batches. The images and the classifiers' images are the same for all.

    Returns:
        ``knn`` and ``linear``, shares of the test images; ``rate`` that the linear probe chose;
        ``losses``, means of twenty parts of the training; seconds, ``train_s`` and ``evaluate_s``,
        and ``processor_s`` of the processor in both, which other programs do not lengthen.

    Raises:
        FloatingPointError: loss or features that are not finite.
    """
    config = settings(arm, budget.scale, seed)
    step = replace(config.step, precision=budget.precision)
    config = replace(config, step=step)
    if budget.fast:
        config = fastest(config, device)
        config = replace(
            config, step=replace(config.step, compile=False)
        )  # minutes of each arm's run
    begin, processor = time.perf_counter(), time.process_time()
    objective = build_objective(config, budget.scale.steps // EPOCHS)
    train = build_step(config, objective, device)
    steps = budget.scale.steps if arm.trained else 0
    losses = _train(train, data.train, config, objective, steps) if steps else []
    _wait(device)
    middle = time.perf_counter()
    pool = _pixels(config) if arm.name == PIXELS else _encoder(objective, config, device)
    known, asked = (
        _features(pool, pixels.whole(config.data.transforms)) for pixels in (data.known, data.asked)
    )
    probe = fit_linear(known, data.known.labels, seed=seed)
    near = knn_predict(known, data.known.labels, asked)
    return {
        "knn": _share(near, data.asked.labels),
        "linear": _share(probe.predict(asked), data.asked.labels),
        "rate": probe.rate,
        "losses": losses,
        "train_s": middle - begin,
        "evaluate_s": time.perf_counter() - middle,
        "processor_s": time.process_time() - processor,
    }


def _train(
    train: Callable[[Tensor, int], tuple[Tensor, object]],
    pixels: Pixels,
    config: Config,
    objective: Objective,
    steps: int,
) -> list[float]:
    plan = TrainPlan(len(pixels), config.data.batch_size, objective.transforms, config.run.seed)
    losses = [
        train(images, number)[0] for number, images in enumerate(pixels.training(plan, steps), 1)
    ]
    parts = torch.stack(losses).float().tensor_split(min(_PARTS, steps))
    curve = [part.mean().item() for part in parts]
    if not all(map(math.isfinite, curve)):
        raise FloatingPointError(f"expected finite losses, got means of {curve}")
    return curve


def _pixels(config: Config) -> Callable[[Tensor], Tensor]:
    source = PixelFeatures(config.model.patch_size)
    return lambda images: source(images).pooled


def _encoder(
    objective: Objective, config: Config, device: torch.device
) -> Callable[[Tensor], Tensor]:
    def pool(images: Tensor) -> Tensor:
        with autocast(device, config.step.precision):
            return objective.features(images).float().mean(1)

    return pool


@torch.inference_mode()
def _features(pool: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
    """All features fp32 [N, D], on their device.

    Raises:
        FloatingPointError: some that are not finite.
    """
    found = torch.cat([pool(images) for images in batches])
    if not bool(found.isfinite().all()):
        raise FloatingPointError("expected finite features, got others")
    return found


def _share(said: Tensor, true: Tensor) -> float:
    return float(np.mean((said == true).numpy()))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
