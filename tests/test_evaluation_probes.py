"""Probes on made features: they find what is planted, nothing else, and choose on training images only."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from stopfast.evaluation import knn
from stopfast.evaluation.knn import knn_predict
from stopfast.evaluation.online import feature_std, knn_accuracy, rankme, target_variance
from stopfast.evaluation.probes import LinearSettings, fit_linear, logistic_predict, stratified
from stopfast.evaluation.results import interval, paired_interval
from stopfast.evaluation.ridge import Moments

QUICK = LinearSettings(rates=(0.01, 0.3), epochs=10)


def clusters(count, classes, noise, width=8, seed=0):
    """Features around one centre a class, the same centres for every seed."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] + noise * torch.randn(count, width, generator=draws), labels


def orthogonal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0].float()


@pytest.mark.parametrize(
    ("measure", "features", "expected", "within"),
    [
        (rankme, lambda: torch.randn(200, 1) @ torch.randn(1, 30), 1.0, 1e-4),
        (rankme, lambda: orthogonal(200, 7) @ orthogonal(30, 7).T, 7.0, 1e-3),
        (rankme, lambda: 1e-3 * orthogonal(200, 30), 30.0, 1e-3),
        # exp of the entropy of the shares 1/2, 1/4, 1/4
        (rankme, lambda: torch.diag(torch.tensor([2.0, 1.0, 1.0])), 2**1.5, 1e-4),
        (rankme, lambda: torch.zeros(10, 4), 1.0, 0),
        (rankme, lambda: torch.full((10, 4), math.nan), math.nan, 0),
        (feature_std, lambda: torch.randn(4000, 64), 1.0, 0.02),
        (feature_std, lambda: torch.randn(4000, 64) * torch.rand(4000, 1), 1.0, 0.02),
        (feature_std, lambda: torch.ones(50, 1) * torch.randn(1, 64), 0.0, 1e-6),
        (feature_std, lambda: torch.tensor([[2.0, 0.0], [0.0, 5.0]]), 0.5 * 2**0.5, 1e-6),
        (target_variance, lambda: torch.randn(1, 5, 8).expand(6, 5, 8), None, 1e-6),
        (target_variance, lambda: torch.ones(4, 3, 8) * torch.arange(8.0), 0.0, 0),
        (target_variance, lambda: torch.tensor([[[1.0, -3.0]], [[3.0, 3.0]]]), 5.0, 1e-6),
    ],
)  # fmt: skip
def test_measures_of_collapse(measure, features, expected, within):
    made = features()
    if expected is None:  # the places differ, the images do not
        expected = float(made[0].var(0, correction=0).mean())
    assert measure(made) == pytest.approx(expected, abs=within, nan_ok=True)


@pytest.mark.parametrize("sizes", [(7, 5), (100, 100)])
@pytest.mark.parametrize(("neighbours", "temperature"), [(20, 0.07), (3, 1e-4), (500, 0.5)])
def test_knn_is_the_definition_in_any_chunks(sizes, neighbours, temperature, monkeypatch):
    monkeypatch.setattr(knn, "_TRAIN_ROWS", sizes[0])
    monkeypatch.setattr(knn, "_TEST_ROWS", sizes[1])
    (train, labels), (test, _) = clusters(90, 4, 2.0), clusters(33, 4, 2.0, seed=1)
    said = knn_predict(train, labels, test, neighbours=neighbours, temperature=temperature)
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (train, test)]
    similarity = unit[1] @ unit[0].T
    for row, answer in zip(similarity, said, strict=True):
        nearest = row.argsort(descending=True)[:neighbours]
        votes = torch.zeros(4, dtype=torch.float64)
        for place in nearest:
            votes[labels[place]] += ((row[place] - row.max()) / temperature).exp()
        assert votes.argmax() == answer
    if neighbours == 20:
        known = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp(-d / 0.07))
        assert np.array_equal(known.fit(train, labels).predict(test), said)


@pytest.mark.parametrize("probe", ["knn", "linear", "logistic"])
def test_planted_signal_is_found_and_none_without(probe):
    """Without signal, chance is 1 in 5, with its 95 % interval over 500 rows."""

    def accuracy(train, labels, test, truth):
        if probe == "knn":
            return knn_accuracy(train, labels, test, truth)
        if probe == "linear":
            said = fit_linear(train, labels, seed=0, settings=QUICK).predict(test)
        else:
            said, _ = logistic_predict(train, labels, test, share=0.2, seed=0)
        return float((said == truth).float().mean())

    (train, labels), (test, truth) = clusters(600, 5, 0.2), clusters(500, 5, 0.2, seed=1)
    assert accuracy(train, labels, test, truth) > 0.98
    permuted = labels[torch.randperm(600)]
    draws = truth[torch.randperm(500)]
    assert abs(accuracy(train, permuted, test, draws) - 0.2) < 1.96 * (0.2 * 0.8 / 500) ** 0.5


def test_rate_is_chosen_on_images_that_were_not_trained_on():
    """Each image has a column of its own, so that its label can be learnt and no other's."""
    labels = torch.randint(0, 4, (200,))
    probe = fit_linear(torch.eye(200), labels, seed=0, settings=LinearSettings(rates=(1.0,)))
    assert (probe.predict(torch.eye(200)) == labels).float().mean() > 0.9
    assert probe.held_out[0] < 0.5


def test_best_rate_on_held_out_images_is_chosen():
    features, labels = clusters(400, 4, 1.5)
    settings = LinearSettings(rates=(1e-7, 0.3, 1e38), epochs=5)
    probe = fit_linear(features, labels, seed=0, settings=settings)
    assert probe.rate == 0.3 and len(probe.held_out) == 3
    assert probe.held_out[1] == max(probe.held_out)


def test_linear_probe_standardises_by_its_training_images():
    """Units and offsets of columns change nothing; nor does what the test images look like together."""
    (train, labels), (test, _) = clusters(300, 3, 1.0), clusters(100, 3, 1.0, seed=1)
    scale, offset = torch.tensor([1e3, 1e-2, 1, 1, 1, 1, 1, 5]), torch.linspace(-5, 5, 8)
    probe = fit_linear(train, labels, seed=0, settings=QUICK)
    other = fit_linear(train * scale + offset, labels, seed=0, settings=QUICK)
    assert probe.rate == other.rate
    said = probe.predict(test)
    assert (said == other.predict(test * scale + offset)).float().mean() > 0.98
    assert torch.equal(said[:7], probe.predict(test[:7]))
    again = fit_linear(train, labels, seed=0, settings=QUICK)
    assert torch.equal(probe.heads.weight, again.heads.weight)
    differs = fit_linear(train, labels, seed=1, settings=QUICK)
    assert not torch.equal(probe.heads.weight, differs.heads.weight)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [([100, 50, 10], 0.1, [10, 5, 1]), ([100, 3], 0.01, [1, 1]), ([4, 6], 1.0, [4, 6])],
)
def test_subsets_are_stratified(counts, share, expected):
    labels = np.repeat(np.arange(len(counts)), counts)
    chosen = stratified(labels, share, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == expected
    assert len(set(chosen)) == len(chosen)
    features = torch.randn(len(labels), 4)
    _, count = logistic_predict(
        features, torch.from_numpy(labels), features[:2], share=share, seed=0
    )
    assert count == sum(expected)


def test_ridge_is_scikit_learns_and_its_strength_fits_the_noise():
    features, targets = torch.randn(400, 6).double() * torch.arange(1.0, 7.0) + 3, torch.empty(0)
    weight = torch.randn(6, 2).double()
    chosen = []
    for noise in (1e-6, 1e3):
        targets = features @ weight + noise * torch.randn(400, 2)
        fit, held = Moments(), Moments()
        for rows in torch.arange(300).split(77):
            fit.add(features[rows], targets[rows])
        held.add(features[300:].view(10, 10, 6), targets[300:].view(10, 10, 2))
        ridge = Moments.choose(fit, held)
        chosen.append(ridge.strength)
        scaler = StandardScaler().fit(features)
        known = SklearnRidge(alpha=ridge.strength * 400).fit(scaler.transform(features), targets)
        expected = known.predict(scaler.transform(features[:5]))
        assert np.allclose(ridge.predict(features[:5]), expected, rtol=1e-6, atol=1e-6)
    assert chosen[0] < 1e-4 < 0.1 < chosen[1]


def test_intervals():
    """Items and seeds each add their share; of one row, it is the normal interval over the items."""
    scores = np.array([[0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0]])
    items = 1.96 * np.std([0.5, 1, 1, 0, 1], ddof=1) / 5**0.5
    seeds = 12.706 * np.std([0.6, 0.8], ddof=1) / 2**0.5
    found = interval(scores)
    assert found.value == pytest.approx(0.7)
    assert found.high - found.value == pytest.approx(np.hypot(items, seeds), rel=1e-4)
    first, second = np.array([1, 1, 0, 1, 1, 0, 1, 1]), np.array([0, 1, 0, 1, 0, 1, 1, 1])
    difference = first - second
    half = 1.96 * difference.std(ddof=1) / 8**0.5
    mean = difference.mean()
    assert paired_interval(first, second) == pytest.approx((mean, mean - half, mean + half))


FEATURES, LABELS = torch.randn(40, 4), torch.arange(40) % 2


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: rankme(torch.zeros(3)), r"expected features \[n, D\].*got \[3\]"),
        (lambda: feature_std(torch.zeros(1, 4)), "at least two rows"),
        (lambda: target_variance(torch.zeros(3, 4)), r"expected targets \[B, N, D\]"),
        (lambda: knn_accuracy(FEATURES, LABELS, FEATURES, LABELS[:3]), "one label for each"),
        (lambda: knn_predict(FEATURES, LABELS, FEATURES[:, :2]), r"\[m, 4\], got \[40, 2\]"),
        (lambda: knn_predict(FEATURES, LABELS.float(), FEATURES), "int64 labels"),
        (lambda: knn_predict(FEATURES, LABELS, FEATURES, neighbours=0), "neighbours >= 1"),
        (lambda: knn_predict(FEATURES.long(), LABELS, FEATURES), "floating-point features"),
        (lambda: fit_linear(FEATURES, LABELS - 1, seed=0), "labels from 0, got -1"),
        (lambda: fit_linear(FEATURES, 0 * LABELS, seed=0), "at least two classes"),
        (lambda: fit_linear(FEATURES, LABELS * 0 + (LABELS.cumsum(0) > 19).long(), seed=0), "two tr"),
        (lambda: LinearSettings(rates=()), "at least one rate"),
        (lambda: LinearSettings(held_out=1.0), r"held_out in \(0, 1\), got 1.0"),
        (lambda: logistic_predict(FEATURES, LABELS, FEATURES, share=0.0, seed=0), "got 0.0"),
        (lambda: logistic_predict(FEATURES, 0 * LABELS, FEATURES, seed=0), "two classes"),
        (lambda: interval(np.zeros(3)), r"expected scores \[seeds, items\]"),
        (lambda: Moments.choose(Moments(), Moments()), "rows to choose on, got 0 and 0"),
        (lambda: Moments().add(FEATURES, LABELS[:3, None]), r"expected targets \[40\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
