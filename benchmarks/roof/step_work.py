"""What a training step has to compute and to move.

Floating-point operations are those of the matrix products that stopfast's step cannot do without (a
multiplication and an addition are two), as `torch.utils.flop_counter` counts them: dead work that the step
leaves out is not in them, and attention's scores are not counted again in backward. Bytes are a least
traffic, and assume that everything between two matrix products is fused.
"""

from typing import NamedTuple

from stopfast.build import build_masks
from stopfast.config import Config
from stopfast.encoder import image_grid
from stopfast.masking import Masks

_FULL = 4  # bytes of fp32


class Shape(NamedTuple):
    """Tokens of one micro-batch."""

    images: int
    context: int
    """Kept patches of a context."""
    target: int
    """Patches of a target block."""
    contexts: int
    targets: int
    patches: int


class Work(NamedTuple):
    """Floating-point operations of one part of the step."""

    forward: int
    backward: int

    def __add__(self, other: object) -> "Work":
        assert isinstance(other, Work)
        return Work(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> int:
        """Both."""
        return self.forward + self.backward


def _product(rows: int, inner: int, columns: int, *, gradients: int = 2) -> Work:
    """A linear layer; ``gradients`` are its weight's and, unless nothing asks for it, its input's."""
    once = 2 * rows * inner * columns
    return Work(once, gradients * once)


def _scores(sequences: int, queries: int, keys: int, width: int) -> Work:
    once = 4 * sequences * queries * keys * width
    return Work(once, 2 * once)


def _block(sequences: int, tokens: int, wanted: int, width: int, hidden: int) -> Work:
    """A transformer block of which only ``wanted`` tokens of each sequence are read."""
    return (
        _product(sequences * tokens, width, 2 * width)
        + _product(sequences * wanted, width, width)
        + _scores(sequences, wanted, tokens, width)
        + _after(sequences * wanted, width, hidden)
    )


def _after(rows: int, width: int, hidden: int) -> Work:
    """Output projection and MLP."""
    mlp = _product(rows, width, hidden) + _product(rows, hidden, width)
    return _product(rows, width, width) + mlp


def _encoder(config: Config, sequences: int, tokens: int, wanted: int) -> Work:
    model = config.model
    width, hidden = model.embed_dim, int(model.embed_dim * model.mlp_ratio)
    work = _product(sequences * tokens, 3 * model.patch_size**2, width, gradients=1)
    for number in range(model.depth):
        last = number == model.depth - 1
        work += _block(sequences, tokens, wanted if last else tokens, width, hidden)
    return work


def _predictor(config: Config, shape: Shape) -> Work:
    model, noise = config.model, config.noise
    width = model.predictor_embed_dim
    hidden = int(width * model.predictor_mlp_ratio)
    contexts = shape.contexts * shape.images
    sequences = shape.targets * contexts
    tokens = shape.context + shape.target
    work = _product(contexts * shape.context, model.embed_dim, width)
    if noise.variant in ("stop", "stop_paper") and noise.cov == "learned":
        drawn = noise.noise_dim == "predictor"
        rows = sequences * shape.target * (noise.apply_to != "context")
        rows += contexts * shape.context * (noise.apply_to != "masked")
        # Nothing asks for the gradient of noise.
        work += _product(rows, width if drawn else model.embed_dim, width, gradients=1)
    for number in range(model.predictor_depth):
        last = number == model.predictor_depth - 1
        wanted = shape.target if last else tokens
        if number:
            work += _block(sequences, tokens, wanted, width, hidden)
            continue
        # The contexts' queries, keys and values are computed once, not once for each target block.
        packed = contexts * shape.context + sequences * shape.target
        work += _product(packed, width, 3 * width) + _scores(sequences, wanted, tokens, width)
        work += _after(sequences * wanted, width, hidden)
    return work + _product(sequences * shape.target, width, model.embed_dim)


def step_work(config: Config, shape: Shape) -> dict[str, Work]:
    """Return the operations of a micro-batch by part: context encoder, target encoder, predictor."""
    contexts = shape.contexts * shape.images
    rows = min(shape.targets * shape.target, shape.patches)
    return {
        "context encoder": _encoder(config, contexts, shape.context, shape.context),
        # No gradients flow through the target encoder.
        "target encoder": _encoder(config, shape.images, shape.patches, rows)._replace(backward=0),
        "predictor": _predictor(config, shape),
    }


def step_bytes(config: Config, shape: Shape, low: int = 2) -> dict[str, int]:
    """Return the least traffic of a micro-batch and of the update, in bytes by part.

    ``low`` is what a number takes that is computed with: 2 in bf16. Weights are read in forward and in
    backward, and their gradients written in fp32. Of each block's tokens seven rows of their width and two
    of the MLP's are written once and read once, being what backward needs; of the target encoder's, four
    pass and none is kept. The update reads weight, gradient and both moments in fp32, writes all but the
    gradient, and in half precision a copy; the teacher is read and written, and its copy written.
    """
    model = config.model
    width, narrow = model.embed_dim, model.predictor_embed_dim
    hidden = int(width * model.mlp_ratio)
    narrow_hidden = int(narrow * model.predictor_mlp_ratio)
    patch = 3 * model.patch_size**2
    encoder = model.depth * (4 * width**2 + 2 * width * hidden) + patch * width
    predictor = model.predictor_depth * (4 * narrow**2 + 2 * narrow * narrow_hidden)
    predictor += 2 * width * narrow
    rows = shape.contexts * shape.images * shape.context
    queried = shape.targets * shape.contexts * shape.images * (shape.context + shape.target)
    kept = model.depth * rows * (7 * width + 2 * hidden)
    passing = model.depth * shape.images * shape.patches * 4 * width
    queried *= model.predictor_depth * (7 * narrow + 2 * narrow_hidden)
    copy = low % _FULL  # none of fp32
    return {
        "context encoder": (2 * low + _FULL) * encoder + 2 * low * kept + low * rows * patch,
        "target encoder": low * encoder
        + 2 * low * passing
        + low * shape.images * shape.patches * patch,
        "predictor": (2 * low + _FULL) * predictor + 2 * low * queried,
        "update": (7 * _FULL + copy) * (encoder + predictor) + (2 * _FULL + copy) * encoder,
    }


def shape_of(config: Config, masks: Masks, images: int) -> Shape:
    """Return the tokens of a micro-batch with these masks."""
    grid = image_grid(config.data.transforms.size, config.model.patch_size)
    context, target = masks.context, masks.target
    lengths = (context[0].shape[1], target[0].shape[1])
    return Shape(images, *lengths, len(context), len(target), grid[0] * grid[1])


def drawn_shapes(config: Config, images: int, steps: int = 64) -> list[Shape]:
    """Return the tokens of the first steps, with the masks that the seed draws for them."""
    masks = build_masks(config)
    return [shape_of(config, masks(images, number), images) for number in range(steps)]
