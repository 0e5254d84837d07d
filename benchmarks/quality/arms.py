"""What is compared: settings by name. Between two of them, only what is learned differs."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from stopfast.config import Config, ModelConfig, NoiseConfig
from stopfast.presets import PRESETS
from stopfast.presets.decoders import DEGRADATIONS

Study = Literal["objectives", "combinations", "noise", "covariance", "rates"]
Family = Literal["cifar10", "demo"]
Size = Literal["preset", "small"]
PIXELS, UNTRAINED, UNTRAINED_TOKEN = "raw pixels", "untrained", "untrained, class token"
IJEPA, NO_NOISE = "ijepa", "stop without noise"
EPOCHS, WARMUP = 10, 1.0
"""Parts of the budget that schedules count by, whatever the images; presets warm up for a tenth too."""
PASSES = 9.4
"""Steps of a run beside the steps that the target encoder's average reaches back at first, where a run is
too short for the preset's momentum: as in the preset's own run, three epochs of 50,000 images."""
LEVELS = (0.25, 0.5, 1.0, 2.0)
"""Noise beside the preset's, which is to a position's length what 0.25 is in a ViT-B."""
RATES = (0.5, 2.0)
"""Learning rates beside the preset's."""
_SMALL = {"embed_dim": 256, "depth": 6, "num_heads": 4, "predictor_embed_dim": 256}


@dataclass(frozen=True)
class Arm:
    """An encoder that is trained in one way, or not at all."""

    name: str
    objective: str
    """As the presets name it, but for ``stop``, whose preset is called after the images alone."""
    noise: float | None = None
    """StoP's noise beside the preset's; 0 for none in the place of the mask token."""
    fixed: bool = False
    """Add the noise to the position as it is, without a projection."""
    rate: float = 1.0
    """Learning rate beside the preset's."""
    trained: bool = True
    """Whether steps are taken; without, the objective only says which encoder it is."""


class Scale(NamedTuple):
    """What all arms have in common."""

    family: Family
    size: Size
    batch: int
    steps: int


_OBJECTIVES = (
    Arm(PIXELS, IJEPA, trained=False),
    Arm(UNTRAINED, IJEPA, trained=False),
    Arm(UNTRAINED_TOKEN, "mae", trained=False),
    *(Arm(name, name) for name in (IJEPA, "stop", "droppos", "mae")),
    *(Arm(f"beyond-{kind}", f"beyond-{kind}") for kind in DEGRADATIONS),
    Arm("beyond-zoomed-in-mask", "beyond-zoomed-in-mask"),
)
_COMBINED = ("stop-mae", "stop-droppos", "stop-zoomed-in")


def _noise(levels: tuple[float, ...], fixed: bool = False) -> tuple[Arm, ...]:
    suffix = ", fixed covariance" if fixed else ""
    return tuple(Arm(_level(x) + suffix, "stop", noise=x, fixed=fixed) for x in levels)


def _level(noise: float) -> str:
    return "stop" if noise == 1 else f"stop, {noise:g} of its noise"


STUDIES: dict[Study, tuple[Arm, ...]] = {
    "objectives": _OBJECTIVES,
    "combinations": (*_OBJECTIVES, *(Arm(name, name) for name in _COMBINED)),
    "noise": (
        Arm(UNTRAINED, IJEPA, trained=False),
        Arm(IJEPA, IJEPA),
        Arm(NO_NOISE, "stop", noise=0.0),
        *_noise(LEVELS),
    ),
    "covariance": (Arm(IJEPA, IJEPA), *_noise(LEVELS), *_noise(LEVELS, fixed=True)),
    "rates": tuple(
        replace(arm, name=arm.name if rate == 1 else f"{arm.name}, {rate:g} of its rate", rate=rate)
        for arm in _OBJECTIVES
        for rate in ((1.0, *RATES) if arm.trained else (1.0,))
    ),
}
"""Arms by study: the first says what the objectives are worth, the others vary one thing."""
ARMS = {arm.name: arm for arms in STUDIES.values() for arm in arms}


def settings(arm: Arm, scale: Scale, seed: int) -> Config:
    """Return an arm's settings: those of its preset, but for what the scale and the study say."""
    prefix = "" if arm.objective == "stop" else f"{arm.objective}-"
    config = PRESETS[prefix + scale.family]()
    model, before = config.model, config.model.embed_dim
    if scale.size == "small":
        model = replace(model, **_SMALL)
    optim = config.optim
    start = min(optim.ema[0], max(0.0, 1 - PASSES / scale.steps))
    return replace(
        config,
        model=model,
        noise=_scaled(config.noise, arm, before, model),
        data=replace(config.data, batch_size=scale.batch),
        optim=replace(
            optim,
            epochs=EPOCHS,
            warmup=WARMUP,
            lr=optim.lr * arm.rate,
            ema=(start, optim.ema[1]),
        ),
        run=replace(config.run, seed=seed),
    )


def _scaled(noise: NoiseConfig, arm: Arm, before: int, model: ModelConfig) -> NoiseConfig:
    """The arm's noise; projected, it is to a position's length the same at any width of the model."""
    if noise.variant != "stop":
        return noise
    if arm.noise == 0:
        return replace(noise, variant="stop_off")
    deviation = noise.noise_var * (before / model.embed_dim) ** 0.5
    if arm.fixed:
        # A projection of weights of deviation 0.02 shrinks it by 0.02 sqrt(width) at the start.
        deviation *= 0.02 * model.embed_dim**0.5
    level = 1.0 if arm.noise is None else arm.noise
    return replace(noise, noise_var=deviation * level, cov="fixed" if arm.fixed else "learned")
