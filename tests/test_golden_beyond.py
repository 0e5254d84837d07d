"""Beyond Masking gives the published program's losses and gradients."""

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.degradations import ZoomedIn
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.objectives.reconstruction import Reconstruction, ReconstructionDraws
from stopfast.random_masks import ranked
from tests.golden_files import TOLERANCE, assert_gradients, golden, under
from tests.small_reconstruction import build, ours

FILES = {
    "beyond_zoomed-in_mask0.75": ("zoomed-in", "image_288"),
    "beyond_zoomed-in_mask0.4": ("zoomed-in", "image_288"),
    "beyond_zoomed-out_mask0.75": ("zoomed-out", "image_160"),
}


def published(name: str, ops: Ops, device: torch.device) -> tuple[Reconstruction, Tensor, dict]:
    """The objective of a file with its weights, the images, and all its tensors."""
    kind, images = FILES[name]
    case, tensors = golden(name, device)
    objective = build(
        kind,
        mask_ratio=case["mask_ratio"],
        side=224,
        patch=16,
        margin=32,
        widths=(case["encoder_embed_dim"], case["decoder_embed_dim"]),
        depths=(case["encoder_depth"], case["decoder_depth"]),
        ops=ops,
    )
    for part, state in ours(under(tensors, "state.")).items():
        module = objective.modules()[part].to(device)
        missing, unexpected = module.load_state_dict(state, strict=False)
        assert not unexpected and all("pos_embed" in key for key in missing), missing
    draws = ReconstructionDraws(
        ranked(tensors["uniform.0"]),
        torch.tensor([case["left"], case["top"]], device=device) if "left" in case else None,
        torch.tensor([0, 1], device=device),
        torch.arange(2, device=device),
    )
    return objective, tensors[images], {**tensors, "draws": draws}


@pytest.mark.spec(41)
@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)
@pytest.mark.parametrize("name", FILES)
def test_losses_and_gradients(name: str, ops: Ops, device: torch.device):
    objective, images, given = published(name, ops, device)
    with watch_launches() as launches:
        loss = objective.loss(images, given["draws"])
        loss.backward()
    assert bool(launches) == (ops is FUSED)
    degraded, draws = objective.degradation, given["draws"]
    if isinstance(degraded, ZoomedIn):
        prediction = objective.outputs(images, draws)["predictions"]
        masked = draws.order[:, objective.visible :]
        parts = degraded.losses(prediction, images, masked, ops)
        for part, expected in zip(parts, ("loss_center", "loss_edge"), strict=True):
            assert relative_error(part, given[expected]) < TOLERANCE
        given["loss"] = 0.8 * given["loss_center"] + 0.2 * given["loss_edge"]
    assert relative_error(loss, given["loss"]) < TOLERANCE
    for part, expected in ours(under(given, "grad.")).items():
        assert_gradients(objective.modules()[part], expected)
