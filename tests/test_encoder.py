"""The encoder and its position table."""

import pytest
import torch
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast import VisionTransformer
from stopfast.models import SHAPES, encoder_of_size, vit_predictor
from stopfast.pos_embed import interpolate_pos_embed, sincos_pos_embed
from tests.golden_files import norm_1e6


def small(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = dict(img_size=[32], patch_size=8, embed_dim=32, depth=3, num_heads=4)
    return VisionTransformer(**{**sizes, "norm_layer": norm_1e6, **settings})


def draw_images(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.spec(6)
def test_position_table_axes():
    """The first half of the channels is the column's, the second the row's; sines before cosines."""
    table = sincos_pos_embed(64, (7, 9)).view(7, 9, 64)
    assert torch.equal(table[..., :32], table[:1, :, :32].expand(7, -1, -1))
    assert torch.equal(table[..., 32:], table[:, :1, 32:].expand(-1, 9, -1))
    omega = 10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)
    expected = [
        torch.sin(3 * omega),
        torch.cos(3 * omega),
        torch.sin(5 * omega),
        torch.cos(5 * omega),
    ]
    assert torch.allclose(table[5, 3], torch.cat(expected).float(), atol=1e-7)


@pytest.mark.spec(7)
def test_position_norm():
    table = sincos_pos_embed(384, (14, 14))
    assert torch.allclose(table.square().sum(1), torch.full((196,), 192.0), rtol=1e-5)


@pytest.mark.spec(8)
@pytest.mark.parametrize("skip_unused", [True, False])
def test_masked_encoding(skip_unused: bool):
    """All indices equal no mask, an order of indices is an order of outputs, masks go first."""
    encoder, images = small(skip_unused=skip_unused), draw_images(3)
    everything = torch.arange(16).expand(3, -1)
    whole = encoder(images)
    assert relative_error(encoder(images, everything), whole) < 1e-5
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    expected = whole.gather(1, order[..., None].expand(-1, -1, 32))
    assert relative_error(encoder(images, [order]), expected) < 1e-5
    parts = [order[:, :5], order[:, 7:12]]
    both = encoder(images, parts)
    assert both.shape == (6, 5, 32)
    assert relative_error(both, torch.cat([encoder(images, part) for part in parts])) < 1e-5


@pytest.mark.spec(14)
@pytest.mark.parametrize("rescale", [False, True])
def test_initial_weights(rescale: bool):
    encoder = small(embed_dim=192, depth=4, num_heads=3, init_rescale=rescale)
    for number, block in enumerate(encoder.blocks, start=1):
        factor = (2 * number) ** -0.5 if rescale else 1.0
        for name, scaled in (("attn.proj", True), ("mlp.fc2", True), ("attn.qkv", False)):
            weight = block.get_submodule(name).weight
            assert weight.std().item() == pytest.approx(
                0.02 * (factor if scaled else 1.0), rel=0.02
            )
            assert not block.get_submodule(name).bias.any()
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.spec(15)
@pytest.mark.parametrize(
    ("size", "patch", "depth", "encoder_count", "predictor_count"),
    [
        ("base", 16, 6, 85_646_592, 11_238_912),
        ("large", 16, 12, 303_098_880, 22_082_560),
        ("huge", 14, 12, 630_434_560, 22_279_424),
        ("huge", 16, 12, 630_664_960, 22_279_424),
        ("giant", 16, 16, 1_011_092_608, 29_475_712),
    ],
)
def test_parameter_counts(size, patch, depth, encoder_count, predictor_count):
    with torch.device("meta"):
        encoder = encoder_of_size(size, patch)
        predictor = vit_predictor(
            num_patches=196, embed_dim=encoder.embed_dim, depth=depth, num_heads=encoder.num_heads
        )
    for module, expected in ((encoder, encoder_count), (predictor, predictor_count)):
        assert sum(p.numel() for p in module.parameters() if p.requires_grad) == expected
    assert encoder.num_heads == SHAPES[size].num_heads


@pytest.mark.spec(25)
def test_last_blocks_are_normed_before_they_are_averaged():
    encoder, images = small(), draw_images()
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    two = encoder(images, K=2)
    assert relative_error(two, (encoder.norm(outputs[1]) + encoder.norm(outputs[2])) / 2) < 1e-6
    assert relative_error(encoder(images, K=1), encoder.norm(outputs[2])) < 1e-6


@pytest.mark.parametrize("skip_unused", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_rows(blocks: int, skip_unused: bool):
    """Some rows of the result, computed alone, are those rows, with the same gradients."""
    encoder, images = small(skip_unused=skip_unused), draw_images()
    rows = torch.tensor([[3, 3, 0], [15, 1, 8]])
    # A norm's sum of squares hardly depends on its input, so the loss is a weighted sum.
    cotangent = torch.randn(2, 3, 32)
    index = rows[..., None].expand(-1, -1, 32)
    gradients = []
    for out in (encoder(images, K=blocks, rows=rows), encoder(images, K=blocks).gather(1, index)):
        encoder.zero_grad()
        (out * cotangent).sum().backward()
        gradients.append(
            [out.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]
        )
    for alone, taken in zip(*gradients, strict=True):
        assert relative_error(alone, taken) < 1e-5


@pytest.mark.spec(23)
def test_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        encoder = small(checkpointing=checkpointing)
        out = encoder(draw_images(), torch.arange(8).expand(2, -1))
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).mean()
        loss.backward()
        results.append([loss, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for plain, recomputed in zip(*results, strict=True):
        assert relative_error(recomputed, plain) < 1e-6


def test_checkpointing_saves_memory():
    """The switch does what it is for: fewer bytes are kept for backward."""
    kept = {}
    for checkpointing in (False, True):
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            small(checkpointing=checkpointing, depth=6)(draw_images(16))
        kept[checkpointing] = total
    assert kept[True] < kept[False] / 2


@pytest.mark.parametrize("transposed", [False, True])
def test_interpolation(transposed: bool):
    """A table moved to a finer grid is near the sine and cosine of the places in between."""
    coarse, fine = ((6, 8), (12, 16)) if not transposed else ((8, 6), (16, 12))
    table = sincos_pos_embed(64, coarse)
    assert interpolate_pos_embed(table, coarse, coarse) is table
    moved = interpolate_pos_embed(table, coarse, fine).view(*fine, 64)
    omega = 10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)
    row, column = 7, 4
    places = [(index + 0.5) / 2 - 0.5 for index in (column, row)]
    expected = torch.cat([f(place * omega) for place in places for f in (torch.sin, torch.cos)])
    assert (moved[row, column] - expected).abs().max() < 0.06
    with pytest.raises(ValueError, match="rows"):
        interpolate_pos_embed(table, fine, coarse)


def test_other_and_oblong_images():
    encoder = small(img_size=[32, 48])
    assert encoder.patch_embed.grid == (4, 6) and encoder(draw_images(2, 32, 48)).shape == (
        2,
        24,
        32,
    )
    assert encoder(draw_images(2, 64, 32)).shape == (2, 32, 32)
    square = small()
    larger = small(img_size=[64])
    larger.load_state_dict({**square.state_dict(), "pos_embed": larger.pos_embed})
    larger.pos_embed.data = interpolate_pos_embed(square.pos_embed, (4, 4), (8, 8))
    images = draw_images(2, 64, 64)
    assert relative_error(square(images), larger(images)) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": [30]}, "multiples of the patch size 8"),
        ({"drop_path_rate": 0.1}, "drop_path_rate"),
        ({"num_heads": 5}, "divisible by 5 heads"),
        ({"embed_dim": 30, "num_heads": 2}, "multiple of 4"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("images", "blocks", "message"),
    [
        (torch.zeros(2, 1, 32, 32), 1, r"expected images \(B, 3, H, W\)"),
        (torch.zeros(3, 32, 32), 1, r"expected images"),
        (torch.zeros(2, 3, 33, 32), 1, "multiples"),
        (torch.zeros(2, 3, 32, 32), 4, "expected K in 1..3"),
    ],
)
def test_bad_input(images: Tensor, blocks: int, message: str):
    with pytest.raises(ValueError, match=message):
        small()(images, K=blocks)


def test_saved_and_loaded(tmp_path):
    """A model comes back with its settings, the norm's eps among them, and its weights."""
    encoder = small(img_size=[32, 48])
    encoder.save_pretrained(tmp_path)
    loaded = VisionTransformer.from_pretrained(tmp_path)
    assert isinstance(loaded, VisionTransformer)
    images = draw_images(2, 32, 48)
    assert loaded.norm.eps == 1e-6 and torch.equal(loaded(images), encoder(images))
