"""What an evaluation tells while it goes; on terminals alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from stopfast.data.images import Images

_LONG = 2000  # images above which progress is shown


@contextmanager
def image_bar(console: Console | None, images: Images) -> Iterator[Callable[[Tensor], Tensor]]:
    """Show how many images of a split are done, if they are many; yield what counts a batch [B, ...]."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = console is not None and console.is_terminal and len(images) > _LONG
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(f"features of {images.root}", total=len(images))

        def count(batch: Tensor) -> Tensor:
            progress.advance(task, len(batch))
            return batch

        yield count


@contextmanager
def step_line(console: Console | None) -> Iterator[Callable[[str], None]]:
    """Show which step is being done; yield what is told of each."""
    if console is None:
        yield lambda step: None
        return
    with console.status("") as status:
        yield lambda step: status.update(escape(step))
