"""A training program put together from torch's own parts, written from a description of the published ones.

Independent of stopfast's modules, schedules and optimiser, so that an agreement means something.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.step.published_model import (
    Checkpointing,
    PublishedEncoder,
    PublishedPredictor,
    published_targets,
    smooth_l1,
)
from benchmarks.step.workload import STEPS_PER_EPOCH, Workload
from stopfast.config import OptimConfig
from stopfast.masking import Masks

_AUTOCAST = torch.bfloat16


class Networks(NamedTuple):
    """What is trained, and the encoder's average."""

    encoder: PublishedEncoder
    predictor: PublishedPredictor
    target_encoder: PublishedEncoder


def build_networks(
    workload: Workload, *, sdpa: bool, checkpointing: Checkpointing, repeat_tables: bool
) -> Networks:
    """Return the networks of a workload with its weights, on its device.

    Raises:
        ValueError: settings that the published StoP program does not have.
    """
    config = workload.config
    model, noise = config.model, config.noise
    if noise.variant != "stop" or noise.apply_to != "masked" or config.jepa.target_blocks != 1:
        raise ValueError(f"expected the published StoP, got {noise} and {model}")
    side = config.data.transforms.size[0]
    encoder = partial(
        PublishedEncoder,
        (side,),
        model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        sdpa=sdpa,
        checkpointing=checkpointing,
    )
    predictor = PublishedPredictor(
        (side // model.patch_size) ** 2,
        model.embed_dim,
        model.predictor_embed_dim,
        model.predictor_depth,
        model.num_heads,
        model.predictor_mlp_ratio,
        apply_stop=True,
        noise_var=noise.noise_var,
        sdpa=sdpa,
        repeat_tables=repeat_tables,
        checkpointing=checkpointing,
    )
    networks = Networks(encoder(), predictor, encoder())
    for name, module in networks._asdict().items():
        module.load_state_dict(workload.weights[name], strict=True)
        module.to(workload.device)
    networks.target_encoder.requires_grad_(False)
    return networks


def decay_groups(networks: Networks) -> list[dict[str, object]]:
    """AdamW's groups in the published order: decayed of both, then biases and vectors of both."""
    groups: list[dict[str, object]] = []
    for decayed in (True, False):
        for module in (networks.encoder, networks.predictor):
            chosen = [
                parameter
                for name, parameter in module.named_parameters()
                if ("bias" not in name and parameter.ndim > 1) == decayed
            ]
            groups.append({"params": chosen, "decayed": decayed})
    return groups


class Scalars(NamedTuple):
    """Numbers of one step."""

    lr: float
    weight_decay: float
    momentum: float


def published_scalars(optim: OptimConfig, number: int) -> Scalars:
    """Return the numbers of step 1, 2, ..., before the epoch from which a schedule may stand still."""
    total = optim.ipe_scale * optim.epochs * STEPS_PER_EPOCH
    warmup = int(optim.warmup * STEPS_PER_EPOCH)

    def cosine(start: float, final: float, progress: float) -> float:
        return final + (start - final) / 2 * (1 + math.cos(math.pi * progress))

    lr = optim.start_lr + number / max(warmup, 1) * (optim.lr - optim.start_lr)
    if number >= warmup:
        lr = cosine(optim.lr, optim.final_lr, (number - warmup) / (total - warmup))
    low, high = optim.ema
    return Scalars(
        lr,
        cosine(optim.weight_decay, optim.final_weight_decay, number / total),
        low + (number - 1) * (high - low) / total,
    )


class Program:
    """The published computation without its needless costs.

    Library attention, nothing recomputed, tables not repeated, torch's fused AdamW, the average in one
    call, bf16 without a loss scale, and nothing read by the host.
    """

    def __init__(self, workload: Workload, networks: Networks | None = None) -> None:
        self.workload = workload
        self.device = workload.device
        self._images = workload.pixels
        self.networks = networks or build_networks(
            workload, sdpa=True, checkpointing="none", repeat_tables=False
        )
        self.optimizer = self._optimizer(decay_groups(self.networks))
        encoder, _, target = self.networks
        self._online: list[Tensor] = list(encoder.parameters())
        self._average: list[Tensor] = list(target.parameters())

    def step(self, number: int, noise: list[Tensor] | None = None) -> Tensor:
        """Take one optimiser step."""
        scalars = published_scalars(self.workload.config.optim, number)
        self._set_scalars(scalars)
        loss = self._take(self._masks(self.workload.masks_of(number)), noise)
        self._follow(scalars.momentum)
        return loss

    def weights(self) -> dict[str, Tensor]:
        """Weights by part and published key."""
        return {
            f"{part}.{name}": value
            for part, module in self.networks._asdict().items()
            for name, value in module.state_dict().items()
        }

    def moments(self) -> dict[str, Tensor]:
        """AdamW's first moments of what has one."""
        return {
            f"{part}.{name}": self.optimizer.state[parameter]["exp_avg"]
            for part, module in self.networks._asdict().items()
            for name, parameter in module.named_parameters()
            if "exp_avg" in self.optimizer.state.get(parameter, {})
        }

    def counts(self) -> dict[str, int]:
        """Nothing is compiled or captured."""
        return {"compilations": 0, "graphs": 0}

    def choices(self) -> dict[str, str]:
        """Nothing is measured."""
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def _optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True)

    def _set_scalars(self, scalars: Scalars) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = scalars.lr
            group["weight_decay"] = scalars.weight_decay if group["decayed"] else 0.0

    def _masks(self, masks: Masks) -> Masks:
        context, target = (
            [mask.to(self.device, non_blocking=True) for mask in group]
            for group in (masks.context, masks.target)
        )
        return Masks(context, target)

    def _take(self, masks: Masks, noise: list[Tensor] | None) -> Tensor:
        """Loss, gradients and update."""
        loss = self._forward(masks, noise)
        self._update(loss)
        return loss.detach()

    def _forward(self, masks: Masks, noise: list[Tensor] | None) -> Tensor:
        enabled = self.workload.precision == "bf16"
        with torch.autocast(self.device.type, _AUTOCAST, enabled=enabled):
            return self._loss(masks, noise)

    def _loss(self, masks: Masks, noise: list[Tensor] | None) -> Tensor:
        encoder, predictor, target_encoder = self.networks
        with torch.no_grad():
            features = target_encoder(self._images)
            wanted = published_targets(features, masks.target, len(masks.context))
        context = encoder(self._images, masks.context)
        return smooth_l1(predictor(context, masks.context, masks.target, noise), wanted)

    def _update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        torch._foreach_lerp_(self._average, self._online, 1.0 - momentum)  # type: ignore[attr-defined]
