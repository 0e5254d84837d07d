"""The objective and the step: targets, average, groups, schedules, accumulation, precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.engine.agreement import relative_error
from benchmarks.step.published_model import (
    PublishedEncoder,
    PublishedPredictor,
    published_ema,
    published_targets,
    smooth_l1,
)
from stopfast import MultiBlockMasks, Predictor, VisionTransformer
from stopfast.config import StepConfig, Transforms
from stopfast.objectives.jepa import Jepa
from stopfast.optim import (
    OptimizerRecipe,
    UpdateRule,
    clip_gradients,
    parameter_groups,
    set_scalars,
    update_teacher,
)
from stopfast.schedules import Cosine, LinearMomentum
from stopfast.step import TrainStep
from tests.golden_files import norm_1e6


def build(skip_unused: bool = True, masks: dict | None = None, **settings: Any) -> Jepa:
    torch.manual_seed(0)
    noise = settings.pop("noise", {"apply_stop": True})
    shape = dict(embed_dim=32, depth=2, num_heads=2, norm_layer=norm_1e6, skip_unused=skip_unused)
    checkpointing = settings.pop("checkpointing", False)
    update: dict[str, Any] = {
        "lr": lambda step: 1e-3,
        "weight_decay": lambda step: 0.04,
        "momentum": lambda step: 0.9,
    }
    for name in {"lr", "momentum", "clip", "clip_norm"} & settings.keys():
        update[name] = settings.pop(name)
    return Jepa(
        VisionTransformer(img_size=[48], patch_size=8, checkpointing=checkpointing, **shape),
        Predictor(
            num_patches=36, predictor_embed_dim=16, checkpointing=checkpointing, **shape, **noise
        ),
        MultiBlockMasks(grid=(6, 6), **{"min_keep": 3, **(masks or {})}),
        transforms=Transforms(),
        update=UpdateRule(**update),
        **{"skip_unused": skip_unused, **settings},
    )


def images(batch: int = 8) -> Tensor:
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(5))


def weights(objective: Jepa) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in objective.modules().items()
        for key, value in module.state_dict().items()
    }


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert relative_error(second[key], value) < tolerance, key


@pytest.mark.spec(11)
def test_target_encoder_follows_without_gradient():
    objective = build(momentum=lambda step: 0.996)
    before = copy.deepcopy(objective.encoder)
    update_teacher(objective.target_encoder, objective.encoder, 0.996)
    for teacher, student in zip(
        objective.target_encoder.parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(teacher, student)  # equal ones stay as they are
    TrainStep(objective)(images(), 1)
    for teacher, old, new in zip(
        objective.target_encoder.parameters(),
        before.parameters(),
        objective.encoder.parameters(),
        strict=True,
    ):
        assert teacher.grad is None and not teacher.requires_grad
        assert torch.allclose(teacher - old, (1 - 0.996) * (new - old), atol=1e-7)
    moved = objective.encoder.state_dict()["norm.weight"] - before.state_dict()["norm.weight"]
    assert moved.abs().max() > 1e-4


def test_teacher_stays_in_single_precision():
    student = nn.Linear(2, 2).bfloat16()
    with pytest.raises(ValueError, match="fp32"):
        update_teacher(copy.deepcopy(student), student, 0.996)


@pytest.mark.spec(13)
def test_groups():
    """Biases and vectors are not decayed; a mask token and learned positions are, as published."""
    predictor = Predictor(36, 32, 16, 2, 2, learned_pos_emb=True)
    encoder = VisionTransformer(img_size=[48], patch_size=8, embed_dim=32, depth=2, num_heads=2)
    groups = parameter_groups([encoder, predictor])
    assert [group["decayed"] for group in groups] == [True, True, False, False]
    names = {id(p): n for module in (encoder, predictor) for n, p in module.named_parameters()}
    placed = {names[id(p)]: group["decayed"] for group in groups for p in group["params"]}
    trainable = {
        n for m in (encoder, predictor) for n, p in m.named_parameters() if p.requires_grad
    }
    assert placed.keys() == trainable
    for name, decayed in placed.items():
        assert decayed != (name.endswith("bias") or "norm" in name), name
    assert placed["mask_token"] and placed["predictor_pos_embed"] and "pos_embed" not in placed
    optimizer = torch.optim.AdamW(groups, lr=0)
    set_scalars(optimizer, {"lr": 0.5, "weight_decay": 0.1})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


IPE = 625
PUBLISHED_LR = Cosine(
    start=2e-4, reference=8e-4, final=1e-4, warmup_steps=15 * IPE, total_steps=600 * IPE
)
PUBLISHED_WD = Cosine(reference=0.04, final=0.4, total_steps=600 * IPE)
HUGE_LR = Cosine(
    start=2e-4,
    reference=1e-3,
    final=1e-6,
    warmup_steps=40 * IPE,
    total_steps=300 * IPE,
    fix_step=250 * IPE,
)
HUGE_WD = Cosine(reference=0.04, final=0.4, total_steps=300 * IPE, fix_step=250 * IPE)


@pytest.mark.spec(13)
@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (PUBLISHED_LR, 1, 2.000640e-4),
        (PUBLISHED_LR, IPE, 2.4e-4),
        (PUBLISHED_LR, 15 * IPE, 8e-4),
        (PUBLISHED_LR, 150 * IPE, 7.119788e-4),
        (PUBLISHED_LR, 300 * IPE, 4.640931e-4),
        (PUBLISHED_LR, 600 * IPE, 1e-4),
        (PUBLISHED_LR, 700 * IPE, 1e-4),
        (PUBLISHED_WD, 15 * IPE, 0.0405549),
        (PUBLISHED_WD, 300 * IPE, 0.22),
        (PUBLISHED_WD, 600 * IPE, 0.40),
        (HUGE_LR, 1, 2.000320e-4),
        (HUGE_LR, 40 * IPE, 1e-3),
        (HUGE_LR, 75 * IPE, 9.559940e-4),
        (HUGE_LR, 150 * IPE, 6.200382e-4),
    ],
)
def test_schedule_points(schedule: Cosine, step: int, expected: float):
    assert schedule(step) == pytest.approx(expected, rel=2e-5)


@pytest.mark.spec(13)
def test_momentum_points():
    momentum = LinearMomentum(start=0.996, end=1.0, total_steps=600 * IPE)
    assert momentum(1) == 0.996
    assert momentum(2) == pytest.approx(0.99600001067, abs=1e-11)
    assert momentum(300 * IPE + 1) == pytest.approx(0.998, abs=1e-9)
    assert momentum(600 * IPE) == pytest.approx(0.99999998933, abs=1e-11)


@pytest.mark.spec(26)
def test_thresholds():
    for step in (250 * IPE, 260 * IPE, 300 * IPE):
        assert HUGE_LR(step) == pytest.approx(8.941956e-5, rel=1e-6)
        assert HUGE_WD(step) == pytest.approx(0.37588, abs=5e-6)
    assert HUGE_LR(250 * IPE - 1) > HUGE_LR(250 * IPE)
    straight = Cosine(reference=1.0, final=0.0, total_steps=100, fix_step=50, fix_strategy="linear")
    assert [straight(step) for step in (50, 75, 100)] == pytest.approx([0.5, 0.25, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 5, "total_steps": 5, "start": 0.0}, "warmup_steps"),
        ({"warmup_steps": 1, "total_steps": 5}, "start"),
        ({"total_steps": 5, "fix_step": 5}, "fix_step"),
    ],
)
def test_bad_schedules(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Cosine(reference=1.0, final=0.0, **settings)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target_blocks", [1, 2])
@pytest.mark.parametrize("scale", [(0.15, 0.2), (0.34, 0.36)])
def test_skipped_work_changes_nothing(scale, target_blocks: int, checkpointing: bool):
    """Loss and gradients, whether targets are fewer rows than the grid has or more."""
    results = []
    for skip_unused in (False, True):
        objective = build(
            skip_unused,
            masks={"pred_mask_scale": scale, "npred": 3, "min_keep": 0, "allow_overlap": True},
            target_blocks=target_blocks,
            checkpointing=checkpointing and skip_unused,
        )
        # Encoder and target encoder start equal; apart, a mix-up of them shows.
        for parameter in objective.target_encoder.parameters():
            parameter.data += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
        loss = objective.loss(images(), objective.draws(1, 8, slice(0, 8)))
        loss.backward()
        trained = (objective.encoder, objective.predictor)
        results.append(
            {"loss": loss.detach()}
            | {
                f"{i}.{n}": p.grad
                for i, m in enumerate(trained)
                for n, p in m.named_parameters()
                if p.requires_grad
            }
        )
    assert_close(*results, tolerance=1e-5)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_accumulation(scope: str):
    """With the whole batch's mask length, four micro-batches are the big batch; without, they are not."""
    results = []
    for accumulate in (1, 4):
        objective = build(masks={"truncate_over": scope})
        step = TrainStep(objective, StepConfig(accumulate=accumulate))
        losses = torch.stack([step(images(), number).loss for number in (1, 2, 3)])
        results.append({"losses": losses, **weights(objective)})
    if scope == "global":
        assert relative_error(results[1]["losses"], results[0]["losses"]) < 1e-6
        # Adam divides by small second moments, so rounding grows a little over three steps.
        assert_close(*results, tolerance=2e-5)
    else:
        assert relative_error(results[1]["losses"], results[0]["losses"]) > 1e-5


@pytest.mark.spec(24)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision: str):
    """Half precision follows fp32, weights and average stay fp32, and no step is skipped."""
    losses = {}
    for name in ("fp32", precision):
        objective = build()
        step = TrainStep(objective, StepConfig(precision=name))  # pyright: ignore
        losses[name] = torch.stack([step(images(), number).loss for number in (1, 2, 3, 4)])
        assert step.skipped == 0
        assert {value.dtype for value in weights(objective).values()} == {torch.float32}
    assert relative_error(losses[precision].float(), losses["fp32"]) < 0.02


def test_overflow_skips_the_whole_step():
    """fp16: gradients that overflow change neither weights nor average, and are counted."""
    objective = build()
    step = TrainStep(objective, StepConfig(precision="fp16"))
    step(images(), 1)
    before = weights(objective)
    step.scaler.update(new_scale=2.0**60)
    step(images(), 2)
    assert step.skipped == 1
    assert_close(before, weights(objective), tolerance=1e-12)
    scale = step.scaler.get_scale()
    assert scale < 2.0**60


@pytest.mark.parametrize(
    ("clip", "norms"),
    [
        ("none", [5.0, 0.5, 10.0]),
        ("global", [0.446, 0.0446, 0.892]),
        ("per_tensor", [1.0, 0.5, 1.0]),
    ],
)
def test_clipping(clip: str, norms: list[float]):
    parameters = [nn.Parameter(torch.zeros(4)) for _ in norms]
    for parameter, norm in zip(parameters, (5.0, 0.5, 10.0), strict=True):
        parameter.grad = torch.full((4,), norm / 2)
    clip_gradients(OptimizerRecipe(groups=[], clip=clip, clip_norm=1.0, clipped=parameters))  # pyright: ignore
    got = [p.grad.norm().item() for p in parameters if p.grad is not None]
    assert got == pytest.approx(norms, rel=2e-3)


def test_clipping_of_the_encoder_alone():
    encoder_only, everything = (
        build(clip="global", clip_encoder_only=only).optimizer_recipe().clipped
        for only in (True, False)
    )
    assert 0 < len(encoder_only) < len(everything)


def test_parts_must_fit():
    predictor = Predictor(36, 32, 16, 1, 2)
    encoder = VisionTransformer(img_size=[48], patch_size=8, embed_dim=32, depth=1, num_heads=2)
    update = UpdateRule(lr=lambda step: 0.0, weight_decay=lambda step: 0.0)
    with pytest.raises(ValueError, match="one grid"):
        Jepa(encoder, predictor, MultiBlockMasks(), transforms=Transforms(), update=update)
    with pytest.raises(ValueError, match="width 32"):
        Jepa(
            encoder,
            Predictor(36, 64, 16, 1, 2),
            MultiBlockMasks(grid=(6, 6), min_keep=3),
            transforms=Transforms(),
            update=update,
        )
    with pytest.raises(ValueError, match="3 divides"):
        TrainStep(build(), StepConfig(accumulate=3))(images(), 1)


FOREIGN = [{}, {"apply_stop": True}, {"apply_stop": False}]


@pytest.mark.parametrize("settings", FOREIGN)
def test_foreign_loop(settings: dict):
    """A loop of plain modules gives the same losses when its predictor is imported from stopfast.

    StoP's draws are given, the same to both, since torch's generator and ours draw different noise.
    """

    def train(predictor_class: type[nn.Module]) -> list[float]:
        torch.manual_seed(0)
        shape = dict(embed_dim=32, depth=2, num_heads=2, norm_layer=norm_1e6)
        encoder = PublishedEncoder(img_size=[48], patch_size=8, **shape)
        target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        plain = PublishedPredictor(num_patches=36, predictor_embed_dim=16, **shape, **settings)
        predictor = predictor_class(num_patches=36, predictor_embed_dim=16, **shape, **settings)
        predictor.load_state_dict(plain.state_dict())
        modules = (encoder, predictor)
        optimizer = torch.optim.AdamW(
            [p for m in modules for p in m.parameters() if p.requires_grad], lr=2e-3
        )
        losses = []
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(4, 3, 48, 48, generator=generator)
            order = torch.stack([torch.randperm(36, generator=generator) for _ in range(4)])
            masks_x, masks = [order[:, :9], order[:, 9:18]], [order[:, 20:26], order[:, 26:32]]
            with torch.no_grad():
                target = published_targets(target_encoder(batch), masks, len(masks_x))
            given = {}
            if settings.get("apply_stop"):
                given["noise"] = [0.25 * torch.randn(8, 6, 32, generator=generator) for _ in masks]
            out = predictor(encoder(batch, masks_x), masks_x, masks, **given)
            loss = smooth_l1(out, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            published_ema(encoder, target_encoder, 0.99)
            losses.append(loss.item())
        return losses

    published, ours = train(PublishedPredictor), train(Predictor)
    assert ours == pytest.approx(published, rel=1e-5)
    assert abs(published[-1] - published[0]) > 1e-3 * published[0]
