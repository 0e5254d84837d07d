"""Two small learning problems whose answers are known: what noise makes the best predictor, and what it
does to an untied noise projection."""

import pytest
import torch

from stopfast import Predictor
from stopfast.kernels.ops import EAGER


@pytest.mark.spec(27)
def test_best_predictor_smooths():
    """StoP's Proposition 3.2 on a line of positions: with R = X + noise of deviation noise_var, the best
    prediction is sum_x p(x) N(r; x) y(x) / sum_x p(x) N(r; x), p not being flat."""
    torch.manual_seed(0)
    places = torch.arange(6, dtype=torch.float64)
    prior = torch.tensor([0.3, 0.05, 0.25, 0.1, 0.05, 0.25], dtype=torch.float64)
    values = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.5, -1.0], dtype=torch.float64)
    std = Predictor(4, 8, 8, 0, 1, apply_stop=True, noise_var=0.5).noise_std
    count = 200_000
    x = torch.multinomial(prior, count, replacement=True)
    noise = EAGER.positional_noise(torch.tensor([0, 1]), torch.arange(count), 1, 1, 1, 1)
    noisy = places[x] + std * noise.flatten().double()

    def bumps(r: torch.Tensor) -> torch.Tensor:
        """A network of one layer, wide enough for any smooth curve; its readout is trained exactly."""
        return torch.exp(-((r[:, None] - torch.linspace(-2, 7, 37)) ** 2) / (2 * 0.3**2))

    readout = torch.linalg.lstsq(bumps(noisy), values[x, None]).solution

    def smoothed(deviation: float, weights: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        likelihood = weights * torch.exp(-((at[:, None] - places) ** 2) / (2 * deviation**2))
        return (likelihood * values).sum(1) / likelihood.sum(1)

    at = torch.linspace(-1, 6, 71, dtype=torch.float64)
    learned = (bumps(at) @ readout)[:, 0]
    density = (prior * torch.exp(-((at[:, None] - places) ** 2) / (2 * 0.5**2))).sum(1)

    def distance(curve: torch.Tensor) -> float:
        """Root mean square where noisy positions fall: elsewhere nothing was learnt."""
        return ((learned - curve).square() * density / density.sum()).sum().sqrt().item()

    assert distance(smoothed(0.5, prior, at)) < 0.03
    assert distance(smoothed(0.5**0.5, prior, at)) > 0.1  # noise_var as a variance
    assert distance(smoothed(0.5, torch.ones(6), at)) > 0.1  # a flat prior


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
