"""Arms with libraries beside torch: xformers' attention, NVIDIA apex's norms and optimiser."""

from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.engine.refusals import NotHere
from benchmarks.step.arms.assembled import Compiled
from benchmarks.step.arms.program import Program, build_networks
from benchmarks.step.workload import Workload
from stopfast.env import has_symbol


def _require(workload: Workload, module: str, symbol: str) -> None:
    if workload.device.type != "cuda":
        raise NotHere("no GPU")
    if not has_symbol(module, symbol):
        raise NotHere(f"{module}.{symbol} is not installed")


def xformers_arm(workload: Workload) -> Compiled:
    """The compiled arm with xformers' attention.

    Raises:
        NotHere: no GPU, or no xformers.
    """
    _require(workload, "xformers.ops", "memory_efficient_attention")
    attention = import_module("xformers.ops").memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # It wants [B, N, heads, d].
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return attention(q, k, v, attn_bias=bias).transpose(1, 2)

    return Compiled(workload, attend)


class Apex(Program):
    """The program without needless costs, with apex's fused LayerNorm and AdamW, not compiled."""

    def __init__(self, workload: Workload) -> None:
        _require(workload, "apex.optimizers", "FusedAdam")
        _require(workload, "apex.normalization", "FusedLayerNorm")
        networks = build_networks(workload, sdpa=True, checkpointing="none", repeat_tables=False)
        for network in networks:
            _replace_norms(network)
        super().__init__(workload, networks)

    def _optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True)


def _replace_norms(module: nn.Module) -> None:
    fused = import_module("apex.normalization").FusedLayerNorm
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            norm = fused(child.normalized_shape, eps=child.eps).to(child.weight.device)
            norm.load_state_dict(child.state_dict())
            norm.requires_grad_(child.weight.requires_grad)
            setattr(module, name, norm)
        else:
            _replace_norms(child)
