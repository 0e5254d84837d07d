"""A small predictor, inputs for it, and a look at what it makes of them."""

from typing import Any

import torch
from torch import Tensor

from stopfast import Predictor
from stopfast.kernels.ops import EAGER
from tests.golden_files import norm_1e6

N, D, P, B, KX, KY = 16, 24, 16, 3, 5, 4


def small(seed: int = 0, **settings: Any) -> Predictor:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        num_patches=N, embed_dim=D, predictor_embed_dim=P, depth=2, num_heads=2, norm_layer=norm_1e6
    )
    predictor = Predictor(**{**sizes, **settings})
    with torch.no_grad():  # biases start at zero, which would hide a lost one
        for parameter in predictor.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return predictor


def inputs(
    contexts: int = 1, targets: int = 2, seed: int = 1
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def index(count: int) -> Tensor:
        return torch.rand(B, N, generator=generator).argsort(1)[:, :count]

    x = torch.randn(contexts * B, KX, D, generator=generator)
    return x, [index(KX) for _ in range(contexts)], [index(KY) for _ in range(targets)]


class Recorder:
    """Operations that keep the context tokens and the queries of a call."""

    def __init__(self) -> None:
        self.context_tokens: Tensor
        self.query_tokens: Tensor

        def keep(x: Tensor, *arguments: Any) -> Tensor:
            out = EAGER.predictor_tokens(x, *arguments)
            self.context_tokens, self.query_tokens = (
                out[: len(x), : x.shape[1]],
                out[:, x.shape[1] :],
            )
            return out

        self.ops = EAGER._replace(predictor_tokens=keep)


def queries(predictor: Predictor, **call: Any) -> Tensor:
    """Queries less their positions, [M * E * B, Ky, P]."""
    recorder = Recorder()
    predictor.ops = recorder.ops
    x, masks_x, masks = inputs()
    predictor(x, masks_x, masks, **call)
    return recorder.query_tokens - predictor.predictor_pos_embed[0][torch.cat(masks)]
