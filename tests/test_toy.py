"""Two small learning problems whose answers are known: what noise makes the best predictor, and what it
does to an untied noise projection."""

import pytest
import torch

from stopfast import Predictor


@pytest.mark.spec(27)
def test_best_predictor_smooths():
    """StoP's Proposition 3.2 for places x on a line, p of them not flat: queries being R = psi(X) + noise,
    the best prediction is sum_x p(x) N(R; psi(x)) y(x) / sum_x p(x) N(R; psi(x))."""
    torch.manual_seed(0)
    places, width, batch, std = 6, 32, 512, 0.4
    prior = torch.tensor([0.35, 0.05, 0.25, 0.05, 0.05, 0.25])
    values = torch.randn(places, 4)
    predictor = Predictor(
        places, 4, width, 1, 2, apply_stop=True, noise_var=std, cov="fixed", grid_size=(1, places)
    )
    steps = 1200
    optimizer = torch.optim.Adam(predictor.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    nothing, at_first = torch.zeros(batch, 1, 4), torch.zeros(batch, 1, dtype=torch.int64)

    def draw() -> torch.Tensor:
        return torch.multinomial(prior, batch, replacement=True)[:, None]

    for step in range(steps):
        x = draw()
        out = predictor(nothing, at_first, x, seed=torch.tensor([1, step]))
        loss = (out - values[x]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()

    x, noise = draw(), std * torch.randn(batch, 1, width)
    learned = predictor(nothing, at_first, x, noise=[noise]).detach()[:, 0]
    positions = predictor.predictor_pos_embed[0]
    squares = (positions[x[:, 0]] + noise[:, 0])[:, None].sub(positions).square().sum(-1)

    def distance(deviation: float, weights: torch.Tensor) -> float:
        """Root mean square between what was learnt and the smoothing by this noise and prior."""
        posterior = (weights.log() - squares / (2 * deviation**2)).softmax(1)
        return (learned - posterior @ values).square().mean().sqrt().item()

    right = distance(std, prior)
    assert right < 0.1
    assert distance(std**0.5, prior) > 2 * right  # noise_var as a variance
    assert distance(std, torch.full((places,), 1 / places)) > 2 * right  # a flat prior


@pytest.mark.spec(28)
@pytest.mark.parametrize("tie", [True, False])
def test_untied_noise_collapses(tie: bool):
    """Noise hurts the loss, so training drives an untied projection of it to 0; the tied one also
    carries the context and stays."""
    torch.manual_seed(0)
    width, batch = 16, 64
    predictor = Predictor(16, width, 32, 1, 2, apply_stop=True, noise_var=1.0, tie=tie)
    weight = predictor.predictor_embed.weight if tie else predictor.noise_embed.weight
    with torch.no_grad():
        for matrix in {predictor.predictor_embed.weight, weight}:
            matrix.normal_(std=0.3)
    before = weight.norm().item()
    readout = torch.randn(16, width, width) / width**0.5  # what a place asks of the context
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(1200):
        generator = torch.Generator().manual_seed(step)
        context = torch.randn(batch, 1, width, generator=generator)
        index = torch.randint(16, (batch, 4), generator=generator)
        target = torch.einsum("bc,bkcd->bkd", context[:, 0], readout[index])
        out = predictor(context, index[:, :1], index, seed=torch.tensor([1, step]))
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = weight.norm().item()
    assert after > 0.6 * before if tie else after < 0.25 * before, f"{before:.2f} to {after:.2f}"
