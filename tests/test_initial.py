"""Initial weights of the published programs, and the positions of Beyond Masking."""

import math

import pytest
import torch
from torch import nn

from stopfast.config import Config
from stopfast.encoder import VisionTransformer
from stopfast.initial import Scheme, init_weights, token
from stopfast.networks import build_encoder, build_pixel_decoder
from stopfast.pos_embed import position_table, sinusoid_pos_embed
from stopfast.predictor import Predictor
from stopfast.presets import PRESETS
from tests.test_presets_decoders import smaller

CUT = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(0.5**0.5))
"""Standard deviation of normal numbers of deviation 0.02 that are cut at one deviation."""


def networks(preset: str) -> tuple[VisionTransformer, Predictor]:
    torch.manual_seed(0)
    config: Config = smaller(PRESETS[preset](), embed_dim=192, predictor_embed_dim=96)
    return build_encoder(config), build_pixel_decoder(config)


def uniform(bound: float) -> tuple[float, float]:
    return bound / math.sqrt(3), bound


def xavier(layer: nn.Module) -> tuple[float, float]:
    outputs, inputs = layer.get_parameter("weight").flatten(1).shape
    return uniform(math.sqrt(6 / (inputs + outputs)))


def default(layer: nn.Module) -> tuple[float, float]:
    """Torch's own: uniform within 1 / sqrt(inputs)."""
    return uniform(layer.get_parameter("weight")[0].numel() ** -0.5)


def cut(_: nn.Module) -> tuple[float, float]:
    return CUT, 0.02


def normal(_: nn.Module) -> tuple[float, float]:
    return 0.02, math.inf


@pytest.mark.spec(14)
@pytest.mark.parametrize(
    ("preset", "linear", "first", "patches"),
    [
        ("ijepa-vit-b16", normal, normal, normal),
        ("mae-vit-b16", xavier, xavier, xavier),
        ("droppos-vit-b16", xavier, xavier, xavier),
        ("beyond-zoomed-in", cut, default, default),
        ("beyond-zoomed-in-corrected", xavier, xavier, xavier),
    ],
)
def test_weights(preset: str, linear, first, patches):
    """Deviation and bound of every layer; ``first`` is what leads into the decoder."""
    encoder, decoder = networks(preset)
    assert pytest.approx(0.0108, abs=5e-5) == CUT
    tokens = [t for t in (encoder.cls_token, decoder.mask_token) if t is not None]
    assert all((t.abs().max() <= 0.02) == (linear is cut) for t in tokens)
    checked = 0
    for name, layer in (*encoder.named_modules(), *decoder.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        kind = {"patch_embed.proj": patches, "predictor_embed": first}.get(name, linear)
        std, bound = kind(layer)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02), name
        assert layer.weight.mean().abs() < 5 * std / layer.weight.numel() ** 0.5, name
        assert layer.weight.abs().max() <= bound * (1 + 1e-6), name
        if bound < math.inf:
            assert layer.weight.abs().max() > 0.99 * bound, name
        if layer.bias is not None:  # MAE's patches keep torch's bias too
            kept = name == "patch_embed.proj" and kind is not normal
            assert bool(layer.bias.any()) == kept, name
            assert not kept or layer.bias.abs().max() <= 768**-0.5
        checked += 1
    assert checked == 1 + 2 + 4 * (len(encoder.blocks) + len(decoder.predictor_blocks))


@pytest.mark.spec(14)
@pytest.mark.parametrize(
    ("scheme", "std"), [("normal", 0.02), ("xavier", 0.02), ("truncated", CUT)]
)
def test_tokens(scheme: Scheme, std: float):
    torch.manual_seed(0)
    value = token(1 << 14, scheme=scheme)
    assert value.std().item() == pytest.approx(std, rel=0.02)
    assert (value.abs().max() > 0.05) == (scheme != "truncated")


def test_unknown_scheme():
    with pytest.raises(ValueError, match="'truncated'"):
        init_weights(nn.Linear(2, 2), nn.ModuleList(), scheme="other")  # type: ignore[arg-type]


@pytest.mark.spec(50)
def test_positions_of_beyond_masking():
    """Sines and cosines by turns, of the number in raster order; fixed, and in no class token's row."""
    table = sinusoid_pos_embed(96, 64)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0]).repeat(48))
    for place, channel in ((3, 0), (3, 1), (17, 40), (17, 41), (63, 94), (63, 95)):
        angle = place / 10000 ** (channel // 2 * 2 / 96)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert table[place, channel].item() == pytest.approx(expected, abs=1e-7)
    encoder, decoder = networks("beyond-distorted")
    for parameter, width in ((encoder.pos_embed, 192), (decoder.predictor_pos_embed, 96)):
        assert not parameter.requires_grad
        assert torch.equal(parameter[0], sinusoid_pos_embed(width, 196))
    both = position_table(96, (8, 8), "1d", class_token=True)
    assert torch.equal(both, torch.cat([torch.zeros(1, 96), table])[None])
