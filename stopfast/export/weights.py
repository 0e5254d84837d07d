"""An encoder from its weights and from what weights do not tell."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stopfast.block import Attention, Block
from stopfast.checkpoint import CheckpointError, load_weights
from stopfast.encoder import VisionTransformer
from stopfast.kernels.ops import Ops
from stopfast.pos_embed import Grid
from stopfast.published import encoder_settings, hidden_ratio

PUBLISHED_EPS = 1e-6
_KNOWN = re.compile(
    r"pos_embed|cls_token|blocks\.\d+\.attn\.[qv]_bias"
    r"|(patch_embed\.proj|norm|blocks\.\d+\.(norm1|norm2|attn\.(qkv|proj)|mlp\.(fc1|fc2)))"
    r"\.(weight|bias)"
)
_CHANNELS = 3


class Untold(NamedTuple):
    """What the weights of an encoder do not tell; None where nobody said."""

    num_heads: int | None = None
    grid: Grid | None = None
    norm_eps: float | None = None

    def completed(self, given: "Untold") -> "Untold":
        """Fill the gaps with what a caller gives.

        Raises:
            ValueError: it contradicts what is known.
        """
        for name, known, value in zip(self._fields, self, given, strict=True):
            if None not in (known, value) and known != value:
                raise ValueError(f"expected {name}={known}, as the source says, got {value}")
        own = {name: value for name, value in self._asdict().items() if value is not None}
        return given._replace(**own)


class Imported(NamedTuple):
    """Weights by our names, and what else is known of them."""

    state: dict[str, Tensor]
    untold: Untold


def untold_of(encoder: VisionTransformer) -> Untold:
    """Return what the weights of this encoder do not tell."""
    assert isinstance(encoder.norm, nn.LayerNorm)
    return Untold(encoder.num_heads, encoder.patch_embed.grid, encoder.norm.eps)


def encoder_of(imported: Imported, what: str, ops: Ops | str = "auto") -> VisionTransformer:
    """Build the encoder that these weights belong to, in evaluation mode and fp32.

    Raises:
        CheckpointError: weights that are missing, unknown or of another shape.
        ValueError: heads or a grid that have to be said.
    """
    state, untold = imported
    # Registers would also spoil the count of positions, so what is too much is told first.
    unknown = sorted({re.sub(r"\.\d+\.", ".*.", key) for key in state if not _KNOWN.fullmatch(key)})
    if unknown:
        raise CheckpointError(
            f"{what}: expected the weights of a vision transformer without registers, layer scale, "
            f"query-key norms or a head; unknown: {', '.join(unknown)}"
        )
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim != 4:
        raise CheckpointError(
            f"{what}: expected patch_embed.proj.weight [D, C, p, p], got {tuple(kernel.shape)}"
        )
    try:
        settings = encoder_settings(state, untold.num_heads, untold.grid)
    except KeyError as error:
        raise CheckpointError(f"{what}: missing: {error.args[0]}") from None
    settings["norm_layer"] = {"eps": PUBLISHED_EPS if untold.norm_eps is None else untold.norm_eps}
    encoder = VisionTransformer(**settings, ops=ops)
    load_weights(encoder, state, what)
    return encoder.eval()


def mlp_ratio(encoder: VisionTransformer) -> float:
    """Return a ratio of which ``int(width * ratio)`` is the hidden width, exactly."""
    first = encoder.blocks[0]
    assert isinstance(first, Block)
    return hidden_ratio(*first.mlp.fc1.weight.shape)


def cpu_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights as a file takes them: on the CPU, contiguous, without a graph."""
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def has_bias(encoder: VisionTransformer) -> bool:
    """Tell whether the packed projection of attention has a bias, if only of queries and values."""
    attention = encoder.blocks[0].attn
    assert isinstance(attention, Attention)
    return attention.qkv.bias is not None or attention.q_bias is not None


def channels_of(encoder: VisionTransformer) -> int:
    """Return the channels of the images that :func:`common_weights` takes."""
    return _CHANNELS if encoder.patch_embed.in_chans == 1 else encoder.patch_embed.in_chans


def common_weights(module: nn.Module) -> dict[str, Tensor]:
    """As :func:`cpu_weights`, in the form that vision transformers of other libraries have.

    Biases of queries and values become one of the packed projection, with zeros for the keys. A patch
    embedding of one channel becomes one of three, with a third of its weights for each: it sees the mean
    of the three, as ours does of images of three.
    """
    state = pack_biases(cpu_weights(module))
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[1] == 1:
        state["patch_embed.proj.weight"] = kernel.repeat(1, _CHANNELS, 1, 1) / _CHANNELS
    return state


def pack_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with one bias of each packed projection for those of its queries and values."""
    packed: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, name = key.rpartition(".")
        if name == "q_bias":
            parts = [value, torch.zeros_like(value), state[f"{stem}.v_bias"]]
            packed[f"{stem}.qkv.bias"] = torch.cat(parts)
        elif name != "v_bias":
            packed[key] = value
    return packed
