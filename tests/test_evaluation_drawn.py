"""Drawn scenes and clips: pure, and probes of them find what is planted, and nothing else."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from stopfast.config import Transforms
from stopfast.evaluation.counting import (
    MOST,
    CountingSettings,
    correlation,
    count_and_locate,
    draw_scene,
    share_of_patches,
)
from stopfast.evaluation.drawing import to_input
from stopfast.evaluation.features import PixelFeatures, Seen
from stopfast.evaluation.propagation import (
    OBJECTS,
    PropagationSettings,
    draw_clip,
    propagate,
    propagate_labels,
    region_similarity,
)

CPU = torch.device("cpu")
TRANSFORMS = Transforms(size=(32, 48))
SCENES = CountingSettings(train=160, test=120, batch_size=64)
CLIPS = PropagationSettings(clips=6, frames=5)


class Knowing:
    """A representation that is told what the pictures show, with or without saying it."""

    levels = 1

    def __init__(self, kind, says):
        self.place, self.kind, self.says = 0, kind, says

    def grid(self, images):
        return (8, 12)

    def __call__(self, images):
        if self.kind == "scenes":
            scenes = [draw_scene(0, self.place + i, TRANSFORMS.size) for i in range(len(images))]
            self.place += len(images)
            pooled = torch.tensor([[float(scene.count)] for scene in scenes])
            covered = torch.from_numpy(np.stack([scene.covered for scene in scenes]))
            patches = share_of_patches(covered, (8, 12))[..., None].float()
        else:
            labels = draw_clip(0, self.place, TRANSFORMS.size, len(images)).labels
            self.place += 1
            shares = one_hot(torch.from_numpy(labels), OBJECTS + 1).double()
            patches = shares.unflatten(2, (12, 4)).unflatten(1, (8, 4)).mean((2, 4)).flatten(1, 2)
            pooled = patches.mean(1)
        if self.says:
            noise = 0.05
        else:
            pooled, patches, noise = 0 * pooled, 0 * patches, 1.0
        draws = torch.Generator().manual_seed(self.place)
        pooled = torch.cat([pooled, torch.zeros(len(pooled), 3)], 1)
        patches = torch.cat([patches, torch.zeros(*patches.shape[:2], 3)], 2)
        return Seen(*(x + noise * torch.randn(x.shape, generator=draws) for x in (pooled, patches)))


def test_counting_finds_what_is_planted_and_no_more():
    sources = {
        "knows": Knowing("scenes", True),
        "noise": Knowing("scenes", False),
        "pixels": PixelFeatures(4),
    }
    found = count_and_locate(sources, TRANSFORMS, device=CPU, settings=SCENES)
    assert found["knows"].count.mean() == 1.0
    assert found["knows"].where.mean() > 0.9
    chance = 1 / MOST
    for name in ("noise", "pixels"):
        count, where = found[name]
        assert abs(count.mean() - chance) < 2.58 * (chance * (1 - chance) / SCENES.test) ** 0.5
        assert abs(where.mean()) < 1.96 * where.std() / SCENES.test**0.5 + 0.05
    again = count_and_locate({"pixels": PixelFeatures(4)}, TRANSFORMS, device=CPU, settings=SCENES)
    for one, other in zip(found["pixels"], again["pixels"], strict=True):
        assert np.array_equal(one, other)


def test_propagation_finds_what_is_planted_and_no_more():
    sources = {"knows": Knowing("clips", True), "noise": Knowing("clips", False)}
    found = propagate_labels(sources, TRANSFORMS, device=CPU, settings=CLIPS)
    assert found.scores["knows"].mean() > found.unmoved + 0.15
    assert found.scores["noise"].mean() < found.unmoved
    assert np.all(found.scores["knows"] > found.scores["noise"])


@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_pictures_are_pure_functions_of_seed_and_index(size):
    """Whatever was drawn before; and each number of objects is there, apart and inside."""
    first = [draw_scene(3, index, size) for index in range(2 * MOST)]
    again = draw_scene(3, 5, size)
    assert all(np.array_equal(a, b) for a, b in zip(first[5], again, strict=True))
    assert not np.array_equal(first[5].pixels, draw_scene(4, 5, size).pixels)
    assert not np.array_equal(first[5].pixels, first[5 + MOST].pixels)
    assert [scene.count for scene in first] == [*range(1, MOST + 1)] * 2
    areas = [scene.covered.mean() for scene in first]
    assert min(areas) > 0 and areas[MOST - 1] > areas[0]
    clips = [draw_clip(seed, index, size, 5) for seed, index in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert np.array_equal(clips[0].pixels, clips[1].pixels)
    assert not any(np.array_equal(clips[0].pixels, other.pixels) for other in clips[2:])
    assert clips[0].labels.shape == (5, *size) and set(np.unique(clips[0].labels)) == {0, 1, 2}
    assert not np.array_equal(clips[0].labels[0], clips[0].labels[-1])


def test_scene_has_as_many_objects_as_it_says():
    """Counted as connected areas, at a size where a gap is pixels wide."""
    from scipy import ndimage

    for index in range(2 * MOST):
        scene = draw_scene(0, index, (160, 160))
        _, areas = ndimage.label(scene.covered, np.ones((3, 3)))  # pyright: ignore
        assert areas == scene.count


def test_labels_follow_patches_that_move_and_no_farther_than_the_radius():
    """Every patch has its own feature, and all move by one patch to the right each frame."""
    grid, frames = (4, 16), 4
    content = torch.eye(64).view(*grid, 64)
    patches = torch.stack([content.roll(frame, 1).flatten(0, 1) for frame in range(frames)])
    first = torch.zeros(8, 32, dtype=torch.int64)
    first[2:6, 4:8] = 1
    first[6:8, 10:14] = 2
    truth = torch.stack([first.roll(2 * frame, 1) for frame in range(1, frames)])
    settings = PropagationSettings(neighbours=1, radius=0.3)
    assert region_similarity(propagate(patches, first, grid, settings), truth) > 0.8
    assert region_similarity(first.expand(3, -1, -1), truth) < 0.4
    # Two patches a frame are beyond a radius of one.
    fast = torch.stack([content.roll(2 * frame, 1).flatten(0, 1) for frame in range(frames)])
    near = PropagationSettings(neighbours=1, radius=0.07)
    truth = torch.stack([first.roll(4 * frame, 1) for frame in range(1, frames)])
    assert region_similarity(propagate(fast, first, grid, settings), truth) > 0.8
    assert region_similarity(propagate(fast, first, grid, near), truth) < 0.4


def test_shares_correlations_and_similarity_by_hand():
    covered = torch.zeros(1, 4, 6, dtype=torch.bool)
    covered[0, :2, :3] = True
    assert share_of_patches(covered, (2, 3)).tolist() == [[1, 0.5, 0, 0, 0, 0]]
    first = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 1, 1]])
    second = torch.tensor([[2.0, 4, 6], [3, 2, 1], [1, 2, 3]])
    assert correlation(first, second).tolist() == pytest.approx([1, -1, 0])
    said, truth = torch.tensor([[[1, 1, 0, 2]]]), torch.tensor([[[1, 0, 0, 2]]])
    assert region_similarity(said, truth) == pytest.approx((1 / 2 + 1) / 2)
    assert region_similarity(said * 0, truth * 0) == 1.0
    pixels = np.full((1, 2, 2, 3), 0.75)
    expected = (0.75 - torch.tensor(TRANSFORMS.mean)) / torch.tensor(TRANSFORMS.std)
    assert torch.allclose(to_input(pixels, TRANSFORMS)[0, :, 1, 1], expected)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: CountingSettings(train=10), "train >= 80"),
        (lambda: PropagationSettings(frames=1), "frames >= 2"),
        (lambda: PropagationSettings(radius=0.0), "radius in"),
    ],
)
def test_bad_settings_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
