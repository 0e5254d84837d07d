"""Presets: functions that return settings, by the names of the command line.

The published recipes keep the published quirks; a twin whose name ends in ``-corrected`` mends them, see
:func:`corrected`. Small forms for a CPU end in ``cifar10`` and ``demo``.
"""

from collections.abc import Callable
from dataclasses import replace

from stopfast.config import Config
from stopfast.presets import decoders, jepa
from stopfast.presets.combined import COMBINED
from stopfast.presets.corrected import corrected
from stopfast.presets.small import SMALL, cifar10, demo

__all__ = ["PRESETS", "cifar10", "corrected", "demo"]


def _twin(published: Callable[[], Config]) -> Callable[[], Config]:
    def build() -> Config:
        config = corrected(published())
        return replace(config, preset=f"{config.preset}-corrected")

    build.__doc__ = f"{published().preset} with the quirks mended."
    return build


_PUBLISHED = (*jepa.PUBLISHED, *decoders.PUBLISHED)
PRESETS: dict[str, Callable[[], Config]] = {
    build().preset: build
    for build in (
        *SMALL,
        *_PUBLISHED,
        *COMBINED,
        *(_twin(b) for b in _PUBLISHED if corrected(b()) != b()),
    )
}
