"""The arms of the loader benchmark: the same photographs, batches and kind of masks from each.

Every arm is endless, decodes ahead, and hands over its batches where the step takes them, masks
included, since a published loader's workers draw these too.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Literal

import torch

from benchmarks.engine.refusals import NotHere
from benchmarks.loaders.feeds import ENDLESS, Batches, Fed, Feed, moved
from benchmarks.loaders.workers import worker_batches
from stopfast.config import DataConfig
from stopfast.data.batch import Batch
from stopfast.data.loader import train_batches
from stopfast.env import dali_problem
from stopfast.masking import MultiBlockMasks

_CPU = torch.device("cpu")


def stopfast_batches(
    feed: Feed,
    loader: Literal["dali", "pil"],
    *,
    decode_on: Literal["cpu", "cuda"] = "cpu",
    hardware_share: float = 0.0,
    masks_on: Literal["cpu", "cuda"] = "cpu",
) -> Batches:
    """Return the endless batches that ``stopfast pretrain`` trains on, and masks drawn as its step does.

    Args:
        feed: what is asked for.
        loader: what decodes.
        decode_on: where DALI does.
        hardware_share: share of the images that a GPU's JPEG hardware decodes.
        masks_on: where the masks are drawn: by numpy and torch, or by the fused operation.

    Raises:
        NotHere: DALI is missing, or the step's device is no GPU.
    """
    if loader == "dali" and (problem := dali_problem()) is not None:
        raise NotHere(problem)
    if feed.device.type == "cpu" and "cuda" in (decode_on, masks_on):
        raise NotHere("it needs a GPU")
    rules = feed.rules._asdict()
    masks = MultiBlockMasks(
        (rules.pop("height"), rules.pop("width")),
        seed=feed.seed,
        ops="fused" if masks_on == "cuda" else "eager",
        **rules,
    )
    source = train_batches(
        feed.images,
        feed.plan(),
        first_step=1,
        last_step=ENDLESS,
        # PIL's arrays go to the step's device as they are and are normalised there.
        device=_CPU if loader == "dali" and decode_on == "cpu" else feed.device,
        data=DataConfig(loader=loader, threads=max(1, feed.workers), hardware_share=hardware_share),
    )

    def fed(step: int, batch: Batch) -> Fed:
        drawn = masks(feed.batch_size, step, device=feed.device if masks_on == "cuda" else _CPU)
        context, target = ([moved(m, feed.device) for m in group] for group in drawn[:2])
        return Fed(moved(batch.images, feed.device), batch.samples, context, target)

    def batches() -> Batches:
        with closing(source):
            for step, batch in enumerate(source):
                yield fed(step, batch)

    return batches()


_MIXED = {"loader": "dali", "decode_on": "cuda", "masks_on": "cuda"}

LOADERS: dict[str, Callable[[Feed], Batches]] = {
    "dali-gpu-0.65": partial(stopfast_batches, **_MIXED, hardware_share=0.65),
    "dali-gpu-0.9": partial(stopfast_batches, **_MIXED, hardware_share=0.9),
    "dali-gpu-0": partial(stopfast_batches, **_MIXED, hardware_share=0.0),
    "dali-gpu-0.65-host-masks": partial(
        stopfast_batches, **{**_MIXED, "masks_on": "cpu"}, hardware_share=0.65
    ),
    "dali-cpu": partial(stopfast_batches, loader="dali"),
    "pil": partial(stopfast_batches, loader="pil"),
    "torchvision": partial(worker_batches, kind="torchvision"),
    "published": partial(worker_batches, kind="published"),
}
"""What begins each arm. Those called dali and pil are stopfast's own; ``published`` is what the published
programs do, ``torchvision`` what one would assemble today."""
