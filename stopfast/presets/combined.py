"""Combinations that nobody has published: StoP's noise with other objectives, all quirks mended."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from stopfast.config import Config, Degradation, DegradeConfig
from stopfast.presets.corrected import corrected
from stopfast.presets.decoders import DEGRADATIONS, droppos_vit_b16, mae_vit_b16
from stopfast.presets.jepa import stop_vit_b16


def stop_droppos_vit_b16() -> Config:
    """DropPos, ViT-B/16, with StoP's noise on the patches whose positions are asked for."""
    return _noisy("stop-droppos-vit-b16", droppos_vit_b16())


def stop_mae_vit_b16() -> Config:
    """MAE, ViT-B/16, with StoP's noise on the decoder's queries."""
    return _noisy("stop-mae-vit-b16", mae_vit_b16())


def _noisy(name: str, config: Config) -> Config:
    return replace(corrected(config), preset=name, noise=stop_vit_b16().noise)


def _degraded(kind: Degradation) -> Config:
    config = corrected(stop_vit_b16())
    degrade = DegradeConfig(kind=kind, mix_channels=False, gray_channels=3)
    return replace(
        config,
        preset=f"stop-{kind}-vit-b16",
        objective=replace(config.jepa, degrade=degrade),
    )


def _context(kind: Degradation) -> Callable[[], Config]:
    build = partial(_degraded, kind)
    build.__doc__ = f"StoP, ViT-B/16, of which the context encoder sees a {kind} image."
    return build


COMBINED: tuple[Callable[[], Config], ...] = (
    stop_droppos_vit_b16,
    stop_mae_vit_b16,
    *(_context(kind) for kind in DEGRADATIONS),
)
