"""The section of what patch features look like, of encoders of every objective."""

from stopfast.report import measures, pictures
from stopfast.report.canvas import picture
from stopfast.report.group import Group, at_start
from stopfast.report.page import Section
from stopfast.report.samples import to_pixels
from stopfast.report.wording import percent


def feature_section(group: Group) -> Section | None:
    """Return the principal components of patch features, with and without position; None without images."""
    if group.pool is None or group.images is None:
        return None
    objectives = {"untrained": at_start(group.first.config)}
    objectives |= {name: run.objective for name, run in group.runs.items()}
    features = {n: measures.patch_features(each, group.pool) for n, each in objectives.items()}
    images = {"image": to_pixels(group.images, group.first.config.data.transforms)}
    grid = group.first.encoder.patch_embed.grid
    shares = {n: measures.position_share(values) for n, values in features.items()}
    captions = (
        "The first three principal components of the patch features, as red, green and blue: of the "
        f"untrained encoder{group.whose}, and of each run's target encoder, or its encoder where there is "
        "no other. Each row has components of its own, so colours compare within a row. A pattern that is "
        "the same in every image is position: the mean feature of each position alone makes up "
        f"{percent(shares)} of the variance.",
        "The same with position taken out: from each feature the mean at its position over "
        f"{len(group.pool)} images is subtracted first, so that what is left tells the images apart.",
    )
    parts = []
    for caption, centred in zip(captions, (False, True), strict=True):
        colours, held = {}, {}
        for name, values in features.items():
            rows = values - values.mean(0) if centred else values
            made, held[name] = measures.pca_colours(rows)
            colours[name] = made[list(group.shown)].unflatten(1, grid)
        caption += f" The components hold {percent(held)} of the variance."
        figure = pictures.draw_images(images | colours)
        parts.append(picture(figure, "PCA of patch features", caption))
    return Section(title="Patch features", parts=parts)
