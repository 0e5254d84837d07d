"""One step of fine-tuning: groups with layer decay, schedule, mixing, loss, update."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stopfast.finetuning.chance import Stream, seed_device
from stopfast.finetuning.data import Labelled
from stopfast.finetuning.settings import Recipe
from stopfast.schedules import Cosine
from stopfast.step import autocast


def decayed_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return timm's parameter groups, each with the ``lr_scale`` of its layer.

    Layer 0 is the stem, then comes a layer for each block, then the head with the norm after the
    average; a norm before the average goes with the last block. A layer's scale is ``layer_decay`` to
    the number of layers above it. Tensors of one dimension, positions and class
    token have no weight decay.
    """
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    return param_groups_layer_decay(
        model,
        weight_decay=recipe.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),  # type: ignore[operator]
        layer_decay=recipe.layer_decay,
    )


def rate_schedule(recipe: Recipe, steps_per_epoch: int) -> Cosine:
    """Return the learning rate of step 1, 2, ...: a linear warm-up, then half a cosine to ``min_lr``.

    With a warm-up the very first step has rate 0, as published.
    """
    return Cosine(
        reference=recipe.top_lr,
        final=recipe.min_lr,
        total_steps=recipe.epochs * steps_per_epoch,
        start=0.0,
        warmup_steps=round(recipe.warmup * steps_per_epoch),
        counted_before=1,
        warmup_arrives=recipe.schedule == "beit",
    )


class FinetuneStep:
    """Forward, backward and update of a classifier; a pure function of its state, the images and the step.

    Weights and optimiser are fp32; bf16 and fp16 are autocast, fp16 with a scaled loss. Gradients are not
    clipped, as published.

    Args:
        model: from :func:`stopfast.finetuning.model.build_classifier`; it moves to ``device``.
        recipe: everything else.
        steps_per_epoch: for the schedule.
        classes: outputs of the model.
        device: where.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        steps_per_epoch: int,
        classes: int,
        device: torch.device,
    ) -> None:
        self.model, self.recipe, self.device = model.to(device), recipe, device
        self.rate = rate_schedule(recipe, steps_per_epoch)
        self.optimizer = torch.optim.AdamW(decayed_groups(model, recipe), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")  # type: ignore[attr-defined]
        self.mix = _mixing(recipe, classes)

    def __call__(self, parts: Sequence[Labelled], step: int) -> tuple[Tensor, float]:
        """Take an update.

        Args:
            parts: the micro-batches, images fp32 [B, 3, H, W] and labels int64 [B] each, on any device;
                images that are on this one already are mixed in place.
            step: number of the update, from 1.

        Returns:
            The mean loss, fp32 [] on the device, and the learning rate of the head.
        """
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, (images, labels) in enumerate(parts):
            seed_device(self.device, self.recipe.seed, Stream.STEP, step, number)
            loss = self._loss(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            self.scaler.scale(loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total, rate

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing
        if self.mix is not None:  # which smooths the labels that it mixes
            images, labels = self.mix(images, labels)
            smoothing = 0.0
        with autocast(self.device, self.recipe.precision):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    def state_dict(self) -> dict[str, Any]:
        """Return what the updates to come depend on, beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _mixing(recipe: Recipe, classes: int) -> Any:  # noqa: ANN401
    """timm's mixup and cutmix, or None."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    from timm.data.mixup import Mixup

    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )
