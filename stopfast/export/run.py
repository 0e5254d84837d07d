"""From a checkpoint of a run to a file or folder of another library."""

from pathlib import Path
from typing import Literal, get_args

from stopfast.export.files import appearing, require_new
from stopfast.export.published import write_published
from stopfast.export.safetensors import write_safetensors
from stopfast.export.timm import write_timm
from stopfast.export.transformers import write_transformers
from stopfast.trained import Which, load_trained

Format = Literal["safetensors", "timm", "hf", "pth"]


def export_run(
    checkpoint: Path, output: Path, *, format: Format, which: Which = "target_encoder"
) -> Path:
    """Write a trained encoder for another library, whole or not at all; none of them has to be installed.

    Args:
        checkpoint: a checkpoint folder, or a run's folder: then its newest checkpoint.
        output: what to write, a new path: a file for ``"safetensors"`` and ``"pth"``, a folder for
            ``"timm"`` and ``"hf"``.
        format: ``"safetensors"``: the published names, for :func:`load_encoder`. ``"timm"``: for
            ``timm.create_model("local-dir:OUTPUT", pretrained=True)``. ``"hf"``: for
            ``transformers.IJepaModel.from_pretrained(OUTPUT)`` or, with a class token,
            ``ViTModel.from_pretrained(OUTPUT, add_pooling_layer=False)``. ``"pth"``: the published
            file of the run's objective with all its networks, for :func:`stopfast.load_published` and
            :func:`stopfast.load_published_objective`.
        which: the encoder; the published results are the target encoder's. ``"pth"`` holds both.

    Returns:
        ``output``.

    Raises:
        ValueError: ``output`` exists, an unknown format or encoder, or a model that the format has no
            place for.
        CheckpointError: no checkpoint there, or an altered one.
    """
    for name, value, choices in (("format", format, Format), ("which", which, Which)):
        if value not in get_args(choices):
            raise ValueError(f"expected {name} in {get_args(choices)}, got {value!r}")
    require_new(output)
    run = load_trained(checkpoint)
    with appearing(output) as path:
        if format == "pth":
            write_published(run, path)
        else:
            write = {
                "safetensors": write_safetensors,
                "timm": write_timm,
                "hf": write_transformers,
            }[format]
            write(run, which, path)
    return output
