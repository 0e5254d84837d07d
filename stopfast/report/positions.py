"""The section of runs of DropPos: where patches are said to belong."""

from typing import NamedTuple

import torch
from torch import Tensor

from stopfast.config import DropPosConfig
from stopfast.objectives.droppos import DropPos, DropPosDraws
from stopfast.report.canvas import picture
from stopfast.report.group import Group
from stopfast.report.page import Section, Table
from stopfast.report.position_pictures import draw_placed, draw_placing
from stopfast.report.samples import to_pixels

_DRAWS = 8


class Told(NamedTuple):
    """Where the patches of images that an encoder sees are said to belong."""

    visible: Tensor
    """int64 [B, V]: their true places, in raster order of the grid."""
    asked: Tensor
    """bool [B, V]: whether the encoder was not told the place."""
    said: Tensor
    """int64 [B, V]: the most probable place."""
    sure: Tensor
    """fp32 [B, V]: its probability."""


class Placing(NamedTuple):
    """How well the patches of each place are put back, fp64 [rows, columns] each; NaN if never asked."""

    accuracy: Tensor
    """Share of right answers."""
    distance: Tensor
    """Mean distance between the place that is said and the true one, in patches."""


@torch.inference_mode()
def tell(objective: DropPos, images: Tensor, draws: DropPosDraws) -> Told:
    """Ask for the places of the visible patches of images [B, 3, H, W]."""
    visible = draws.order[:, : objective.visible]
    asked = torch.ones_like(visible, dtype=torch.bool)
    asked.scatter_(1, draws.position_order[:, : objective.told], False)
    logits = objective.outputs(images, draws)["position logits"].float()
    sure, said = logits.softmax(-1).max(-1)
    return Told(visible, asked, said, sure)


def placing(objective: DropPos, images: Tensor, draws: int) -> Placing:
    """Ask for the places of patches of images [B, 3, H, W], with the draws of the first ``draws`` steps.

    Patches that were told their places do not count.
    """
    grid = objective.encoder.patch_embed.grid
    count, right, away = torch.zeros(3, grid[0] * grid[1], dtype=torch.float64)
    for step in range(1, draws + 1):
        drawn = objective.draws(step, len(images), slice(0, len(images)))
        told = tell(objective, images, drawn)
        true, said = told.visible[told.asked], told.said[told.asked]
        apart = torch.stack([true // grid[1] - said // grid[1], true % grid[1] - said % grid[1]])
        for total, values in (
            (count, torch.ones_like(true)),
            (right, true == said),
            (away, apart.double().norm(dim=0)),
        ):
            total.index_add_(0, true, values.double())
    return Placing((right / count).view(grid), (away / count).view(grid))


def position_section(group: Group) -> Section | None:
    """Return where patches are put, and how often that is right; None without such runs or images."""
    own = group.of(DropPosConfig)
    if own is None or own.pool is None:
        return None
    objectives = {name: run.objective for name, run in own.runs.items()}
    parts = []
    for name, objective in objectives.items():
        assert isinstance(objective, DropPos)
        images = own.field(name)
        told = tell(objective, images, objective.draws(1, len(images), slice(0, len(images))))
        pixels = to_pixels(images, objective.transforms)
        figure = draw_placed(
            pixels,
            told.visible,
            told.asked,
            told.said,
            told.sure,
            objective.encoder.patch_embed.grid,
        )
        right = (told.said == told.visible)[told.asked].float().mean().item()
        caption = (
            f"{name}. Seen: the patches that the encoder sees; it is told the places of those framed in "
            "blue, not of those framed in orange. Placed: each of the latter where the model says that it "
            "belongs, the surest on top, framed in green where that is right; where it is not, a line "
            f"leads from its true place. Of these, {100 * right:.0f}\u00a0% are right."
        )
        parts.append(picture(figure, f"patches as {name} places them", caption))
    maps, rows = {}, []
    for name, objective in objectives.items():
        assert isinstance(objective, DropPos)
        maps[name] = placing(objective, own.fields[name], _DRAWS)
        rows.append(_figures(name, objective, own.fields[name], maps[name]))
    caption = (
        "How often a patch is put in its place, and how far from it on average, by its place: over "
        f"{_DRAWS} draws of masks for each of {len(own.pool)} images. White: never asked."
    )
    parts.append(picture(draw_placing(maps), "accuracy of positions by place", caption))
    parts.append(
        Table(
            header=("run", "right", "right, weighted", "right by guessing", "distance in patches"),
            rows=rows,
            caption="Of the draws of the first step. Weighted: each patch counts by its weight in the "
            "loss. The distance is the mean over the places of the map.",
        )
    )
    return Section(title="Positions", parts=parts)


def _figures(name: str, objective: DropPos, images: Tensor, found: Placing) -> list[str]:
    drawn = objective.draws(1, len(images), slice(0, len(images)))
    measured = objective.measures(images, drawn)
    shares = (
        measured["position_accuracy"].item(),
        measured["position_accuracy_weighted"].item(),
        1 / objective.encoder.patch_embed.num_patches,
    )
    told = (f"{100 * share:.1f}\u00a0%" for share in shares)
    return [name, *told, f"{found.distance.nanmean().item():.2f}"]
