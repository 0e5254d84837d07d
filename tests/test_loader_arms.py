"""The arms of the loader benchmark: each shows the same, and what it measures is counted whole."""

import io
import multiprocessing
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pytest_benchmark")

from benchmarks import bench_loader, bench_train
from benchmarks.engine import runner as engine
from benchmarks.engine.refusals import Disagreement, NotHere
from benchmarks.engine.results import Results
from benchmarks.loaders import arms as loaders
from benchmarks.loaders.arms import LOADERS
from benchmarks.loaders.demand import demands
from benchmarks.loaders.feeds import Fed, Feed
from benchmarks.loaders.gate import check_form, check_loader, check_spread
from benchmarks.mask_loops import PUBLISHED
from stopfast.config import Transforms
from stopfast.data.images import open_images
from tests.small_photographs import CPU

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
ON_CPU = [name for name in LOADERS if not name.startswith("dali-gpu")]
BATCH = 3


def _photograph(number):
    """160 x 120 pixels with fine stripes, which whatever is not antialiased shows as others."""
    row, column = np.mgrid[0:120, 0:160]
    waves = [np.sin(row / 9 + number), np.cos(column / 7), np.sin((row + column) / 13)]
    stripes = 45 * np.sin(2.2 * column + 0.4 * row)
    pixels = np.stack([127 + 80 * wave + stripes for wave in waves], axis=-1).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=92)
    return out.getvalue()


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        (root / f"{number}.jpg").write_bytes(_photograph(number))
    return Feed(
        images=open_images(root),
        transforms=Transforms(size=(48, 48), flip=0.5, gray=0.2, blur=0.5),
        batch_size=BATCH,
        workers=1,
        device=CPU,
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arm", ON_CPU)
def test_arms_agree(arm, feed):
    """Each transform alone with PIL's; then batches that are drawn at random, of their steps' samples."""
    try:
        check_loader(LOADERS[arm], feed)
    except NotHere as reason:
        pytest.skip(str(reason))
    random = replace(feed, workers=0)
    expected = [samples.tolist() for samples in random.plan().batches(1, 4)]
    with closing(LOADERS[arm](random)) as batches:
        seen = [next(batches) for _ in expected]
    for fed in seen:
        check_form(fed, random)
        check_spread(fed, random)
    assert [fed.samples.tolist() for fed in seen] == expected
    assert not torch.equal(seen[0].images, seen[-1].images)
    lengths = [fed.target[0].shape[1] for fed in seen]
    assert lengths == [int(np.prod(PUBLISHED.block_sizes(step)[0])) for step in range(4)]


def test_workers_hand_over_the_same_and_end(feed):
    """Processes that are begun anew, not forked; none stays, and what they did is counted as busy."""
    pytest.importorskip("torchvision")
    before = bench_loader.cpu_seconds()
    with closing(LOADERS["published"](feed)) as batches:
        seen = [next(batches) for _ in range(3)]
        own = time.process_time()
        counted = bench_loader.cpu_seconds()
        assert multiprocessing.active_children()
    # To begin, a process imports torch: more than this one does meanwhile.
    assert counted - before > 0.5 and counted - own > 0.5
    assert not multiprocessing.active_children()
    for fed in seen:
        check_form(fed, feed)
    assert [fed.samples.tolist() for fed in seen] == [
        samples.tolist() for samples in feed.plan().batches(1, 3)
    ]


def _altered(change):
    """An arm that is right but for one thing."""

    def begin(feed):
        for fed in LOADERS["pil"](feed):
            yield change(fed)

    return begin


def _half(feed):
    """As if a JPEG was decoded at half its size, without antialiasing what is left."""
    for fed in LOADERS["pil"](feed):
        small = fed.images[..., ::2, ::2]
        yield fed._replace(images=small.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (_half, "crop: expected images within"),
        (_altered(lambda fed: fed._replace(images=fed.images * 255)), "crop: expected"),
        (_altered(lambda fed: fed._replace(images=fed.images.half())), "fp32, on cpu"),
        (_altered(lambda fed: fed._replace(images=fed.images[:, :, 1:])), "expected images of"),
        (_altered(lambda fed: fed._replace(images=fed.images.flip(3))), "crop: expected"),
        (_altered(lambda fed: fed._replace(samples=fed.samples.flip(0))), "crop: expected"),
        (_altered(lambda fed: fed._replace(context=[])), "expected 1 and 4 masks"),
        (_altered(lambda fed: fed._replace(context=fed.target[:1])), "without their targets"),
        (_altered(lambda fed: fed._replace(target=[m.int() for m in fed.target])), "int64"),
        (_altered(lambda fed: fed._replace(target=[m.flip(1) for m in fed.target])), "ascend"),
    ],
)
def test_what_is_wrong_is_not_timed(begin, message, feed):
    with pytest.raises(Disagreement, match=message):
        check_loader(begin, feed)


def test_draft_decoding_is_seen(feed, monkeypatch):
    """PIL's own way of decoding a JPEG smaller."""

    def draft(data):
        image = Image.open(io.BytesIO(data))
        size = image.size
        image.draft("RGB", (size[0] // 2, size[1] // 2))
        image.load()
        return image.resize(size, Image.Resampling.BILINEAR)

    monkeypatch.setattr("stopfast.data.pil.open_stored", draft)
    with pytest.raises(Disagreement, match="crop: expected"):
        check_loader(LOADERS["pil"], feed)


def test_spread(feed):
    images = torch.zeros(BATCH, 3, 48, 48)
    with pytest.raises(Disagreement, match="normalised photographs"):
        check_spread(Fed(images, torch.arange(BATCH), [], []), feed)


def test_arms_that_are_not_here(feed, monkeypatch):
    monkeypatch.setattr(loaders, "dali_problem", lambda: "no DALI")
    with pytest.raises(NotHere, match="no DALI"):
        LOADERS["dali-cpu"](feed)
    monkeypatch.setattr(loaders, "dali_problem", lambda: None)
    with pytest.raises(NotHere, match="GPU"):
        LOADERS["dali-gpu-0.65"](feed)


def test_demand_is_never_invented(tmp_path):
    """Of a timed step where there is one, else of the ceilings, else unknown."""

    def asked():
        return demands(["toy"], CPU, "fp32", images=4, folder=tmp_path)[0]

    assert asked() == ("toy", None, "unknown") and asked().fed_by(100.0) is None
    results = Results.open(tmp_path / "cpu" / "2026-01-01-0000000.json")
    results.begin({})
    for ceiling in ("matrix", "memory"):
        info = {"kind": "ceilings", "precision": "fp32", "ceiling": ceiling, "per_second": 1e9}
        results.add({"extra_info": {"key": ceiling, "arm": "", **info}})
    floor = asked()
    assert floor.origin == "floor" and floor.images_per_s is not None and floor.images_per_s > 0
    for arm, rate, images in (("published", 50.0, 4), ("stopfast", 80.0, 8)):
        info = {"kind": "step", "model": "toy", "precision": "fp32", "images": images}
        results.add({"extra_info": {"key": arm, "arm": arm, "images_per_s": rate, **info}})
    assert asked() == ("toy", 80.0, "stopfast, 8 images") and asked().fed_by(20.0) == 4.0
    other = Results.open(tmp_path / "z-gpu" / "2027-01-01-0000000.json")
    other.begin({})
    other.add({"extra_info": {"key": "x", "arm": "x", "images_per_s": 9e9, **info}})
    assert asked().images_per_s == 80.0


def test_rows(feed, tmp_path):
    """What a measurement leaves: of a loader alone, of a step alone, of both."""
    path = tmp_path / "results.json"
    common = {"data": feed.images.root, "device": "cpu", "images": (BATCH,), "results": path}
    options = bench_loader.LoaderOptions(
        **common, arm=("pil",), workers=(1,), augment=("all",), rounds=3, warmup=1
    )
    assert engine.run("bench_loader.py", options) == 0
    (row,) = Results.open(path).rows(kind="loader")
    info = row["extra_info"]
    assert (info["arm"], info["transforms"], info["workers"]) == ("pil", "all", 1)
    assert set(info["agreement"]) == {"crop", "flip, gray", "blur"}
    assert set(info["demand"]) == {"vit-b16", "vit-l16", "vit-h14"}
    seconds = sum(row["stats"]["data"])
    assert len(row["stats"]["data"]) == 3 and info["images_per_s"] <= 3 * BATCH / seconds
    assert info["images_per_s"] == pytest.approx(info["images_per_core_s"] * info["busy_cores"])
    arms = ("step alone", "pil alone", "pil")
    options = bench_train.TrainOptions(
        **common, arm=arms, model=("toy",), workers=1, rounds=1, warmup=1, each=2
    )
    assert engine.run("bench_train.py", options) == 0
    infos = {r["extra_info"]["arm"]: r["extra_info"] for r in Results.open(path).rows(kind="train")}
    assert tuple(infos) == arms
    for arm, info in infos.items():
        assert info["images_per_s"] > 0 and len(info["step_ms"]) == 2
        assert ("waiting_share" in info) == (arm != "pil alone")
        if arm != "pil alone":
            # pytest-benchmark calls once more, for a result.
            assert info["counts"]["eager"] == 5 and info["counts_while_timed"]["eager"] == 3
    assert 0 <= infos["step alone"]["waiting_share"] < 0.2
    assert infos["step alone"]["waiting_share"] < infos["pil"]["waiting_share"] < 1
