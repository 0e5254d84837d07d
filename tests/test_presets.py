"""The published recipes as presets: sizes, schedules, parameter counts, and their corrected twins."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from stopfast.build import build_objective
from stopfast.config import Config, ModelConfig
from stopfast.networks import build_encoder, build_predictor
from stopfast.presets import PRESETS
from tests.golden_files import golden

PRECISE = {"rel": 1e-9, "abs": 0}
STEPS_PER_EPOCH = 625  # 2,048 of 1,281,167 images

# What the papers and the released configurations say, one row a preset.
COLUMNS = (
    "side patch width depth heads predictor_depth | encoder predictor | "
    "epochs warmup lr final_lr fixed_from | gpu_batch precision variant noise"
).replace("| ", "")
ROWS = """
ijepa-vit-b16      224 16  768 12 12  6 |   85646592 11238912 | 600 15 1e-3 1e-6  -1 | 128 bf16 ijepa .25
ijepa-vit-l16      224 16 1024 24 16 12 |  303098880 22082560 | 600 15 1e-3 1e-6  -1 | 128 bf16 ijepa .25
ijepa-vit-h14      224 14 1280 32 16 12 |  630434560 22279424 | 300 40 1e-3 1e-6  -1 | 128 bf16 ijepa .25
ijepa-vit-h16-448  448 16 1280 32 16 12 |  630664960 22279424 | 300 40 1e-3 1e-6  -1 |  16 bf16 ijepa .25
ijepa-vit-g16      224 16 1408 40 16 16 | 1011092608 29475712 |  44  3 1e-3 1e-6  -1 |  16 bf16 ijepa .25
stop-vit-b16       224 16  768 12 12  6 |   85646592 11238912 | 600 15 8e-4 1e-4  -1 |  64 bf16 stop  .25
stop-vit-l16       224 16 1024 24 16 12 |  303098880 22082560 | 600 15 8e-4 1e-4  -1 |  64 fp32 stop  .25
stop-vit-h16       224 16 1280 32 16 12 |  630664960 22279424 | 300 40 1e-3 1e-6 250 |  64 bf16 stop  .2
"""


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


FACTS = {
    name: dict(zip(COLUMNS.split(), map(_value, values), strict=True))
    for name, *values in (row.replace("|", "").split() for row in ROWS.strip().splitlines())
}
published = pytest.mark.parametrize("name", FACTS)


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_help(name):
    build = PRESETS[name]
    assert build().preset == name
    assert build.__doc__ and build.__doc__.strip() and "\n" not in build.__doc__.strip()


@published
def test_published_values(name):
    config, facts = PRESETS[name](), FACTS[name]
    model, optim, images = config.model, config.optim, config.data.transforms
    assert (model.patch_size, model.embed_dim, model.depth, model.num_heads) == tuple(
        facts[key] for key in ("patch", "width", "depth", "heads")
    )
    assert model.predictor_depth == facts["predictor_depth"]
    assert (model.predictor_embed_dim, config.jepa.target_blocks) == (384, 1)
    assert not model.init_rescale
    assert (optim.epochs, optim.clip, optim.ipe_scale) == (facts["epochs"], "none", 1)
    assert optim.fix_lr_strategy == optim.fix_wd_strategy == "const"
    assert config.data.batch_size == 2048
    assert config.data.batch_size / config.step.accumulate == facts["gpu_batch"]
    assert config.step.precision == facts["precision"]
    assert not config.step.checkpointing  # memory alone
    assert (config.noise.variant, config.noise.noise_var) == (facts["variant"], facts["noise"])
    stop = facts["variant"] == "stop"
    assert (images.flip, images.gray, images.blur) == ((0.5, 0.2, 0.5) if stop else (0, 0, 0))
    assert (images.size, images.crop_scale) == ((facts["side"],) * 2, (0.3, 1.0))
    assert images.crop_ratio == (3 / 4, 4 / 3) and images.blur_radius == (0.1, 2.0)
    assert asdict(config.jepa.mask) == {
        "enc_mask_scale": (0.85, 1.0),
        "pred_mask_scale": (0.15, 0.2),
        "aspect_ratio": (0.75, 1.5),
        "nenc": 1,
        "npred": 4,
        "min_keep": 10,
        "allow_overlap": False,
        "edge_inclusive": False,
        "truncate": "first",
        "truncate_over": "local",
    }


@pytest.mark.parametrize("name", list(FACTS))
def test_parameter_counts(name):
    """With nothing allocated. Position tables are not counted, the mask token is."""
    config = PRESETS[name]()
    with torch.device("meta"):
        models = {"encoder": build_encoder(config), "predictor": build_predictor(config)}
    for key, model in models.items():
        counted = sum(p.numel() for n, p in model.named_parameters() if "pos_embed" not in n)
        assert counted == FACTS[name][key]


def small_objective(config: Config, steps_per_epoch: int):
    """The objective of these settings with a model that is small: its schedules are the whole one's."""
    model = ModelConfig(
        embed_dim=16, depth=1, num_heads=1, predictor_embed_dim=16, predictor_depth=0
    )
    return build_objective(replace(config, model=model), steps_per_epoch)


@published
def test_schedules(name):
    """Against the published formulas, from the table above."""
    facts = {k: v for k, v in FACTS[name].items() if isinstance(v, float)}
    total, warm = (int(facts[key] * STEPS_PER_EPOCH) for key in ("epochs", "warmup"))
    fixed = int(facts["fixed_from"] * STEPS_PER_EPOCH)
    objective = small_objective(PRESETS[name](), STEPS_PER_EPOCH)

    def cosine(start: float, final: float, share: float) -> float:
        return final + (start - final) / 2 * (1 + math.cos(math.pi * share))

    # The step after the threshold shows that it is fixed, the last one that it stays so.
    steps = (1, STEPS_PER_EPOCH, warm - 1, warm, warm + 1, total // 2, fixed + 1, total - 1, total)
    for step in filter(lambda step: step > 0, steps):
        at = min(step, fixed) if fixed > 0 else step
        lr = cosine(facts["lr"], facts["final_lr"], (at - warm) / (total - warm))
        if step < warm:
            lr = 2e-4 + step / warm * (facts["lr"] - 2e-4)
        assert objective.scalars(step) == {
            "lr": pytest.approx(lr, **PRECISE),
            "weight_decay": pytest.approx(cosine(0.04, 0.4, at / total), **PRECISE),
            "momentum": pytest.approx(0.996 + (step - 1) * 0.004 / total, **PRECISE),
        }


@pytest.mark.parametrize(
    ("name", "scalar", "figures"),
    [
        (
            "stop-vit-b16",
            "lr",
            {
                1 / 625: "2.000640e-4",
                1: "2.400000e-4",
                15: "8.000000e-4",
                150: "7.119788e-4",
                300: "4.640931e-4",
                600: "1.000000e-4",
            },
        ),
        ("stop-vit-l16", "weight_decay", {15: "4.055e-2", 300: "2.200e-1", 600: "4.000e-1"}),
        (
            "stop-vit-h16",
            "lr",
            {
                1 / 625: "2.000320e-4",
                40: "1.000000e-3",
                75: "9.559940e-4",
                150: "6.200382e-4",
                250: "8.941956e-5",
                251: "8.941956e-5",
                300: "8.941956e-5",
            },
        ),
        ("stop-vit-h16", "weight_decay", {250: "3.7588e-1", 300: "3.7588e-1"}),
        (
            "ijepa-vit-l16",
            "momentum",
            {
                1 / 625: "9.9600000000e-1",
                2 / 625: "9.9600001067e-1",
                300 + 1 / 625: "9.9800000000e-1",
                600: "9.9999998933e-1",
            },
        ),
    ],
)
def test_printed_schedules(name, scalar, figures):
    """What the published programs print after so many epochs, to the last digit."""
    objective = small_objective(PRESETS[name](), STEPS_PER_EPOCH)
    for epochs, printed in figures.items():
        digits = len(printed.partition("e")[0]) - 2
        assert f"{objective.scalars(round(epochs * 625))[scalar]:.{digits}e}" == printed.replace(
            "e-", "e-0"
        )


@pytest.mark.parametrize(
    ("name", "file"), [("ijepa-vit-h14", "ijepa_schedules"), ("stop-vit-h16", "stop_schedules")]
)
def test_golden_schedules(name, file):
    """The published schedulers' own values: the files are these recipes, 100 epochs of one step long."""
    case, tensors = golden(file)
    config = PRESETS[name]()
    shorter = replace(
        config.optim,
        epochs=case["steps"],
        ipe_scale=case["T_max"] / case["steps"],
        warmup=case["warmup_steps"],
        fix_lr_thres=case.get("fix_lr_thres", config.optim.fix_lr_thres),
        fix_wd_thres=case.get("fix_wd_thres", config.optim.fix_wd_thres),
    )
    objective = small_objective(replace(config, optim=shorter), 1)
    rows = zip(tensors["lr"].tolist(), tensors["wd"].tolist(), strict=True)
    for step, (lr, weight_decay) in enumerate(rows, start=1):
        scalars = objective.scalars(step)
        assert scalars["lr"] == pytest.approx(lr, **PRECISE)
        assert scalars["weight_decay"] == pytest.approx(weight_decay, **PRECISE)


@published
def test_corrected_twin_differs_in_the_named_switches_alone(name):
    base, twin = PRESETS[name](), PRESETS[f"{name}-corrected"]()
    assert twin == replace(
        base,
        preset=f"{name}-corrected",
        model=replace(base.model, init_rescale=True),
        objective=replace(
            base.jepa,
            mask=replace(
                base.jepa.mask, edge_inclusive=True, truncate="random", truncate_over="global"
            ),
        ),
    )
