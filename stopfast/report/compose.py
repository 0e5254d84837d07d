"""The report: from the folders of runs to one HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from stopfast import __version__
from stopfast.config import Config
from stopfast.report.canvas import require_matplotlib
from stopfast.report.features import feature_section
from stopfast.report.group import Group
from stopfast.report.jepa import jepa_sections
from stopfast.report.logs import read_log
from stopfast.report.page import Section, render_page
from stopfast.report.positions import position_section
from stopfast.report.reconstructions import reconstruction_section
from stopfast.report.samples import sample_images, spread
from stopfast.report.settings import difference_table, full_table, summary_table
from stopfast.report.training import curve_section
from stopfast.trained import TrainedRun, load_trained

_POOL = 8
"""Images whose features are looked at, for each one shown."""


def report(
    runs: Sequence[Path],
    data: Path | None,
    output: Path,
    *,
    title: str = "stopfast report",
    lead: str = "",
    sections: Sequence[Section] = (),
    images: int = 6,
) -> Path:
    """Write one HTML file about finished or stopped runs; return its path.

    Args:
        runs: folders of runs or of checkpoints.
        data: folder of images for the pictures that need some; default: that of the first run's settings.
        output: the file; an older one is replaced.
        title, lead: heading and first paragraph.
        sections: what else to show, before the settings.
        images: how many images the pictures show.

    Raises:
        ValueError: no run, or a checkpoint, log or folder that cannot be used.
        RuntimeError: matplotlib is not installed.
    """
    if not runs or images < 1:
        raise ValueError(f"expected runs and images >= 1, got {len(runs)} runs, images={images}")
    require_matplotlib()
    loaded = {name: load_trained(path) for name, path in zip(_names(runs), runs, strict=True)}
    folder = data or next(iter(loaded.values())).config.data.root
    groups = _groups(loaded, folder, images)
    body = [*sections, _settings_section(loaded)]
    logs = {name: read_log(path) for name, path in zip(loaded, runs, strict=True)}
    body.append(curve_section(loaded, logs))
    for group in groups:
        found = _sections(group)
        if len(groups) > 1:
            names = ", ".join(group.runs)
            found = [replace(section, title=f"{section.title}: {names}") for section in found]
        body += found
    footer = f"Made by stopfast {__version__}. This file needs no other file and no network."
    text = render_page(title, lead or _lead(loaded, folder), body, footer)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(output)
    return output


def _sections(group: Group) -> list[Section]:
    """What there is to show of runs, those of some objectives only where there are such."""
    made = (reconstruction_section(group), position_section(group), feature_section(group))
    return [section for section in made if section is not None] + jepa_sections(group)


def _names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders, or by their whole paths where two folders have one name."""
    names = [path.resolve().name for path in runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"expected runs that differ, got {names}")
    return names


def _groups(runs: Mapping[str, TrainedRun], folder: Path | None, count: int) -> list[Group]:
    """Put together the runs that see an image in the same way and cut it into the same patches."""
    alike: dict[tuple[object, ...], dict[str, TrainedRun]] = {}
    for name, run in runs.items():
        t = run.config.data.transforms
        key = (t.size, t.mean, t.std, t.center, run.config.model.patch_size)
        alike.setdefault(key, {})[name] = run
    groups = []
    for members in alike.values():
        config = next(iter(members.values())).config
        if folder is None:
            groups.append(Group(runs=members, pool=None, fields={}))
            continue
        # The same photographs in every size that an objective takes.
        sizes = {name: run.objective.transforms.size for name, run in members.items()}
        taken = {config.data.transforms.size, *sizes.values()}
        made = {size: _sized(folder, config, size, _POOL * count) for size in taken}
        pool = made[config.data.transforms.size]
        groups.append(
            Group(
                runs=members,
                pool=pool,
                shown=spread(len(pool), count).tolist(),
                fields={name: made[size] for name, size in sizes.items()},
            )
        )
    return groups


def _sized(folder: Path, config: Config, size: tuple[int, int], count: int) -> Tensor:
    transforms = replace(config.data.transforms, size=size)
    return sample_images(
        folder, replace(config, data=replace(config.data, transforms=transforms)), count
    )


def _settings_section(runs: Mapping[str, TrainedRun]) -> Section:
    tables = [summary_table(runs), difference_table(runs), full_table(runs)]
    return Section(title="Settings", parts=[table for table in tables if table is not None])


def _lead(runs: Mapping[str, TrainedRun], folder: Path | None) -> str:
    steps = ", ".join(f"{name} after {run.step:,} steps" for name, run in runs.items())
    images = (
        "No image folder was given, so pictures that need images are left out."
        if folder is None
        else f"Example images are from {folder}."
    )
    return f"Runs: {steps}. {images}"
