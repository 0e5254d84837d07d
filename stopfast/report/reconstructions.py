"""The section of runs of MAE and Beyond Masking: what was seen, and what was made of it."""

import torch
from torch import Tensor

from stopfast.build import patch_target
from stopfast.config import ReconstructionConfig
from stopfast.objectives.reconstruction import Reconstruction, ReconstructionDraws
from stopfast.report import pictures
from stopfast.report.canvas import picture
from stopfast.report.group import Group, at_start
from stopfast.report.page import Picture, Section
from stopfast.report.samples import to_pixels
from stopfast.report.settings import objective_name
from stopfast.report.views import STRETCHED, Predicted, predicted, seen
from stopfast.trained import TrainedRun

_ABOUT = {
    "none": "",
    "zoomed-in": " The encoder sees what is framed; predicted is all of the image, and shown in its size.",
    "zoomed-out": " The encoder sees the image where it is framed, amid mirrors of itself; predicted is "
    "the image alone, at the size of the canvas.",
    "distorted": " The encoder sees the image drawn towards a point.",
    "blurred": " The encoder sees the image through a random 7 x 7 convolution.",
    "decolorized": " The encoder sees a random weighting of the three colours.",
}


def reconstruction_section(group: Group) -> Section | None:
    """Return predictions of pixels before and after training; None without such runs or images."""
    own = group.of(ReconstructionConfig)
    if own is None or own.pool is None:
        return None
    parts = [_reconstructed(name, run, own.field(name)) for name, run in own.runs.items()]
    return Section(title="Reconstructions", parts=parts)


def _reconstructed(name: str, run: TrainedRun, images: Tensor) -> Picture:
    config = run.config
    settings = config.objective
    assert isinstance(settings, ReconstructionConfig)
    after, before = run.objective, at_start(config)
    assert isinstance(after, Reconstruction) and isinstance(before, Reconstruction)
    draws = after.draws(1, len(images), slice(0, len(images)))
    given = seen(after, images, draws)
    target = patch_target(config.model.patch_size, settings.target_norm, config.data.transforms.std)
    made = {
        f"after {run.step:,}\nsteps": predicted(after, target, images, draws),
        "before\ntraining": predicted(before, target, images, draws),
    }
    rows = {
        "image": to_pixels(images, config.data.transforms),
        "seen": given.pixels.where(given.shown[..., None], torch.tensor(pictures.UNSEEN)),
        **{row: _marked(each) for row, each in made.items()},
    }
    frames = {} if given.inside is None else {"seen": given.inside}
    frame = next(iter(made.values())).seen
    if frame is not None:
        frames |= dict.fromkeys(("image", *made), frame)
    figure = pictures.draw_images(rows, frames)
    caption = _caption(name, run, before, images, draws)
    return picture(figure, f"reconstructions of {name}", caption)


def _marked(made: Predicted) -> Tensor:
    """A prediction where it is asked for, and the image, pale, where it is not."""
    rest = torch.from_numpy(pictures.pale(made.truth.numpy()))
    return made.pixels.where(made.judged[..., None], rest)


@torch.inference_mode()
def _caption(
    name: str,
    run: TrainedRun,
    before: Reconstruction,
    images: Tensor,
    draws: ReconstructionDraws,
) -> str:
    settings = run.config.objective
    assert isinstance(settings, ReconstructionConfig)
    losses = [each.loss(images, draws).item() for each in (run.objective, before)]
    told = f"{name} ({objective_name(run.config)}).{_ABOUT[settings.degrade.kind]}"
    if settings.mask_ratio:
        told += f" Gray: the {100 * settings.mask_ratio:g} % of the patches that it does not see."
        if settings.degrade.kind != "zoomed-out":
            told += " Pale: what it did see, which it is not asked for."
    if settings.degrade.kind == "blurred":
        told += f" {STRETCHED}"
    if settings.target_norm != "none":
        of = {"patch": "patch", "channel": "channel of a patch"}[settings.target_norm]
        told += (
            f" What is predicted is normalised in each {of}. The pictures have the true mean and spread "
            "put back, which nobody predicted: of themselves they make a mosaic of the image."
        )
    return f"{told} The loss of these images is {losses[0]:.3f}; before training it was {losses[1]:.3f}."
