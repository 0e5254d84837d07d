"""The noise of an image, however its batch is split: over ranks, and over micro-batches.

``python -m tests.test_noise_ranks FOLDER`` is 1, 2 and 4 ranks; it prints what they found as JSON.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.engine.agreement import relative_error
from stopfast.kernels.ops import EAGER, FUSED, Ops
from tests.noise_battery import repeats
from tests.small_predictor import KX, KY, D, N, P, small

ROOT = Path(__file__).resolve().parent.parent
OPS = {"fused": FUSED, "eager": EAGER}
WORLDS = (1, 2, 4)
BATCH, CONTEXTS, TARGETS, SEED, STEP = 8, 2, 2, 5, 7


def noise(
    ops: Ops, ids: Tensor, step: int = STEP, settings: dict[str, Any] | None = None
) -> Tensor:
    """The predictor's noise for some images of the batch, [M, E, images, Kx + Ky, P]: its tokens, the rest
    of which is zero."""
    predictor = small(apply_stop=True, apply_to="both", depth=0, **(settings or {"cov": "fixed"}))
    made = []

    def keep(*arguments: Any) -> Tensor:
        made.append(ops.predictor_tokens(*arguments))
        return made[-1]

    predictor.ops = ops._replace(predictor_tokens=keep)
    with torch.no_grad():
        predictor.predictor_pos_embed.zero_()
        predictor.predictor_embed.bias.zero_()
        x, masks_x, masks = batch(ids)
        seed = torch.tensor([SEED, step], device=ids.device)
        predictor.to(ids.device)(0 * x, masks_x, masks, seed=seed, sample_ids=ids)
    return made[0].view(TARGETS, CONTEXTS, len(ids), KX + KY, P)


def batch(ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Features and masks of some images of the one global batch."""
    generator = torch.Generator().manual_seed(1)
    at = ids.cpu()
    x = torch.randn(CONTEXTS, BATCH, KX, D, generator=generator)[:, at].flatten(0, 1)
    order = torch.rand(CONTEXTS + TARGETS, BATCH, N, generator=generator).argsort(-1)[:, at]
    contexts, targets = order[:CONTEXTS, ..., :KX], order[CONTEXTS:, ..., :KY]
    return x.to(ids.device), [*contexts.to(ids.device)], [*targets.to(ids.device)]


def part(rank: int, world: int, split: str) -> Tensor:
    """The places of a rank's images in the global batch."""
    places = torch.arange(BATCH)
    return places[rank::world] if split == "in turn" else places.chunk(world)[rank]


def fours(noise: Tensor) -> Tensor:
    """Every draw once: a context is in the sequences of all target masks."""
    return torch.cat([noise[0, ..., :KX, :].flatten(), noise[..., KX:, :].flatten()])


def work(rank: int, world: int, folder: str) -> None:
    """One rank: its images' noise, gathered and compared with the whole batch's by the first rank."""
    torch.set_num_threads(1)
    store = f"file://{folder}/{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for name, ops in OPS.items():
        for split in ("in blocks", "in turn"):
            mine = noise(ops, part(rank, world, split)).contiguous()
            gathered = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(gathered, mine)
            if rank:
                continue
            whole = noise(ops, torch.arange(BATCH))
            places = torch.cat([part(r, world, split) for r in range(world)])
            together = torch.cat(gathered, dim=2)
            found = {
                "world": world, "ops": name, "split": split,
                "equal": torch.equal(together, whole[:, :, places]),
                "shared": repeats(fours(together)) < 1,
                "deviation": together.std().item(),
            }  # fmt: skip
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def test_ranks(tmp_path: Path):
    """On 1, 2 and 4 ranks every image has the noise that it has in one process, and nobody else has it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_noise_ranks", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(WORLDS) * len(OPS) * 2
    assert all(f["equal"] and not f["shared"] and 0.2 < f["deviation"] < 0.3 for f in found), found


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches(ops: str, parts: int, device: torch.device):
    """Noise is the same bits, projected noise the same to rounding."""
    places = torch.arange(BATCH, device=device)
    for settings in ({"cov": "fixed"}, {"cov": "learned"}):
        whole = noise(OPS[ops], places, settings=settings)
        split = [noise(OPS[ops], ids, settings=settings) for ids in places.chunk(parts)]
        together = torch.cat(split, dim=2)
        if settings["cov"] == "fixed":
            assert torch.equal(together, whole)
            assert repeats(fours(together).cpu()) == 1
        assert relative_error(together, whole) < 1e-6
    assert relative_error(noise(OPS[ops], places, STEP + 1), noise(OPS[ops], places)) > 1


@pytest.mark.parametrize("ops", OPS)
def test_gradient_accumulation(ops: str, device: torch.device):
    """Gradients of two micro-batches add up to the batch's, the noise's part among them."""
    places = torch.arange(BATCH, device=device)

    def gradients(parts: list[Tensor], told: list[Tensor]) -> list[Tensor | None]:
        predictor = small(apply_stop=True, apply_to="both", depth=1, ops=OPS[ops]).to(device)
        for places, ids in zip(parts, told, strict=True):
            seed = torch.tensor([SEED, STEP], device=device)
            out = predictor(*batch(places), seed=seed, sample_ids=ids)
            out.square().sum().backward()
        return [p.grad for p in predictor.parameters() if p.requires_grad]

    whole, halves = gradients([places], [places]), list(places.chunk(2))
    for got, expected in zip(gradients(halves, halves), whole, strict=True):
        assert relative_error(got, expected) < 1e-5
    shared = gradients(halves, [halves[0], halves[0]])  # as if each counted its images from zero
    assert relative_error(shared[0], whole[0]) > 1e-2


if __name__ == "__main__":
    # Forked from a process that has done nothing but import, which is most of a rank's time.
    context = multiprocessing.get_context("fork")
    for world in WORLDS:
        ranks = [context.Process(target=work, args=(r, world, sys.argv[1])) for r in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"{world} ranks ended with {[rank.exitcode for rank in ranks]}")
