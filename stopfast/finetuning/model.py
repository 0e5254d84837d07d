"""A checkpoint's encoder as timm's classifier, and that classifier as a folder that timm loads."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stopfast.checkpoint import load_weights, save_tensors
from stopfast.config import Transforms
from stopfast.encoder import VisionTransformer
from stopfast.export.timm import timm_config
from stopfast.export.weights import channels_of, common_weights, cpu_weights
from stopfast.finetuning.settings import Recipe

if TYPE_CHECKING:
    import timm.models

_CHANNELS = 3
_NEW = ("head.", "fc_norm.")


def require_timm() -> None:
    """Refuse to go on without timm, before anything is read or written.

    Raises:
        ValueError: says how to get it.
    """
    try:
        import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"expected timm for fine-tuning, which cannot be imported ({error}): "
            "pip install 'stopfast[timm]'"
        ) from None


def classifier_arguments(
    encoder: VisionTransformer, transforms: Transforms, recipe: Recipe
) -> dict[str, Any]:
    """Return what timm's ``VisionTransformer`` takes beside the number of classes and the drop rates."""
    arguments = dict(timm_config(encoder, transforms)["model_args"])
    arguments["fc_norm"] = recipe.fc_norm
    if recipe.init_values is not None:
        arguments["init_values"] = recipe.init_values
    return arguments


def build_classifier(
    encoder: VisionTransformer, transforms: Transforms, classes: int, recipe: Recipe
) -> "timm.models.VisionTransformer":
    """Return timm's model with the encoder's weights and a new head, initialised from torch's generator.

    The average is over patches; a class token stays in the sequence, and out of the average. An encoder
    of one channel becomes one of three: see :func:`stopfast.export.weights.common_weights`.

    Args:
        encoder: what was pre-trained; left as it is.
        transforms: of its images.
        classes: outputs of the head.
        recipe: positions, norm, head, layer scale and stochastic depth of it.

    Raises:
        ValueError: an encoder that timm's model cannot hold, or one that takes no photographs.
    """
    from timm.models import VisionTransformer as Classifier

    channels = channels_of(encoder)
    if channels != _CHANNELS:
        raise ValueError(f"expected an encoder of 1 or {_CHANNELS} channels, got {channels}")
    arguments = classifier_arguments(encoder, transforms, recipe)
    model = Classifier(**arguments, num_classes=classes, drop_path_rate=recipe.drop_path)
    load_weights(
        model, _with_new_parts(model, common_weights(encoder)), "the encoder in timm's model"
    )
    assert isinstance(model.head, nn.Linear) and model.pos_embed is not None
    nn.init.trunc_normal_(model.head.weight, std=recipe.head_std)
    nn.init.zeros_(model.head.bias)
    model.pos_embed.requires_grad_(recipe.positions == "learned")
    return model


def _with_new_parts(model: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights, and the model's own where the encoder has none."""
    own = model.state_dict()
    state = {key: value for key, value in own.items() if key.startswith(_NEW) or ".ls" in key}
    if "fc_norm.weight" in own:  # then timm's model has no norm before the average
        trained = {key: value for key, value in trained.items() if not key.startswith("norm.")}
    return state | trained


def write_classifier(
    model: nn.Module,
    encoder: VisionTransformer,
    transforms: Transforms,
    classes: Sequence[str],
    recipe: Recipe,
    folder: Path,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` for ``timm.create_model("local-dir:FOLDER", ...)``.

    Args:
        model: from :func:`build_classifier`, with the same encoder, transforms and recipe.
        encoder: tells the sizes.
        transforms: of its images.
        classes: names, which the file keeps.
        recipe: tells how images are cut for evaluation.
        folder: a new one.
    """
    config = timm_config(encoder, transforms)
    config["model_args"] = classifier_arguments(encoder, transforms, recipe)
    config |= {"num_classes": len(classes), "label_names": list(classes)}
    config["pretrained_cfg"] |= {
        "interpolation": "bicubic",
        "crop_pct": recipe.center,
        "num_classes": len(classes),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tensors(cpu_weights(model), folder / "model.safetensors", {"format": "pt"})
