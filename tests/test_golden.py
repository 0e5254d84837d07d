"""I-JEPA and StoP give the published programs' numbers: outputs, losses, gradients, weights."""

import pytest
import torch

from benchmarks.engine.agreement import relative_error
from stopfast import MultiBlockMasks, Predictor, VisionTransformer
from stopfast.config import Transforms
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.masking import Masks
from stopfast.objectives.jepa import Jepa, JepaDraws
from stopfast.optim import UpdateRule
from stopfast.schedules import Cosine
from stopfast.step import TrainStep
from tests.golden_files import TOLERANCE, assert_gradients, golden, listed, norm_1e6, under

PREDICTORS = (
    "ijepa_predictor_nenc1",
    "ijepa_predictor_nenc2",
    "stop_predictor",
    "stop_predictor_off",
    "stop_predictor_learned_pos",
)


WAYS = pytest.mark.parametrize(
    ("ops", "skip_unused"),
    [(EAGER, True), (EAGER, False), (FUSED, True), (FUSED, False)],
    ids=["eager", "eager-all", "fused", "fused-all"],
)


@pytest.fixture
def launched(ops: Ops):
    """The names of the kernels that ran; some did exactly where the operations are the fused ones."""
    names: set[str] = set()
    with watch_launches() as launches:
        yield names
    names |= {launch.name for launch in launches}
    assert bool(names) == (ops is FUSED)


@WAYS
@pytest.mark.parametrize("name", PREDICTORS)
def test_predictor(name: str, ops: Ops, skip_unused: bool, launched: set, device: torch.device):
    case, tensors = golden(name, device)
    sizes = {
        key: case[key]
        for key in ("num_patches", "embed_dim", "predictor_embed_dim", "depth", "num_heads")
    }
    switches = {
        key: case[key] for key in ("apply_stop", "noise_var", "learned_pos_emb") if key in case
    }
    predictor = Predictor(
        **sizes, norm_layer=norm_1e6, skip_unused=skip_unused, ops=ops, **switches
    ).to(device)
    predictor.load_state_dict(under(tensors, "state."))
    x = tensors["x"].requires_grad_()
    noise = listed(tensors, "noise") or None
    out = predictor(x, listed(tensors, "masks_x"), listed(tensors, "masks"), noise=noise)
    (out * tensors["cotangent"]).sum().backward()
    assert relative_error(out, tensors["out"]) < TOLERANCE
    assert relative_error(x.grad, tensors["grad_x"]) < TOLERANCE
    assert_gradients(predictor, under(tensors, "grad."))


@WAYS
def test_encoder(ops: Ops, skip_unused: bool, launched: set, device: torch.device):
    case, tensors = golden("ijepa_encoder", device)
    encoder = VisionTransformer(
        img_size=[case["img_size"]],
        **{key: case[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")},
        norm_layer=norm_1e6,
        skip_unused=skip_unused,
        ops=ops,
    ).to(device)
    encoder.load_state_dict(under(tensors, "state."))
    assert relative_error(encoder(tensors["imgs"]), tensors["out_full"]) < TOLERANCE
    out = encoder(tensors["imgs"], listed(tensors, "masks_x"))
    (out * tensors["cotangent"]).sum().backward()
    assert relative_error(out, tensors["out_context"]) < TOLERANCE
    assert_gradients(encoder, under(tensors, "grad."))


@WAYS
def test_training_steps(ops: Ops, skip_unused: bool, launched: set, device: torch.device):
    case, tensors = golden("stop_training_steps", device)
    shape = {key: case[key] for key in ("embed_dim", "depth", "num_heads")}
    encoder = VisionTransformer(
        img_size=[case["img_size"]],
        patch_size=case["patch_size"],
        norm_layer=norm_1e6,
        skip_unused=skip_unused,
        ops=ops,
        **shape,
    )
    predictor = Predictor(
        num_patches=16,
        predictor_embed_dim=case["predictor_embed_dim"],
        norm_layer=norm_1e6,
        apply_stop=case["apply_stop"],
        noise_var=case["noise_var"],
        skip_unused=skip_unused,
        ops=ops,
        **shape,
    )
    encoder.load_state_dict(under(tensors, "init.encoder."))
    predictor.load_state_dict(under(tensors, "init.predictor."))

    class Replayed(Jepa):
        def draws(self, step: int, batch_size: int, part: slice) -> JepaDraws:
            at = f"step{step - 1}."
            masks = Masks(listed(tensors, f"{at}masks_x"), listed(tensors, f"{at}masks"))
            seed = torch.tensor([0, step], device=device)
            ids = torch.arange(batch_size, device=device)
            return JepaDraws(masks, seed, ids, listed(tensors, f"{at}noise"))

    objective = Replayed(
        encoder,
        predictor,
        MultiBlockMasks(grid=(4, 4), min_keep=1),
        transforms=Transforms(),
        update=UpdateRule(
            lr=lambda step: 1e-3,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: case["ema_momentum"][step - 1],
        ),
        target_blocks=case["target_blocks"],
        skip_unused=skip_unused,
        ops=ops,
    )
    step = TrainStep(objective, device=device)
    for number, expected in enumerate(tensors["losses"], start=1):
        loss = step(tensors[f"step{number - 1}.imgs"], number).loss
        assert relative_error(loss, expected) < TOLERANCE
    for name, module in objective.modules().items():
        state = module.state_dict()
        expected = under(tensors, f"final.{name}.")
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(state[key], value) < TOLERANCE, f"{name}.{key}"


@pytest.mark.parametrize("name", ["ijepa_schedules", "stop_schedules"])
def test_schedules(name: str):
    case, tensors = golden(name)
    lr = Cosine(
        start=case["start_lr"],
        reference=case["ref_lr"],
        final=case["final_lr"],
        warmup_steps=case["warmup_steps"],
        total_steps=case["T_max"],
        fix_step=case.get("fix_lr_thres"),
    )
    weight_decay = Cosine(
        reference=case["ref_wd"],
        final=case["final_wd"],
        total_steps=case["T_max"],
        fix_step=case.get("fix_wd_thres"),
    )
    for schedule, values in ((lr, tensors["lr"]), (weight_decay, tensors["wd"])):
        for step, expected in enumerate(values.tolist(), start=1):
            assert schedule(step) == pytest.approx(expected, rel=1e-9)


def test_masks():
    """Block sizes exactly; lengths and coverage within sampling error of the published sampler's."""
    case, tensors = golden("ijepa_multiblock_masks")
    keys = ("enc_mask_scale", "pred_mask_scale", "aspect_ratio", "nenc", "npred", "min_keep")
    sampler = MultiBlockMasks(grid=(case["grid"],) * 2, **{key: case[key] for key in keys})
    counts = {"context": torch.zeros(196), "target": torch.zeros(196)}
    lengths = []
    for iteration, sizes in enumerate(tensors["block_sizes_p_h_w_e_h_w"].tolist()):
        drawn = sampler.sizes(iteration)
        assert [*drawn.target, *drawn.context] == sizes
        masks = sampler(case["batch"], iteration)
        for kind, lists in (("context", masks.context), ("target", masks.target)):
            for mask in lists:
                counts[kind] += torch.bincount(mask.flatten(), minlength=196)
        lengths.append([masks.context[0].shape[1], masks.target[0].shape[1]])
    got, expected = torch.tensor(lengths).double(), tensors["n_context_n_target"].double()
    assert torch.equal(got[:, 1], expected[:, 1])
    deviation = (got[:, 0] - expected[:, 0]).std() / len(got) ** 0.5
    assert (got[:, 0].mean() - expected[:, 0].mean()).abs() < 4 * deviation
    for kind, got_count in counts.items():
        reference = tensors[f"{kind}_count_per_patch"]
        assert torch.equal(got_count == 0, reference == 0)
        # Distance of two samples of this size; a shift by one patch is at 0.05 or more.
        shares = [count / count.sum() for count in (got_count, reference)]
        assert (shares[0] - shares[1]).abs().sum() / 2 < 0.02
