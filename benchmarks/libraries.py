"""What computes an operation otherwise, as opponents: apex, Liger, what one would assemble of torch."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stopfast.kernels.ops import AdamWBuffers, PatchTarget, Smoothing, position_map


def library_arms(operation: str) -> Iterator[tuple[str, Callable[..., object]]]:
    """The arms of an operation by name; one whose library is absent says so when it is called."""
    yield from {
        "layer_norm": [
            ("apex FusedLayerNorm", apex_layer_norm),
            ("Liger LayerNorm", liger_layer_norm),
        ],
        "adamw_ema": [
            ("torch fused AdamW, foreach EMA, copies", TorchUpdate()),
            ("apex FusedAdam, foreach EMA, copies", ApexUpdate()),
        ],
        "position_cross_entropy": [("F.cross_entropy, kept map", KeptMap())],
        "patch_mse": [("F.mse_loss of a gathered view", gathered_patch_mse)],
    }.get(operation, [])


def apex_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    norm = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return total, norm(total, weight, bias, weight.shape, eps)


def liger_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    function = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return total, function.apply(total, weight, bias, eps)


class TorchUpdate:
    """AdamW(fused=True), then the average and the copies by foreach, over the same flat buffers."""

    def __init__(self) -> None:
        self.optimizer: Any = None

    def build(self, parameter: torch.nn.Parameter, scalars: Tensor) -> Any:  # noqa: ANN401
        lr, decay, _, _, beta1, beta2, eps = scalars.tolist()
        return torch.optim.AdamW(
            [parameter], lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, fused=True
        )

    def __call__(
        self,
        buffers: AdamWBuffers,
        scalars: Tensor,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        if self.optimizer is None:
            parameter = torch.nn.Parameter(buffers.param)
            parameter.grad = buffers.grad.to(buffers.param.dtype)
            self.optimizer = self.build(parameter, scalars)
            self.rest = 1 - float(scalars[2])
        self.optimizer.step()
        copies = [(buffers.param, buffers.param_copy)]
        if buffers.average is not None:
            torch._foreach_lerp_([buffers.average], [buffers.param], self.rest)  # type: ignore[attr-defined]
            copies.append((buffers.average, buffers.average_copy))
        for source, target in copies:
            if target is not None:
                torch._foreach_copy_([target], [source])  # type: ignore[attr-defined]


class ApexUpdate(TorchUpdate):
    """The same with NVIDIA apex's FusedAdam."""

    def build(self, parameter: torch.nn.Parameter, scalars: Tensor) -> Any:  # noqa: ANN401
        lr, decay, _, _, beta1, beta2, eps = scalars.tolist()
        fused_adam = import_module("apex.optimizers").FusedAdam
        return fused_adam(
            [parameter], lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, adam_w_mode=True
        )


class KeptMap:
    """Rows of a map that is made once, as one can while sigma stays, and torch's soft cross-entropy."""

    def __init__(self) -> None:
        self.maps: dict[tuple[Smoothing, int], Tensor] = {}

    def __call__(
        self, logits: Tensor, index: Tensor, weight: Tensor, sigma: Tensor, smoothing: Smoothing
    ) -> Tensor:
        kind = (smoothing, logits.shape[-1])
        if kind not in self.maps:
            self.maps[kind] = position_map(smoothing, sigma)[: kind[1], : kind[1]].contiguous()
        labels = self.maps[kind][index].flatten(0, 1)
        each = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none")
        return torch.dot(each, weight.flatten()) / weight.sum()


def gathered_patch_mse(
    prediction: Tensor, images: Tensor, index: Tensor | None, target: PatchTarget
) -> Tensor:
    """Only the patches that are wanted, taken out of a view of the images."""
    side = target.patch_size
    view = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
    if index is None:
        patches = view.flatten(1, 2).float()
    else:
        across = view.shape[2]
        image = torch.arange(len(index), device=index.device)[:, None]
        patches = view[image, index // across, index % across].float()
    if target.norm != "none":
        axes = (2, 3, 4) if target.norm == "patch" else (2, 3)
        variance, mean = torch.var_mean(patches, axes, keepdim=True)
        if target.norm == "patch":
            scale = (variance + target.eps[0]).rsqrt()
        else:
            eps = torch.cat([mean.new_full((1,), each) for each in target.eps])
            scale = (variance.sqrt() + eps).reciprocal()
        patches = (patches - mean) * scale
    return F.mse_loss(prediction.float(), patches.flatten(2))
