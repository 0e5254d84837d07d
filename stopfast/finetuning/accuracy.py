"""How often a classifier is right."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from stopfast.evaluation.results import Figure, interval
from stopfast.finetuning.data import Labelled
from stopfast.step import Precision, autocast

_BEST = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """What a look at all test images found; the intervals are over these images."""

    top1: Figure
    """Share of images whose class has the highest logit."""
    top5: Figure | None
    """Share whose class is among the five highest; None of five classes or fewer."""
    loss: float
    """Mean cross-entropy, without smoothing."""

    def describe(self) -> str:
        """Say it in words."""
        half = 100 * (self.top1.high - self.top1.low) / 2
        told = f"top-1 {100 * self.top1.value:.1f} ± {half:.1f} %"
        if self.top5 is not None:
            told += f", top-5 {100 * self.top5.value:.1f} %"
        return f"{told}, test loss {self.loss:.4f}"


@torch.no_grad()
def measure_accuracy(
    model: nn.Module, batches: Iterable[Labelled], precision: Precision, device: torch.device
) -> Accuracy:
    """Classify images in evaluation mode.

    Args:
        model: on ``device``; its mode afterwards is evaluation.
        batches: images fp32 [B, 3, H, W] and labels int64 [B], at least two images in all.
        precision: of the model.
        device: where.
    """
    model.eval()
    right, among, losses = [], [], []
    for pictures, labels in batches:
        with autocast(device, precision):
            logits = model(pictures.to(device, non_blocking=True))
        logits, wanted = logits.float(), labels.to(device, non_blocking=True)
        right.append(logits.argmax(1) == wanted)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        if logits.shape[1] > _BEST:
            among.append((logits.topk(_BEST).indices == wanted[:, None]).any(1))
    return Accuracy(
        top1=interval(torch.cat(right)[None].cpu().numpy()),
        top5=interval(torch.cat(among)[None].cpu().numpy()) if among else None,
        loss=float(torch.cat(losses).double().mean()),
    )
