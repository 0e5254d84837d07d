"""A user's own modules, accelerated in place: same numbers, same state, and undone again."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from benchmarks.engine.agreement import relative_error
from benchmarks.step.published_model import PublishedEncoder, PublishedPredictor
from stopfast import Predictor, accelerate
from stopfast.kernels._launch import watch_launches
from stopfast.kernels.ops import EAGER, FUSED, Ops
from tests.small_predictor import D, N, P, inputs, small

BOTH = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])


def published(**settings) -> PublishedPredictor:
    torch.manual_seed(0)
    sizes = dict(num_patches=N, embed_dim=D, predictor_embed_dim=P, depth=2, num_heads=2)
    predictor = PublishedPredictor(**{**sizes, **settings})
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return predictor


def outcome(module: nn.Module, *arguments, **call) -> list[Tensor]:
    """The output and every gradient."""
    module.zero_grad()
    out = module(*arguments, **call)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * cotangent).sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))


@BOTH
def test_predictor(ops: Ops):
    theirs = published()
    x, masks_x, masks = inputs(contexts=2)
    expected = outcome(theirs, x, masks_x, masks)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    done = accelerate(theirs, ops=ops)
    assert done.replaced == [""]
    with watch_launches() as launches:
        assert_close(outcome(theirs, x, masks_x, masks), expected)
    assert bool(launches) == (ops is FUSED)
    assert type(theirs) is PublishedPredictor
    assert theirs.state_dict().keys() == state.keys()
    done.undo()
    assert "forward" not in vars(theirs)
    with watch_launches() as launches:
        assert_close(outcome(theirs, x, masks_x, masks), expected)
    assert not launches


def test_stop_with_given_noise_and_drawn():
    theirs = published(apply_stop=True, noise_var=0.3)
    x, masks_x, masks = inputs()
    noise = [torch.randn(len(x), masks[0].shape[1], D) for _ in masks]
    expected = outcome(theirs, x, masks_x, masks, noise=noise)
    before = torch.get_rng_state()
    accelerate(theirs, ops=FUSED)
    assert torch.equal(before, torch.get_rng_state())
    assert theirs.noise_var == 0.3
    assert_close(outcome(theirs, x, masks_x, masks, noise=noise), expected)
    ours = small(apply_stop=True, noise_var=0.3)
    ours.load_state_dict(theirs.state_dict())
    assert relative_error(theirs(x, masks_x, masks, seed=5), ours(x, masks_x, masks, seed=5)) < 1e-5


@BOTH
def test_encoder_blocks(ops: Ops):
    torch.manual_seed(0)
    encoder = PublishedEncoder(img_size=(16,), patch_size=4, embed_dim=D, depth=2, num_heads=2)
    images = torch.randn(2, 3, 16, 16)
    expected = outcome(encoder, images)
    done = accelerate(encoder, ops=ops)
    assert done.replaced == ["blocks.0", "blocks.1"]
    assert_close(outcome(encoder, images), expected)
    done.undo()
    assert_close(outcome(encoder, images), expected)


@BOTH
def test_timm(ops: Ops):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=D, depth=2, num_heads=2, num_classes=0
    )
    images = torch.randn(2, 3, 32, 32)
    expected = outcome(model, images)
    done = accelerate(model, ops=ops)
    assert done.replaced == ["blocks.0", "blocks.1"]
    assert_close(outcome(model, images), expected)


def test_what_is_not_the_same_is_kept():
    """Random, further learned, or otherwise different blocks keep their own implementation."""
    torch.manual_seed(0)
    encoder = PublishedEncoder(img_size=(16,), patch_size=4, embed_dim=D, depth=4, num_heads=2)
    random, scaled, other, _ = encoder.blocks
    random.attn.attn_drop = nn.Dropout(0.1)
    scaled.gamma = nn.Parameter(torch.zeros(D))
    other.mlp.act = nn.ReLU()
    other.forward = lambda x: x + other.mlp.fc2(other.mlp.act(other.mlp.fc1(x)))
    done = accelerate(encoder, ops=EAGER)
    assert done.replaced == ["blocks.3"]
    assert "Dropout is random" in done.kept["blocks.0"]
    assert "differs" in done.kept["blocks.2"]
    done.undo()
    with pytest.raises(ValueError, match="expected a model with blocks"):
        accelerate(nn.Linear(2, 2))


def test_copies_and_updates_are_followed():
    """A deep copy computes with its own weights, a moved or reloaded module with the new ones."""
    theirs = published()
    x, masks_x, masks = inputs()
    accelerate(theirs, ops=EAGER)
    twin = copy.deepcopy(theirs)
    out = theirs(x, masks_x, masks)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert torch.equal(twin(x, masks_x, masks), out)
    assert not theirs(x, masks_x, masks).any()
    theirs.load_state_dict(twin.state_dict())
    assert torch.equal(theirs(x, masks_x, masks), out)
    file = io.BytesIO()
    torch.save(theirs, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, masks_x, masks), out)
    theirs.mask_token = nn.Parameter(torch.ones_like(theirs.mask_token))
    assert not torch.equal(theirs(x, masks_x, masks), out)
    assert theirs.double()(x.double(), masks_x, masks).dtype == torch.float64


def test_our_own_and_several():
    """Modules of stopfast get the operations; several models are done at once."""
    ours, theirs = small(), published()
    done = accelerate({"ours": ours, "theirs": theirs}, ops=FUSED)
    assert ours.ops is FUSED and ours.predictor_blocks[0].mlp.ops is FUSED
    assert "theirs" in done.replaced
    assert isinstance(ours, Predictor)
    done.undo()
    assert ours.ops.name == "auto" and "forward" not in vars(theirs)


def test_loss():
    done = accelerate(small(), ops=EAGER)
    features, (_, _, masks) = torch.randn(3, N, D), inputs()
    prediction = torch.randn(len(masks) * 3, masks[0].shape[1], D)
    target = nn.functional.layer_norm(features, (D,))
    rows = torch.cat([target.gather(1, m[..., None].expand(-1, -1, D)) for m in masks])
    expected = nn.functional.smooth_l1_loss(prediction, rows)
    assert relative_error(done.loss(prediction, features, masks), expected) < 1e-6


def test_compiles():
    theirs = published()
    x, masks_x, masks = inputs()
    expected = outcome(theirs, x, masks_x, masks)
    accelerate(theirs, ops=FUSED)
    compiled = torch.compile(theirs, backend="aot_eager")
    assert relative_error(compiled(x, masks_x, masks), expected[0]) < 1e-5


@BOTH
def test_optimizer(ops: Ops):
    """The object itself goes on as one update of weights, state and teacher; undone, it goes on too."""

    def train(steps: int, accelerated: bool) -> list[Tensor]:
        theirs, teacher = (
            published(qkv_bias=False),
            published(qkv_bias=False),
        )  # keys' biases: no gradient
        decayed = [p for p in theirs.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in theirs.parameters() if p.requires_grad and p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        x, masks_x, masks = inputs()
        done = None
        for step in range(steps):
            if accelerated and step == 1:
                done = accelerate(
                    theirs, ops=ops, optimizer=optimizer, teachers=[(theirs, teacher)]
                )
                assert done.replaced == ["", "optimizer"]
            if done is not None and step == steps - 1:
                done.undo()
                assert type(optimizer) is torch.optim.AdamW
            optimizer.zero_grad()
            theirs(x, masks_x, masks).square().sum().backward()
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
                if done is not None and done.replaced:
                    group["teacher_momentum"] = 0.9
            optimizer.step()
            if done is None or not done.replaced:
                for own, average in zip(theirs.parameters(), teacher.parameters(), strict=True):
                    average.data.lerp_(own.data, 0.1)
        moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        return [t.detach() for t in (*theirs.parameters(), *teacher.parameters(), *moments)]

    assert_close(train(4, True), train(4, False))


def test_bad_optimizers():
    theirs = published()
    with pytest.raises(ValueError, match=r"AdamW, got SGD"):
        accelerate(theirs, optimizer=torch.optim.SGD(theirs.parameters()))
    with pytest.raises(ValueError, match="expected an optimizer"):
        accelerate(theirs, teachers=[(theirs, published())])
    assert "forward" not in vars(theirs)


class Impostor(nn.Module):
    """A block with the layers of a plain one that computes something else."""

    def __init__(self, activation=nn.functional.gelu, causal: bool = False) -> None:
        super().__init__()
        plain = PublishedEncoder(
            img_size=(16,), patch_size=4, embed_dim=96, depth=1, num_heads=2
        ).blocks[0]
        self.norm1, self.attn, self.norm2, self.mlp = (
            plain.norm1,
            plain.attn,
            plain.norm2,
            plain.mlp,
        )
        self.activation, self.causal = activation, causal
        for parameter in self.parameters():  # small, as every transformer begins
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2)
            for t in self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.norm2(x))))


def tanh_gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("zeroed", [False, True], ids=["small", "zeroed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "changed",
    [{"activation": f} for f in (tanh_gelu, nn.functional.silu, nn.functional.relu)]
    + [{"causal": True}],
    ids=["tanh", "silu", "relu", "causal"],
)
def test_impostors(changed: dict, dtype: torch.dtype, zeroed: bool):
    """Weights as they are initialised, or branches that begin at zero, pass nothing off as the same."""
    block = Impostor(**changed).to(dtype)
    if zeroed:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="differs from the replacement"):
        accelerate(block, ops=EAGER)
    assert accelerate(Impostor().to(dtype), ops=EAGER).replaced == [""]


def test_hooks_of_the_optimizer_stay():
    theirs, calls = published(), []
    optimizer = torch.optim.AdamW(theirs.parameters())
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    accelerate(theirs, ops=EAGER, optimizer=optimizer)
    x, masks_x, masks = inputs()
    theirs(x, masks_x, masks).sum().backward()
    optimizer.step()
    assert calls == ["after"]
