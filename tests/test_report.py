"""The report: numbers behind the pictures, what is drawn of them, and a page that needs no other file."""

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, layer_norm

from stopfast.build import build_masks, build_objective
from stopfast.checkpoint import save_checkpoint
from stopfast.config import (
    Config,
    DataConfig,
    JepaConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    Transforms,
    to_document,
)
from stopfast.report import measures, pictures, report
from stopfast.report.canvas import data_uri
from stopfast.report.logs import curve, read_log, thin
from stopfast.report.page import Picture, Section, Table, render_page
from stopfast.trained import TrainedRun
from tests.small_predictor import inputs, queries, small

GRID = (8, 8)


def settings(variant: str = "stop", **model: int) -> Config:
    sizes = dict(patch_size=4, embed_dim=24, depth=1, num_heads=2, predictor_embed_dim=16)
    return Config(
        preset="test",
        data=DataConfig(batch_size=8, loader="pil", transforms=Transforms(size=(32, 32))),
        model=ModelConfig(**{**sizes, "predictor_depth": 1, **model}),
        noise=NoiseConfig(variant=variant),  # type: ignore[arg-type]
        objective=JepaConfig(mask=MaskConfig(min_keep=1)),
    )


def run_of(config: Config) -> TrainedRun:
    made = build_objective(config, steps_per_epoch=1)
    for module in made.modules().values():
        module.eval()
    return TrainedRun(checkpoint=Path("none"), config=config, step=3, objective=made)


def write_run(folder: Path, config: Config, rows: list[dict[str, float]]) -> Path:
    made = build_objective(config, steps_per_epoch=1)
    weights = {f"{n}.{k}": v for n, m in made.modules().items() for k, v in m.state_dict().items()}
    documents = {"config": to_document(config), "state": {"step": 3}}
    save_checkpoint(folder / "step-0000003", {"model": weights}, documents)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    numbers = np.random.default_rng(0)
    for name in "ab":
        (root / "test" / name).mkdir(parents=True)
        for number in range(4):
            pixels = numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / name / f"{number}.jpg")
    return root


@pytest.mark.parametrize("edge_inclusive", [False, True])
def test_coverage_counts_patches(edge_inclusive):
    config = settings()
    config = replace(
        config,
        objective=replace(
            config.jepa, mask=replace(config.jepa.mask, edge_inclusive=edge_inclusive)
        ),
    )
    masks = build_masks(config)
    found = measures.coverage(masks, 8, 3)
    for share, which in zip(found, ("context", "target"), strict=True):
        counted = np.zeros(64)
        for iteration in range(3):
            blocks = getattr(masks(8, iteration), which)
            for image in range(8):
                for patch in {int(i) for block in blocks for i in block[image]}:
                    counted[patch] += 1
        assert np.array_equal(share.numpy(), counted.reshape(GRID) / 24)
        reached = bool(share[-1].any()) and bool(share[:, -1].any())
        assert reached == edge_inclusive
    drawn = pictures.draw_coverage({"kind": found})
    for ax, share in zip(drawn.axes, found, strict=False):
        assert np.array_equal(ax.images[0].get_array(), share.numpy())


@pytest.mark.parametrize("width", [24, 8])
def test_spectrum_is_of_the_projection(width):
    predictor = small(apply_stop=True, embed_dim=width)
    weight = predictor.predictor_embed.weight.detach().double()
    values = torch.linalg.eigvalsh(weight @ weight.T).flip(0)
    found = measures.projection_spectrum(predictor)
    assert torch.allclose(found, values, atol=1e-12)
    figure = pictures.draw_noise({"run": found}, {})
    drawn = figure.axes[0].lines[0].get_ydata()
    assert np.array_equal(drawn, found[: min(width, 16)].numpy())


@pytest.mark.parametrize(
    "switches",
    [
        {"apply_stop": True},
        {"apply_stop": True, "tie": False},
        {"apply_stop": True, "cov": "fixed"},
        {"variant": "stop_paper"},
    ],
)
def test_noise_is_that_of_the_predictors_queries(switches):
    predictor = small(noise_var=0.5, **switches)
    targets = inputs()[2]  # those of ``queries``
    normals = torch.randn(3, targets[0].shape[1], predictor.noise_channels)
    offset = {"stop": predictor.predictor_embed.bias}.get(
        predictor.variant, predictor.mask_token.detach().view(-1)
    )
    moved = queries(predictor, noise=[predictor.noise_std * normals] * 2)[:3].detach() - offset
    table = predictor.predictor_pos_embed.detach()[0]
    for image in range(3):
        for token, place in enumerate(targets[0][image].tolist()):
            expected = cosine_similarity(table[place] + moved[image, token], table, dim=-1)
            found = measures.position_cosines(predictor, place, normals[image, token])
            assert torch.allclose(found.flatten(), expected, atol=1e-5)
    many = torch.randn(20000, predictor.noise_channels)
    projection = measures.noise_projection(predictor)
    assert projection is not None
    length = (predictor.noise_std * many @ projection.T).square().sum(1).mean().item()
    noise, position = measures.noise_to_position(predictor)
    assert noise == pytest.approx(length, rel=0.03)
    assert position == pytest.approx(16 / 2)


def test_without_noise_the_cosine_is_the_positions():
    predictor = small(apply_stop=True)
    plain = measures.position_cosines(predictor, 5)
    still = measures.position_cosines(predictor, 5, torch.zeros(predictor.noise_channels))
    assert torch.equal(plain, still)
    assert plain.shape == (4, 4)
    assert plain.flatten()[5].item() == pytest.approx(1.0)
    drawn = pictures.draw_cosines({"position": [plain]}, [5], (4, 4))
    assert np.array_equal(drawn.axes[0].images[0].get_array(), plain.numpy())
    with pytest.raises(ValueError, match="no noise"):
        measures.position_cosines(small(), 5, torch.zeros(24))
    with pytest.raises(ValueError, match=r"0\.\.15, got 16"):
        measures.position_cosines(predictor, 16)


def test_components_are_the_planted_ones():
    torch.manual_seed(0)
    drawn = torch.randn(36, 3)
    scores = torch.linalg.qr(drawn - drawn.mean(0)).Q * torch.tensor([5.0, 3.0, 1.0])
    scores = scores.view(4, 9, 3)
    directions = torch.linalg.qr(torch.randn(12, 3)).Q
    colours, share = measures.pca_colours(scores @ directions.T + 7.0)
    assert share == pytest.approx(1.0)
    assert colours.shape == (4, 9, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    for component in range(3):
        pair = torch.stack([scores[..., component].flatten(), colours[..., component].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.97  # the ends are cut
    with pytest.raises(ValueError, match="at least 3"):
        measures.pca_colours(torch.zeros(1, 2, 12))


def test_position_share_of_planted_features():
    positions, images = torch.randn(1, 500, 6), torch.randn(400, 1, 6)
    assert measures.position_share(positions.expand(4, -1, -1)) == pytest.approx(1.0)
    assert measures.position_share(images.expand(-1, 5, -1)) == pytest.approx(0.0, abs=1e-9)
    assert measures.position_share(positions + images) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("variant", ["ijepa", "stop"])
def test_a_perfect_prediction_finds_its_patch(variant):
    config = settings(variant)
    run = run_of(config)
    with torch.no_grad():  # a norm that is not new, or the targets' own would change nothing
        for parameter in run.target_encoder.norm.parameters():
            parameter.add_(torch.randn(24))
    pixels = torch.randn(5, 3, 32, 32)
    masks = build_masks(config)(5, 0)

    class Perfect:
        grid_size = GRID

        def __call__(self, x, context, target, seed):
            features = layer_norm(run.target_encoder(pixels), (24,), eps=1e-5)
            return 3.0 * features.gather(1, target[..., None].expand(-1, -1, 24))

    for predictor in (run.predictor, Perfect()):
        run.objective.predictor = predictor  # type: ignore[attr-defined]
        found = measures.retrieve(run, pixels, pixels, masks)
        assert torch.allclose(found.weights.sum((1, 2)), torch.ones(5))
        assert torch.equal(found.places, masks.target[0][:, masks.target[0].shape[1] // 2])
    at = found.places[:, None]
    assert torch.allclose(found.cosines.flatten(1).gather(1, at), torch.ones(5, 1), atol=1e-5)
    assert torch.equal(found.weights.flatten(1).argmax(1), found.places)
    shown = pixels.permute(0, 2, 3, 1).clamp(0, 1)
    drawn = pictures.draw_retrieval(shown, masks.context[0], GRID, {"run": found})
    assert np.array_equal(drawn.axes[5].images[0].get_array(), found.weights[0].numpy())


def test_masks_are_drawn_where_they_are():
    config = settings()
    masks = build_masks(config)(3, 0)
    figure = pictures.draw_masks(
        torch.zeros(3, 32, 32, 3), masks, GRID, {"context": torch.zeros(3, 32, 32, 3)}
    )
    context = np.asarray(figure.axes[3].images[0].get_array())  # black where the image shows
    seen = np.flatnonzero((context.reshape(8, 4, 8, 4, 3) == 0).all(axis=(1, 3, 4)))
    assert seen.tolist() == masks.context[0][0].tolist()
    rectangle = figure.axes[6].patches[0]
    corner = int(masks.target[0][0, 0])
    assert rectangle.get_xy() == (corner % 8 * 4 - 0.5, corner // 8 * 4 - 0.5)
    assert rectangle.get_width() * rectangle.get_height() == 16 * masks.target[0].shape[1]


def test_log_is_read_as_it_was_written(tmp_path):
    assert read_log(tmp_path) == []
    log = tmp_path / "log.jsonl"
    rows = [{"step": s, "loss": v} for s, v in ((1, 4.0), (3, 9.0), (2, 2.0), (3, 1.0))]
    log.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"step": 3, "knn": 0.5}]))
    with log.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    assert curve(read_log(tmp_path), "loss") == ([1, 2, 3], [4.0, 2.0, 1.0])
    assert curve(read_log(tmp_path), "knn") == ([3], [0.5])
    assert thin(curve(read_log(tmp_path), "loss"), most=2) == ([1.5, 3], [3.0, 1.0], 2)
    log.write_text('oops\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1, got 'oops'"):
        read_log(tmp_path)
    figure = pictures.draw_curves({"loss": {"a": ([1, 2], [3.0, 4.0])}})
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 3.0], [2, 4.0]]


class Reader(HTMLParser):
    """Every address that a page names, its elements, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action") and v]

    def handle_data(self, data):
        self.text += data


def test_page_needs_no_other_file_and_escapes(images, tmp_path):
    evil = "x<script>&\"'"
    rows = [{"step": s, "loss": 1.0 / s, "lr": 0.1, "rankme": 2.0} for s in (1, 2, 3)]
    runs = [
        write_run(tmp_path / "<b>one", settings("ijepa"), rows),
        write_run(tmp_path / "two", settings("stop"), []),
        write_run(tmp_path / "coarse", settings("stop", patch_size=8), rows),
    ]
    section = Section(title=evil, text=evil, parts=[Table(header=["", evil], rows=[[evil, evil]])])
    path = report(
        runs, images, tmp_path / "new" / "report.html", title=evil, sections=[section], images=3
    )
    text = path.read_text()
    page = Reader(text)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "b"} & set(page.elements)
    assert "url(" not in text and "@import" not in text
    # The title twice, the section's heading and paragraph, and three cells.
    assert page.text.count(evil) == 7
    assert page.elements.count("img") == len(page.addresses)
    for name in ("Settings", "Training", "Masks: <b>one, two", "Masks: coarse"):
        assert name in page.text
    assert "noise.variant" in page.text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_size < 3e6


def test_page_without_images_or_log(tmp_path):
    path = report([write_run(tmp_path / "run", settings(), [])], None, tmp_path / "r.html")
    text = Reader(path.read_text()).text
    assert "left no log" in text
    assert "No image folder was given" in text
    assert "PCA" not in text
    assert "Position and noise" in text


def test_attributes_are_escaped():
    picture = Picture(source="data:image/png;base64,", alternative='" onload="', caption="<")
    page = render_page("t", "l", [Section(title="s", parts=[picture])], "f")
    assert 'onload="' not in page
    assert "&quot; onload=&quot;" in page


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    run = write_run(tmp_path / "run", settings(), [])
    for runs, data, told in (
        ([], None, "expected runs"),
        ([run, run], None, "runs that differ"),
        ([tmp_path / "none"], None, "expected a checkpoint"),
        ([run], tmp_path / "none", "none"),
    ):
        with pytest.raises(ValueError, match=told):
            report(runs, data, tmp_path / "r.html")
    assert not list(tmp_path.glob("*.html*"))


def test_matplotlib_is_imported_only_when_it_is_used(monkeypatch, tmp_path):
    code = "import sys, stopfast.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'stopfast\[viz\]'"):
        report([tmp_path], None, tmp_path / "r.html")


def test_figures_leave_no_global_state():
    import matplotlib

    before = matplotlib.rcParams.copy()
    figure = pictures.draw_curves({"loss": {"a": ([1], [1.0])}})
    assert data_uri(figure, "svg").startswith("data:image/svg+xml;base64,")
    assert data_uri(figure, "png").startswith("data:image/png;base64,iVBOR")
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules
