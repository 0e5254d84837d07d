"""What a trained encoder is worth: kNN and linear accuracy, beside an untrained one and raw pixels."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from stopfast.build import build_encoder, choose_device, seeded
from stopfast.checkpoint import load_checkpoint, load_weights, newest_checkpoint
from stopfast.config import Config, from_document
from stopfast.data.folder import ImageFolder, scan_folder, split_folder
from stopfast.data.loader import eval_batches
from stopfast.encoder import VisionTransformer

Which = Literal["target_encoder", "encoder"]
_UNTRAINED, _PIXELS = "untrained", "raw pixels"
_PIXEL_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Test accuracies of each representation under each classifier."""

    checkpoint: str
    which: Which
    train_images: int
    test_images: int
    accuracy: dict[str, dict[str, float]]
    """By representation, then by classifier."""
    gain: dict[str, tuple[float, float, float]]
    """By classifier: the trained encoder's accuracy less the untrained one's, and the ends of a paired
    95 % interval over the test images."""


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path,
    *,
    which: Which = "target_encoder",
    device: str = "auto",
    batch_size: int = 256,
    threads: int = 2,
) -> Evaluation:
    """Classify ``data``'s test images from features of its training images.

    A feature is the mean over patches of the encoder's normed output. kNN takes the 20 nearest by cosine,
    weighted by closeness; linear is a logistic regression on standardised features. Raw pixels are those
    of the image, averaged down to 32 a side where there are more.

    Raises:
        ValueError: a checkpoint or a folder that cannot be used.
    """
    tensors, documents = load_checkpoint(newest_checkpoint(checkpoint))
    config = from_document(Config, documents["config"])
    train, test = (
        scan_folder(split_folder(data, *names)) for names in (("train",), ("test", "val"))
    )
    if train.files == test.files:
        raise ValueError(
            f"expected {data} with train/ and test/ (or val/) folders, found one set of images"
        )
    if train.classes != test.classes or len(train.classes) < 2:
        raise ValueError(
            f"expected the same classes, at least two, in both splits of {data}, "
            f"got {train.classes} and {test.classes}"
        )
    where = choose_device(device)
    with seeded(config.run.seed):
        untrained = build_encoder(config)  # the weights that the run began with
    trained = build_encoder(config)
    prefix = f"{which}."
    weights = {
        k.removeprefix(prefix): v for k, v in tensors["model"].items() if k.startswith(prefix)
    }
    load_weights(trained, weights, f"{checkpoint}, {which}")
    encoders = {which: trained.to(where).eval(), _UNTRAINED: untrained.to(where).eval()}

    features: dict[str, list[np.ndarray]] = {name: [] for name in (*encoders, _PIXELS)}
    for folder in (train, test):
        found = _features(encoders, folder, config, where, batch_size, threads)
        for name, values in found.items():
            features[name].append(values)
    labels, truth = np.array(train.labels), np.array(test.labels)
    correct: dict[str, dict[str, np.ndarray]] = {}
    for name, (known, asked) in features.items():
        correct[name] = {}
        for kind, classifier in _CLASSIFIERS.items():
            correct[name][kind] = classifier().fit(known, labels).predict(asked) == truth
    return Evaluation(
        checkpoint=str(checkpoint),
        which=which,
        train_images=len(train),
        test_images=len(test),
        accuracy={n: {k: float(c.mean()) for k, c in by.items()} for n, by in correct.items()},
        gain={k: paired_interval(correct[which][k], correct[_UNTRAINED][k]) for k in _CLASSIFIERS},
    )


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean difference of two paired results, and the ends of its normal 95 % interval."""
    difference = first.astype(np.float64) - second
    mean = float(difference.mean())
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return mean, mean - half, mean + half


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the accuracies, and whether training gained anything."""
    table = Table(
        title=f"{evaluation.train_images:,} training images, {evaluation.test_images:,} test images"
    )
    table.add_column("features")
    for kind in _CLASSIFIERS:
        table.add_column(kind, justify="right")
    for name, by in evaluation.accuracy.items():
        table.add_row(name, *(f"{100 * by[kind]:.1f} %" for kind in _CLASSIFIERS))
    console.print(table)
    for kind, (mean, low, high) in evaluation.gain.items():
        console.print(
            f"{kind}: trained less untrained {100 * mean:+.1f} points, "
            f"paired 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
        )


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(vars(evaluation), indent=2))


def _knn() -> Pipeline:
    def closeness(distance: np.ndarray) -> np.ndarray:
        return np.exp(-distance / 0.07)

    nearest: Any = KNeighborsClassifier
    return make_pipeline(nearest(20, metric="cosine", weights=closeness))


def _linear() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-3, max_iter=1000))


_CLASSIFIERS: dict[str, Callable[[], Pipeline]] = {"kNN": _knn, "linear": _linear}


@torch.inference_mode()
def _features(
    encoders: dict[str, VisionTransformer],
    folder: ImageFolder,
    config: Config,
    device: torch.device,
    batch_size: int,
    threads: int,
) -> dict[str, np.ndarray]:
    """Return fp32 [images, width] of each encoder, and the pixels."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*encoders, _PIXELS)}
    batches = eval_batches(
        folder, config.data.transforms, batch_size=batch_size, device=device, threads=threads
    )
    for batch in batches:
        for name, encoder in encoders.items():
            rows[name].append(encoder(batch.images).mean(1).float().cpu())
        # Large photographs would make more columns than a logistic regression can take.
        height, width = (min(_PIXEL_SIDE, side) for side in batch.images.shape[2:])
        rows[_PIXELS].append(adaptive_avg_pool2d(batch.images, (height, width)).flatten(1).cpu())
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}
