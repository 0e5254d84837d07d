"""The report of DropPos, MAE and Beyond Masking: numbers behind the pictures, and which sections it has."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stopfast.build import build_objective, patch_target
from stopfast.checkpoint import save_checkpoint
from stopfast.config import Config, ReconstructionConfig, Transforms, to_document
from stopfast.degradations.resizing import area_resize
from stopfast.patches import normalised_patches, patchify, unnormalised_patches, unpatchify
from stopfast.presets import PRESETS
from stopfast.report import report
from stopfast.report.position_pictures import draw_placed, draw_placing
from stopfast.report.positions import placing, tell
from stopfast.report.settings import objective_name
from stopfast.report.views import predicted, predicted_images, seen, view_pixels

GRID, PATCH = (8, 8), 4


def settings(preset: str) -> Config:
    config = PRESETS[preset]()
    sizes = dict(embed_dim=24, depth=1, num_heads=2, predictor_embed_dim=16, predictor_depth=1)
    return replace(
        config,
        model=replace(config.model, **sizes),
        data=replace(config.data, batch_size=8, loader="pil", digits=False),
    )


def photographs(objective, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *objective.transforms.size)


@pytest.mark.parametrize("norm", ["none", "patch", "channel"])
def test_predictions_get_the_mean_and_the_spread_of_the_true_patch(norm):
    images = 2 + torch.randn(1, 3, 8, 8) * torch.tensor([0.5, 1.0, 3.0])[:, None, None]
    target = patch_target(PATCH, norm, (0.2, 0.3, 0.4))
    said = torch.randn(1, 4, 48)
    found = unpatchify(unnormalised_patches(said, images, target), PATCH, (2, 2))
    for place, channel in ((0, 0), (1, 2), (3, 1)):
        row, column = place // 2 * PATCH, place % 2 * PATCH
        patch = images[0, :, row : row + PATCH, column : column + PATCH].numpy()
        if norm == "none":
            mean, spread = 0.0, 1.0
        elif norm == "patch":
            mean, spread = patch.mean(), math.sqrt(patch.var(ddof=1) + 1e-6)
        else:
            mean = patch[channel].mean()
            spread = patch[channel].std(ddof=1) + 1e-6 / (0.2, 0.3, 0.4)[channel]
        y, x = 1, 2
        number = said[0, place, (y * PATCH + x) * 3 + channel].item()
        assert found[0, channel, row + y, column + x].item() == pytest.approx(
            number * spread + mean, rel=1e-5
        )


@pytest.mark.parametrize(
    "preset",
    ["mae-demo", "beyond-zoomed-in-demo", "beyond-zoomed-out-demo", "beyond-distorted-demo"],
)
def test_what_costs_nothing_is_the_image(preset):
    """The patches of the truth, normalised, are drawn as the truth, where the loss compares them."""
    objective = build_objective(settings(preset), 1)
    degradation, images = objective.degradation, photographs(objective)
    target = degradation.target
    whole = degradation.whole(images)
    drawn = predicted_images(degradation, target, normalised_patches(whole, target), images)
    if preset != "beyond-zoomed-in-demo":
        torch.testing.assert_close(drawn, whole, atol=1e-5, rtol=1e-5)
        return
    margin = area_resize(whole, degradation.source)
    for side in (drawn - margin, (drawn - margin).mT):
        assert side[..., : degradation.margin].abs().max() < 1e-5
        assert side[..., -degradation.margin :].abs().max() < 1e-5
    # The middle is right where the field, cut out, has the normalised patches of the view.
    view = degradation.view(images)
    blocky = images.clone()
    blocky[..., 4:36, 4:36] = unpatchify(
        patchify(view, PATCH)
        .unflatten(2, (-1, 3))
        .mean(2, keepdim=True)
        .expand(-1, -1, 16, -1)
        .flatten(2),
        PATCH,
        GRID,
    )
    flat = predicted_images(degradation, target, torch.zeros(3, 64, 48), images)
    torch.testing.assert_close(
        degradation.view(flat), degradation.view(blocky), atol=1e-5, rtol=1e-5
    )


def test_masked_patches_are_not_shown_and_are_what_is_judged():
    objective = build_objective(settings("mae-demo"), 1)
    images = photographs(objective)
    draws = objective.draws(1, 3, slice(0, 3))
    given = seen(objective, images, draws)
    made = predicted(objective, objective.degradation.target, images, draws)
    for image in range(3):
        hidden = {int(place) for place in draws.order[image, objective.visible :]}
        for place in range(64):
            row, column = place // 8 * PATCH, place % 8 * PATCH
            part = np.s_[image, row : row + PATCH, column : column + PATCH]
            assert given.shown[part].unique().tolist() == [place not in hidden]
            assert made.judged[part].unique().tolist() == [place in hidden]


def test_frames_are_where_the_encoder_looks():
    out = build_objective(settings("beyond-zoomed-out-demo"), 1)
    images = photographs(out)
    draws = out.draws(1, 3, slice(0, 3))
    given = seen(out, images, draws)
    assert given.inside is not None
    left, top, width, height = given.inside
    inside = given.pixels[:, top : top + height, left : left + width]
    expected = view_pixels(images, out.degradation, out.transforms)
    # Both are stretched by the same values: a mirror has none that the image has not.
    torch.testing.assert_close(inside, expected)
    into = build_objective(settings("beyond-zoomed-in-mask-demo"), 1)
    images = photographs(into)
    draws = into.draws(1, 3, slice(0, 3))
    made = predicted(into, into.degradation.target, images, draws)
    assert made.seen == (4, 4, 32, 32)
    assert made.judged[:, :4].all() and made.judged[:, :, 36:].all()
    middle = made.judged[:, 4:36, 4:36]
    assert torch.equal(middle, ~seen(into, images, draws).shown)


def test_views_keep_to_black_and_white():
    transforms = Transforms(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    bright = torch.full((2, 3, 2, 2), 0.5)
    bright[1, :, 0, 0] = 4.0
    found = view_pixels(bright, None, transforms)
    assert (found[0] == 0.5).all()
    assert found[1, 0, 0].tolist() == [1.0] * 3 and found[1, 1, 1].tolist() == [0.125] * 3
    tinted = Transforms(size=(8, 8), mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    gray = build_objective(settings("beyond-decolorized-demo"), 1).degradation
    pixels = view_pixels(torch.zeros(1, 1, 2, 2), gray, tinted)
    assert pixels.shape == (1, 2, 2, 3)
    torch.testing.assert_close(pixels, torch.full((1, 2, 2, 3), 0.4))


def test_map_of_accuracy_counts_answers():
    """A model that is right on the left half, and one row below the true place on the right."""
    objective = build_objective(settings("droppos-demo"), 1)
    images = photographs(objective, 4)

    def outputs(images, draws):
        place = draws.order[:, : objective.visible]
        said = torch.where(place % 8 < 4, place, (place + 8) % 64)
        return {"position logits": 9 * torch.nn.functional.one_hot(said, 64).float()}

    objective.outputs = outputs
    found = placing(objective, images, 6)
    asked = torch.zeros(64)
    for step in range(1, 7):
        draws = objective.draws(step, 4, slice(0, 4))
        for order, known in zip(draws.order, draws.position_order, strict=True):
            for slot in known[objective.told :]:
                asked[order[slot]] += 1
    asked = asked.view(GRID) > 0
    assert asked.float().mean() > 0.9
    assert torch.equal(~found.accuracy.isnan(), asked)
    right = torch.where(asked, (torch.arange(8) < 4).double().expand(8, 8), torch.nan)
    away = torch.where(asked, (torch.arange(8) >= 4).double().expand(8, 8), torch.nan)
    away[7] *= 7.0  # the row below the last is the first
    assert torch.equal(found.accuracy.nan_to_num(5.0), right.nan_to_num(5.0))
    assert torch.equal(found.distance.nan_to_num(5.0), away.nan_to_num(5.0))
    drawn = draw_placing({"run": found})
    assert np.array_equal(drawn.axes[0].images[0].get_array().filled(5.0), right.nan_to_num(5.0))


@pytest.mark.parametrize("shuffle", [False, True])
def test_answers_are_those_that_are_measured(shuffle):
    config = settings("droppos-demo")
    objective = build_objective(
        replace(config, objective=replace(config.objective, shuffle=shuffle)), 1
    )
    with torch.no_grad():
        objective.decoder.decoder_pred.weight.normal_()
    images = photographs(objective, 48)
    draws = objective.draws(1, 48, slice(0, 48))
    told = tell(objective, images, draws)
    assert told.asked.sum(1).tolist() == [objective.visible - objective.told] * 48
    right = (told.said == told.visible)[told.asked].float().mean()
    assert right > 0
    torch.testing.assert_close(right, objective.measures(images, draws)["position_accuracy"])


def test_patches_are_drawn_where_they_are_said_to_belong():
    pixels = torch.rand(1, 8, 8, 3)
    # A 2 x 2 grid: 0 is told; 1 is put at 3, rightly 2 at 2, and 3 at 2 with less confidence.
    args = ([0, 1, 2, 3], [False, True, True, True], [1, 3, 2, 2], [0.1, 0.5, 0.9, 0.3])
    figure = draw_placed(pixels, *(torch.tensor([each]) for each in args), (2, 2))
    placed = figure.axes[2]
    canvas = np.asarray(placed.images[0].get_array())
    patch = pixels[0].numpy()
    assert np.array_equal(canvas[:4, :4], patch[:4, :4])
    assert np.array_equal(canvas[4:, 4:], patch[:4, 4:])  # 1 at 3
    assert np.array_equal(canvas[4:, :4], patch[4:, :4])  # 2 over 3
    assert (canvas[:4, 4:] == canvas[0, 4]).all()  # nothing at 1
    lines = [line.get_xydata().tolist() for line in placed.lines if len(line.get_xydata()) == 2]
    assert sorted(lines) == [[[5.5, 1.5], [5.5, 5.5]], [[5.5, 5.5], [1.5, 5.5]]]
    assert len(figure.axes[1].patches) == 4 and len(placed.patches) == 4


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("demo", "StoP"),
        ("ijepa-demo", "I-JEPA"),
        ("stop-mae-demo", "MAE, with StoP's noise"),
        ("droppos-demo", "DropPos"),
        ("beyond-zoomed-out-demo", "Beyond Masking, zoomed-out"),
    ],
)
def test_objectives_have_their_names(preset, name):
    assert objective_name(PRESETS[preset]()) == name


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images") / "train" / "a"
    root.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for number in range(3):
        pixels = numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.jpg")
    return root.parents[1]


_SECTIONS = {
    "Reconstructions": "reconstruction",
    "Positions": "droppos",
    "Masks": "jepa",
    "What a prediction finds": "jepa",
    "Position and noise": "jepa",
}


@pytest.mark.parametrize(
    "presets",
    [
        ("droppos-demo", "stop-mae-demo", "beyond-zoomed-in-mask-demo", "stop-zoomed-out-demo"),
        ("beyond-decolorized-demo",),
        ("droppos-demo",),
    ],
)
def test_page_has_the_sections_of_its_runs(presets, images, tmp_path):
    kinds = set()
    for preset in presets:
        config = settings(preset)
        if isinstance(config.objective, ReconstructionConfig):
            degrade = replace(config.objective.degrade, gray_channels=1)
            config = replace(config, objective=replace(config.objective, degrade=degrade))
        kinds.add(config.objective.name)
        modules = build_objective(config, 1).modules()
        weights = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
        documents = {"config": to_document(config), "state": {"step": 3}}
        save_checkpoint(tmp_path / preset / "step-0000003", {"model": weights}, documents)
        rows = '{"step": 1, "loss": 2.0}\n{"step": 1, "knn": 0.5}\n'
        (tmp_path / preset / "log.jsonl").write_text(rows)
    runs = [tmp_path / preset for preset in presets]
    text = report(runs, images, tmp_path / "report.html", images=2).read_text()
    for title, kind in _SECTIONS.items():
        assert (f"<h2>{title}</h2>" in text) == (kind in kinds), title
    assert "<h2>Patch features</h2>" in text
    assert ("loss: pixels" in text) == (len(kinds) > 1)
