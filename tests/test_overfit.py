"""One batch, drawn for once, is learned by heart: I-JEPA, StoP, and what is combined with them.

The decoders' own tasks are in test_reconstruction.py. A teacher stays as it is: what one follows falls of
itself. With noise drawn anew no loss would reach 0, since StoP's queries would say where only roughly.
"""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from stopfast.config import NoiseConfig
from stopfast.objectives import Objective
from stopfast.optim import UpdateRule
from stopfast.step import TrainStep
from tests import small_droppos, small_reconstruction, test_combinations, test_objective

RATES: dict[str, Any] = {"lr": lambda step: 6e-3, "weight_decay": lambda step: 0.04}
STILL: dict[str, Any] = {"momentum": lambda step: 1.0}
CONTRAST = 3
"""By which a new teacher's features are those of images, and hardly to be guessed from positions alone."""
Task = tuple[Objective[Any], Tensor]


def jepa(noise: dict[str, Any]) -> Task:
    objective = test_objective.build(noise=noise, lr=RATES["lr"], **STILL)
    return objective, CONTRAST * test_objective.images()


def stop_degraded(kind: str) -> Task:
    objective = test_combinations.degraded_jepa(kind)
    objective.update = UpdateRule(**RATES, **STILL)
    return objective, CONTRAST * test_combinations.images_of(objective)


def stop_mae() -> Task:
    settings: dict[str, Any] = {"mask_ratio": 0.75, "widths": (64, 64), "update": RATES}
    objective = small_reconstruction.build(noise={"apply_stop": True}, **settings)
    return objective, small_reconstruction.batch_of(objective)


def stop_droppos() -> Task:
    noise = NoiseConfig(variant="stop")
    objective = small_droppos.build(noise=noise, sigma=0.0, update=RATES)  # smoothed labels cost
    return objective, small_droppos.images()


TASKS: dict[str, Callable[[], Task]] = {
    "ijepa": lambda: jepa({}),
    "stop": lambda: jepa({"apply_stop": True}),
    "stop-blurred": lambda: stop_degraded("blurred"),
    "stop-mae": stop_mae,
    "stop-droppos": stop_droppos,
}


@pytest.mark.parametrize("task", TASKS)
def test_one_batch_is_learned(task: str):
    """I-JEPA and StoP to 0.07 of the first loss: what 15 of 32 directions leave, for a predictor of
    width 16 whose output is layer-normed has no more. The others to below 0.01.
    """
    objective, images = TASKS[task]()
    draws = objective.draws(1, 2, slice(0, 2))
    objective.draws = lambda *_: draws  # type: ignore[method-assign]
    step = TrainStep(objective)
    losses = [step(images[:2], number).loss for number in range(1, 301)]
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])
