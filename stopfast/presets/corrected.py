"""The published programs' quirks, mended."""

from dataclasses import replace

from stopfast.config import Config, DropPosConfig, JepaConfig, ReconstructionConfig


def corrected(config: Config) -> Config:
    """Return the settings with the published programs' quirks mended, and nothing else.

    I-JEPA and StoP: masks reach the last row and column. Contexts are cut to the shortest of the whole
    step, not of a micro-batch, so that ``step.accumulate`` changes no mask, and to a random choice of
    their patches, not to the top of the image. Residual projections begin depth-scaled, as both programs
    mean them to. The shortest of 2,048 contexts is shorter than that of 128: of 196 patches it keeps 43,
    not 50. DropPos: positions are smoothed on the grid that the patches lie on, and each target sums to 1.
    Beyond Masking: positions of rows and columns, not of the number in raster order; MAE's initial
    weights and attention biases; an encoder that always has three channels; a blur that keeps channels
    apart and brightness as it is. MAE has none.

    Objective, noise and schedules stay as released: where a paper says something else (a variance, a
    mask token beside the noise, a linear weight decay), that is another method, not a quirk.
    """
    if isinstance(config.objective, JepaConfig):
        return _jepa(config, config.objective)
    if isinstance(config.objective, DropPosConfig):
        settings = replace(config.objective, smoothing_grid="corrected", smoothing_norm="corrected")
        return replace(config, objective=settings)
    if config.objective.degrade.kind == "none":
        return config
    return _reconstruction(config, config.objective)


def _jepa(config: Config, settings: JepaConfig) -> Config:
    mask = replace(settings.mask, edge_inclusive=True, truncate="random", truncate_over="global")
    return replace(
        config,
        model=replace(config.model, init_rescale=True),
        objective=replace(settings, mask=mask),
    )


def _reconstruction(config: Config, settings: ReconstructionConfig) -> Config:
    degrade = replace(settings.degrade, mix_channels=False, gray_channels=3)
    return replace(
        config,
        model=replace(
            config.model, positions="2d", init="xavier", qkv_bias="qkv", predictor_embed_bias=True
        ),
        objective=replace(settings, degrade=degrade),
    )
