"""DropPos gives the published program's numbers: loss, accuracy and every gradient."""

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.ops import EAGER, FUSED, Ops
from stopfast.objectives.droppos import DropPos, DropPosDraws
from stopfast.random_masks import ranked
from tests.golden_files import TOLERANCE, assert_gradients, golden, under
from tests.small_droppos import build

FILES = (
    "droppos",
    "droppos_plain",
    "droppos_sigma_half",
    "droppos_zeros_token",
    "droppos_multitask",
)
_PIXELS = {"decoder_embed": "embed", "decoder_blocks": "blocks", "decoder_norm": "norm",
           "decoder_pred": "proj", "decoder_pos_embed": "pos_embed"}  # fmt: skip


def by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The published program's one module as our three."""
    found: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "pixel_decoder": {}}
    for key, value in tensors.items():
        first, dot, rest = key.partition(".")
        if first.startswith("aux_"):
            name = "predictor_" + _PIXELS[first.removeprefix("aux_")]
            found["pixel_decoder"][name + dot + rest] = value
        elif first == "mask_token":
            found["pixel_decoder"][key] = value
        else:
            own = first.startswith("decoder") or first == "mask_pos_token"
            found["decoder" if own else "encoder"][key] = value
    return {name: part for name, part in found.items() if part}


def replayed(name: str, ops: Ops, device: torch.device) -> tuple[DropPos, DropPosDraws, dict]:
    case, tensors = golden(name, device)
    objective = build(
        ops=ops,
        sigma=case["sigma"],
        sigma_decay=False,
        smoothing_norm="released",
        position_mask_ratio=case["pos_mask_ratio"],
        position_token=case.get("mask_token_type", "param"),
        attentive=case["attn_guide"],
        multi_task=case.get("multi_task", False),
    )
    states = by_module(under(tensors, "state."))
    assert states.keys() == objective.modules().keys()
    for key, module in objective.modules().items():
        module.to(device).load_state_dict(states[key])
    draws = objective.draws(1, len(tensors["imgs"]), slice(0, len(tensors["imgs"])))
    draws = draws._replace(
        order=ranked(tensors["uniform.0"]), position_order=ranked(tensors["uniform.1"])
    )
    return objective, draws, tensors


@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=lambda ops: ops.name)
@pytest.mark.parametrize("name", FILES)
def test_loss_and_gradients(name: str, ops: Ops, device: torch.device):
    """Every tensor within 1e-5 of the norm of its gradient; none of these gradients is exactly zero."""
    objective, draws, tensors = replayed(name, ops, device)
    with watch_launches() as launches:
        loss = objective.loss(tensors["imgs"], draws)
        loss.backward()
    names = {launch.name for launch in launches}
    assert ("_position_kernel" in names) == bool(names) == (ops is FUSED)
    expected = tensors["loss_position"]
    if "loss_mae" in tensors:
        expected = 0.05 * expected + tensors["loss_mae"]
    assert relative_error(loss, expected) < TOLERANCE
    for key, gradients in by_module(under(tensors, "grad.")).items():
        assert min(gradient.norm() for gradient in gradients.values()) > 1e-3
        assert_gradients(objective.modules()[key], gradients)
    if ops is FUSED:
        return  # the accuracy is no operation's, and the interpreter is slow
    accuracy = objective.measures(tensors["imgs"], draws)["position_accuracy_weighted"]
    assert relative_error(accuracy, tensors["position_accuracy"]) < TOLERANCE
