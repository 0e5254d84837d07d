"""When the host waits for a GPU: until a batch was copied to where it stays, and not for a step's draws.

There need be no GPU: what is looked at is the order of the calls, and which operations there are.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stopfast.config import DataConfig, Transforms
from stopfast.data import dali, pil
from stopfast.data.batch import Encoded
from stopfast.data.images import open_images
from stopfast.data.loader import TrainPlan, train_batches
from stopfast.data.pixels import open_stored
from stopfast.objectives.jepa import Jepa
from tests.small_photographs import write_photographs


class _Graph:
    """Two batches in one buffer, as DALI reuses its own."""

    def __init__(self, log):
        self.log, self.count = log, 0
        self.pixels, self.samples = torch.empty(2, 3, 4, 4), torch.empty(2, 1, dtype=torch.int64)

    def run(self):
        self.log.append("run")
        self.count += 1
        if self.count > 2:
            raise StopIteration
        self.pixels.fill_(self.count)
        self.samples.fill_(self.count)
        return self, SimpleNamespace(as_tensor=lambda: self.samples)

    def as_tensor(self):
        return self

    def __dlpack__(self, **settings):
        self.log.append("copy")
        return self.pixels.__dlpack__(**settings)

    def __dlpack_device__(self):
        return self.pixels.__dlpack_device__()


class _Stream:
    def __init__(self, log, device):
        self.log, self.device = log, device

    def synchronize(self):
        self.log.append("wait")


def _decode(tmp_path, device):
    return dali.decode_with_dali(
        iter(()),
        open_images(write_photographs(tmp_path)),
        Transforms(),
        batch_size=2,
        device=torch.device(device),
        data=DataConfig(),
    )


def test_a_batch_was_copied_before_dali_runs_again(tmp_path, monkeypatch):
    """On a GPU: by a stream on which no step is waited for, and whose memory the steps' stream holds."""
    log = []

    @contextmanager
    def stream(own):
        log.append("own stream")
        yield
        log.append("steps' stream")

    monkeypatch.setattr(dali, "_pipeline", lambda *_: _Graph(log))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(log, device))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the steps', {device}")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, of: log.append(of))
    batches = []
    for batch in _decode(tmp_path, "cuda:1"):
        log.append("step")
        batches.append(batch)
    copied = ["own stream", "copy", "steps' stream", "wait", "the steps', cuda:1"]
    assert log == 2 * ["run", *copied, "step"] + ["run"]
    for number, batch in enumerate(batches, start=1):
        assert (batch.images == number).all() and (batch.samples == number).all()


def test_a_batch_is_no_view_of_the_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(dali, "_pipeline", lambda *_: _Graph([]))
    batches = list(_decode(tmp_path, "cpu"))
    for number, batch in enumerate(batches, start=1):
        assert (batch.images == number).all() and (batch.samples == number).all()


def test_pixels_are_sent_beside_the_steps(tmp_path, monkeypatch):
    """On a GPU: PIL's pixels, from pinned memory, by a stream of their own, before they are handed over."""
    images = open_images(write_photographs(tmp_path))
    transforms = Transforms(size=(16, 24), crop_scale=(0.5, 1.0), flip=0.5)
    plan = TrainPlan(len(images), 5, transforms, 1)
    on_host = list(
        train_batches(
            images,
            plan,
            first_step=1,
            last_step=2,
            device=torch.device("cpu"),
            data=DataConfig(loader="pil"),
        )
    )
    log, empty = [], torch.empty

    @contextmanager
    def stream(own):
        log.append("own stream")
        yield
        log.append("steps' stream")

    def allocate(*size, pin_memory=False, **settings):
        log.append(("pinned" if pin_memory else "pageable", settings.get("dtype")))
        return empty(*size, **settings)

    class Device:
        type = "cuda"

    # A stream of a "GPU" whose memory is the host's.
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: _Stream(log, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the steps'")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, of: log.append(of))
    monkeypatch.setattr(torch, "empty", allocate)

    def encoded():
        for step, samples in enumerate(plan.batches(1, 2), start=1):
            data = [images.read(sample) for sample in samples]
            sizes = np.array([open_stored(one).size[::-1] for one in data])
            yield Encoded(samples, data, plan.draws(step, samples, sizes))

    batches = pil.decode_with_pil(encoded(), images, transforms, device=Device(), threads=2)
    for batch, expected in zip(batches, on_host, strict=True):
        log.append("step")
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.samples, expected.samples)
    allocated = [entry for entry in log if isinstance(entry, tuple)]
    assert allocated == 2 * [("pinned", torch.uint8)]
    sent = ["own stream", "steps' stream", "wait"]
    assert [entry for entry in log if entry in sent] == 2 * sent
    # Decoding runs ahead of the steps, but none is handed over before it was waited for.
    for number in (1, 2):
        places = [
            [place for place, entry in enumerate(log) if entry == what][number - 1]
            for what in ("wait", "the steps'", "step")
        ]
        assert places == sorted(places), log


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (2**63 - 1, 2**62 + 1), (2**53 + 1, 300_001)])
def test_draws_are_made_on_the_device(seed, step):
    """Numbers of the host would be copied from pageable memory, for which a GPU's queue is waited for."""
    objective = SimpleNamespace(
        seed=seed,
        masks=lambda *_, **__: None,
        encoder=SimpleNamespace(pos_embed=torch.zeros(1)),
        bucket=1,
        degradation=None,
    )
    with _Operations() as operations:
        draws = Jepa.draws(objective, step, 8, slice(2, 5))  # pyright: ignore[reportArgumentType]
    assert draws.seed.dtype == draws.sample_ids.dtype == torch.int64
    assert draws.seed.tolist() == [seed, step] and draws.sample_ids.tolist() == [2, 3, 4]
    assert set(operations.names) <= {"full", "fill_", "slice", "arange"}, operations.names
