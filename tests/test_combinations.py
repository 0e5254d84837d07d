"""What nobody has published: StoP's noise on a decoder's queries, degraded contexts of I-JEPA and StoP."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.build import build_jepa
from stopfast.config import JepaConfig
from stopfast.kernels.ops import positional_noise
from stopfast.objectives.jepa import Jepa
from stopfast.objectives.reconstruction import Reconstruction, ReconstructionDraws
from stopfast.pos_embed import sincos_pos_embed
from stopfast.presets import PRESETS
from stopfast.presets.decoders import DEGRADATIONS
from tests.small_predictor import Recorder
from tests.small_reconstruction import PATCHES, batch_of, build, gradients, stirred
from tests.test_presets_decoders import smaller

BATCH, MASKED = 4, 12


def noisy_mae(**noise: Any) -> tuple[Reconstruction, Recorder, ReconstructionDraws]:
    """MAE with noise, what tells its decoder's tokens, and draws of images 4 to 7 of a step."""
    objective = stirred(build(mask_ratio=0.75, noise={"apply_stop": True, **noise}))
    recorder = Recorder()
    objective.decoder.ops = recorder.ops
    return objective, recorder, objective.draws(3, 8, slice(4, 8))


def normals(draws: ReconstructionDraws, tokens: int, context: bool) -> Tensor:
    return positional_noise(draws.seed, draws.sample_ids, 1, 1, tokens, 32, context)[0]


def test_queries_of_mae_are_stops():
    """Position, the context's projection of noise, and its bias; no mask token, no noise elsewhere."""
    objective, recorder, draws = noisy_mae()
    decoder = objective.decoder
    assert draws.order is not None
    loss = objective.loss(batch_of(objective), draws)
    embed = decoder.predictor_embed
    table = sincos_pos_embed(16, (4, 4))
    expected = table[draws.order[:, PATCHES - MASKED :]]
    expected = expected + F.linear(0.25 * normals(draws, MASKED, False), embed.weight, embed.bias)
    assert relative_error(recorder.query_tokens, expected) < 1e-6
    features = objective.outputs(batch_of(objective), draws)["encoder features"]
    places = F.pad(table[draws.order[:, : PATCHES - MASKED]], (0, 0, 1, 0))
    assert relative_error(recorder.context_tokens, embed(features) + places) < 1e-6
    loss.backward()
    assert "mask_token" not in gradients(decoder) and not decoder.mask_token.requires_grad
    given = draws._replace(noise=[0.25 * normals(draws, MASKED, False)])
    assert torch.equal(objective.loss(batch_of(objective), given), loss)


def test_noise_alone_trains_the_projection():
    """Without features to project, its gradient is the noise's."""
    for noisy in (True, False):
        objective, _, draws = noisy_mae(noise_var=0.25 * noisy)
        objective.decoder.predictor_embed.bias.requires_grad_(False)
        objective.encoder.norm.weight.data.zero_()
        objective.encoder.norm.bias.data.zero_()
        objective.loss(batch_of(objective), draws).backward()
        gradient = objective.decoder.predictor_embed.weight.grad
        assert gradient is not None and bool(gradient.any()) == noisy


@pytest.mark.parametrize("apply_to", ["context", "both"])
def test_a_class_token_has_no_noise(apply_to: str):
    """It has no position. The patches' noise is that of a decoder without a class token."""
    objective, recorder, draws = noisy_mae(apply_to=apply_to)
    features = objective.outputs(batch_of(objective), draws)["encoder features"]
    added = recorder.context_tokens - objective.decoder.predictor_embed(features)
    assert draws.order is not None
    kept = draws.order[:, : PATCHES - MASKED]
    added[:, 1:] -= sincos_pos_embed(16, (4, 4))[kept]
    assert added[:, 0].abs().max() < 1e-6
    noise = 0.25 * normals(draws, PATCHES - MASKED, True)
    expected = F.linear(noise, objective.decoder.predictor_embed.weight)
    assert relative_error(added[:, 1:], expected) < 1e-5
    decoder, first = objective.decoder, (features, kept, draws.order[:, PATCHES - MASKED :])
    seeded = {"seed": draws.seed, "sample_ids": draws.sample_ids}
    assert torch.equal(decoder(*first, **seeded), decoder(*first, **seeded, noise_context=noise))
    with pytest.raises(ValueError, match=r"noise_context \(4, 4, 32\)"):
        decoder(*first, **seeded, noise_context=F.pad(noise, (0, 0, 1, 0)))
    with pytest.raises(ValueError, match="without a class token with lengths"):
        decoder(*first, **seeded, lengths=torch.tensor([4, 12], dtype=torch.int32))


def degraded_jepa(kind: str, name: str = "stop", **step: Any) -> Jepa:
    config = smaller(PRESETS[f"stop-{kind}-cifar10"](), num_heads=2, predictor_num_heads=2, depth=2)
    config = replace(config, step=replace(config.step, **step))
    if name == "ijepa":
        config = replace(config, noise=PRESETS["ijepa-cifar10"]().noise)
    assert isinstance(config.objective, JepaConfig) and config.objective.degrade.kind == kind
    return build_jepa(config, 100)


def images_of(objective: Jepa) -> Tensor:
    size = objective.transforms.size
    return torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(1))


kinds = pytest.mark.parametrize("kind", DEGRADATIONS)


@kinds
@pytest.mark.parametrize("name", ["stop", "ijepa"])
def test_only_the_context_is_degraded(kind: str, name: str):
    """The context encoder sees the view, the target encoder the whole, and only the first learns."""
    objective = degraded_jepa(kind, name)
    degraded, images = objective.degradation, images_of(objective)
    assert degraded is not None and images.shape[2:] == degraded.source
    draws = objective.draws(3, BATCH, slice(0, BATCH))
    objective.target_encoder.get_parameter(
        "norm.bias"
    ).data += 1  # another network than the encoder
    view, whole = degraded.view(images, draws.degradation), degraded.whole(images)
    assert view.shape == whole.shape == (BATCH, 3, 32, 32)
    assert relative_error(view, whole) > 0.02
    context, target, _ = draws.masks
    seeded = {"seed": draws.seed, "sample_ids": draws.sample_ids}
    prediction = objective.predictor(objective.encoder(view, context), context, target, **seeded)
    with torch.no_grad():
        features = F.layer_norm(objective.target_encoder(whole), (16,))
        picked = [features.gather(1, mask[..., None].expand(-1, -1, 16)) for mask in target]
    expected = F.smooth_l1_loss(prediction, torch.cat(picked))
    expected.backward()
    modules = (objective.encoder, objective.predictor)
    wanted = [gradients(module) for module in modules]
    for module in modules:
        module.zero_grad()
    loss = objective.loss(images, draws)
    loss.backward()
    assert relative_error(loss, expected) < 1e-6
    for module, found in zip(modules, wanted, strict=True):
        for key, gradient in gradients(module).items():
            assert relative_error(gradient, found[key]) < 1e-5, key
    assert all(p.grad is None for p in objective.target_encoder.parameters())
    outputs = objective.outputs(images, draws)
    assert torch.equal(outputs["encoder features"], objective.encoder(view, context))


@kinds
def test_draws_of_a_degraded_context(kind: str):
    """Those of parts are the parts of the whole, and no stream is shared with masks and noise."""
    objective = degraded_jepa(kind)
    plain = degraded_jepa(kind)
    plain.degradation = None
    whole = objective.draws(3, BATCH, slice(0, BATCH))
    parts = [objective.draws(3, BATCH, slice(at, at + 2)) for at in (0, 2)]
    shared = kind in ("zoomed-out", "decolorized")
    if kind == "zoomed-in":
        assert whole.degradation is None
    else:
        pieces = [part.degradation for part in parts]
        assert whole.degradation is not None and None not in pieces
        joined = pieces[1] if shared else torch.cat(pieces)  # type: ignore[arg-type]
        assert torch.equal(whole.degradation, joined)
        other = objective.draws(4, BATCH, slice(0, BATCH)).degradation
        assert not torch.equal(whole.degradation, other)  # type: ignore[arg-type]
    without = plain.draws(3, BATCH, slice(0, BATCH))
    assert without.degradation is None
    for mask, other in zip(
        [*whole.masks.context, *whole.masks.target],
        [*without.masks.context, *without.masks.target],
        strict=True,
    ):
        assert torch.equal(mask, other)


@pytest.mark.parametrize("kind", ["zoomed-out", "decolorized"])
def test_padding_and_unused_work_change_nothing(kind: str):
    found = []
    for step in ({}, {"bucket": 8}, {"skip_unused": False}, {"checkpointing": True}):
        objective = degraded_jepa(kind, **step)
        loss = objective.loss(images_of(objective), objective.draws(2, BATCH, slice(0, BATCH)))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(objective.encoder)})
    for other in found[1:]:
        assert max(relative_error(other[n], value) for n, value in found[0].items()) < 1e-5
