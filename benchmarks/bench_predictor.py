"""The predictor, forward and backward: the published programs' way and the library.

Nothing is timed unless output and every gradient of an arm agree with the published arm's, given the same
noise; what is timed draws its own. Goal for ViT-B in fp32 on a CPU: 1.5 times StoP's published arm.

`published` is what each program does, and they differ: StoP recomputes attention and MLP of every
block in the backward, I-JEPA never does. Each variant has the other choices as arms of their own, and
the strongest opponent: no recomputation and fused library attention, on a GPU compiled too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.engine.agreement import peak_bytes, relative_error
from benchmarks.engine.options import Cell, Options
from benchmarks.engine.refusals import Disagreement, NotHere
from benchmarks.engine.runner import Bench
from benchmarks.step.published_model import PublishedPredictor
from stopfast.predictor import Predictor

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
VARIANTS: dict[str, bool | None] = {"I-JEPA": None, "StoP": True}
CHOICES = {"none": "not recomputing", "full": "recomputing", "early": "recomputing, early stop"}
THEIRS, BEST, COMPILED = "published", "SDPA", "SDPA, compiled"
OURS, FUSED = "stopfast", "stopfast, fused"


class Sizes(NamedTuple):
    """Of the encoder whose features come in, and of the predictor."""

    patches: int
    width: int
    depth: int = 6
    heads: int = 12


SIZES = {
    "toy": Sizes(36, 48, 2, 2),
    "vit-b16": Sizes(196, 768),
    "vit-l16": Sizes(196, 1024, 12, 16),
    "vit-h14": Sizes(256, 1280, 12, 16),
}


@dataclass(frozen=True, kw_only=True)
class PredictorOptions(Options):
    """The predictor alone, by default that of ViT-B/16 with 8 images."""

    model: tuple[str, ...] = ("vit-b16",)
    images: tuple[int, ...] = (8,)
    variant: tuple[str, ...] = tuple(VARIANTS)
    targets: int = 4
    context_tokens: int = 80
    target_tokens: int = 36

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name, known in (("model", SIZES), ("variant", VARIANTS), ("precision", TOLERANCE)):
            asked = getattr(self, name)
            wrong = {asked} if isinstance(asked, str) else set(asked or ())
            if wrong - set(known):
                raise ValueError(f"expected {name} of {list(known)}, got {sorted(wrong)}")


OPTIONS = PredictorOptions


@dataclass(frozen=True)
class Inputs:
    """Of one call; ``noise`` None lets an arm draw its own."""

    x: Tensor
    contexts: list[Tensor]
    targets: list[Tensor]
    noise: list[Tensor] | None
    cotangent: Tensor
    autocast: bool


class Reference(NamedTuple):
    """What every arm is given, and what the published arm makes of it."""

    inputs: Inputs
    weights: dict[str, Tensor]
    results: dict[str, Tensor | None]


def plan(options: PredictorOptions) -> Iterator[Cell]:
    """Every arm of every variant and size."""
    tokens = f"{options.targets}x({options.context_tokens}+{options.target_tokens})"
    for model in options.model:
        for images in options.images:
            for variant in options.variant:
                other = "none" if variant == "StoP" else "full"
                arms = (THEIRS, CHOICES[other], CHOICES["early"], BEST, COMPILED, OURS, FUSED)
                problem = {"model": model, "images": images, "variant": variant}
                problem |= {"tokens": tokens, "precision": options.dtype}
                yield from (Cell("predictor", arm, problem) for arm in arms)


def build(arm: str, cell: Cell, device: torch.device) -> nn.Module:
    """Return an arm's module, with weights of its own.

    Raises:
        NotHere: the arm is a GPU's.
    """
    variant = str(cell.problem["variant"])
    sizes = SIZES[str(cell.problem["model"])]
    named: dict[str, Any] = {
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "predictor_embed_dim": min(384, sizes.width),
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "apply_stop": VARIANTS[variant],
    }
    if arm in (COMPILED, FUSED) and device.type != "cuda":
        raise NotHere("no GPU")
    if arm in (OURS, FUSED):
        ops = "fused" if arm == FUSED else "auto"
        return Predictor(sizes.patches, sizes.width, **named, ops=ops)
    published = partial(PublishedPredictor, sizes.patches, sizes.width, **named)
    if arm in (BEST, COMPILED):
        return published(sdpa=True)
    how = {text: choice for choice, text in CHOICES.items()}
    how[THEIRS] = "full" if variant == "StoP" else "none"
    return published(checkpointing=how[arm])  # type: ignore[arg-type]


def reference(cell: Cell, bench: Bench) -> Reference:
    """Draw inputs and weights; biases too, since zeros would hide a lost one. All by one seed."""
    torch.manual_seed(0)
    module = build(THEIRS, cell, bench.device).to(bench.device)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    inputs = draw_inputs(cell, bench)
    weights = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    return Reference(inputs, weights, results(module, inputs))


def draw_inputs(cell: Cell, bench: Bench) -> Inputs:
    """Explicit noise for StoP, so that every arm computes the same numbers."""
    options: Any = bench.options
    images, sizes = int(cell.problem["images"]), SIZES[str(cell.problem["model"])]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(bench.device)

    def indices(count: int) -> Tensor:
        scores = torch.rand(images, sizes.patches, generator=generator)
        return scores.argsort(dim=1)[:, :count].sort(dim=1).values.to(bench.device)

    noise = None
    if VARIANTS[str(cell.problem["variant"])]:
        size = (images, options.target_tokens, sizes.width)
        noise = [0.25 * normal(*size) for _ in range(options.targets)]
    return Inputs(
        x=normal(images, options.context_tokens, sizes.width).requires_grad_(),
        contexts=[indices(options.context_tokens)],
        targets=[indices(options.target_tokens) for _ in range(options.targets)],
        noise=noise,
        cotangent=normal(options.targets * images, options.target_tokens, sizes.width),
        autocast=cell.problem["precision"] == "bf16",
    )


def step(module: nn.Module, inputs: Inputs) -> Tensor:
    """Forward and backward from fresh gradients, as a training step has them."""
    module.zero_grad(set_to_none=True)
    inputs.x.grad = None
    with torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=inputs.autocast):
        prediction = module(inputs.x, inputs.contexts, inputs.targets, noise=inputs.noise)
    prediction.backward(inputs.cotangent.to(prediction.dtype))
    return prediction.detach()


def results(module: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """Output and gradients by name."""
    prediction = step(module, inputs)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"output": prediction, "x": inputs.x.grad, **gradients}


def worst_error(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], bound: float
) -> float:
    """Return the largest relative error.

    Raises:
        Disagreement: it is beyond the bound; the tensors are named.
    """
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bound}
    if wrong:
        raise Disagreement(f"relative errors above {bound} of the published arm: {wrong}")
    return max(errors.values())


def test_predictor(cell: Cell, bench: Bench) -> None:
    """Milliseconds of forward and backward; largest error beside the published arm; peak memory."""
    given = bench.shared(lambda: reference(cell, bench))
    module = build(cell.arm, cell, bench.device)
    module.load_state_dict(given.weights, strict=True)
    module.to(bench.device)
    if cell.arm == COMPILED:
        module.compile()
    bound = TOLERANCE[str(cell.problem["precision"])]
    bench.info["relative_error"] = worst_error(results(module, given.inputs), given.results, bound)
    # Equal numbers need given noise; a real step draws its own, each arm in its own way.
    inputs = replace(given.inputs, noise=None)
    bench.time(lambda: step(module, inputs), rounds=7 if bench.device.type == "cpu" else 30)
    bench.info["peak_bytes"] = peak_bytes(lambda: step(module, inputs), bench.device)
