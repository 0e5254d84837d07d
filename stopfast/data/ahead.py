"""Work done ahead of its consumer, in a thread that ends with it."""

import threading
from collections.abc import Generator
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def read_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield what ``items`` yields, made in a thread that is up to ``depth`` items ahead.

    What ``items`` raises is raised here, after the items before it. Closing this generator closes
    ``items`` and ends the thread.
    """
    ready: Queue[object] = Queue(depth)
    stop = threading.Event()

    def work() -> None:
        end: object = _END
        try:
            for item in items:
                ready.put(item)
                if stop.is_set():
                    break
        except BaseException as error:
            end = _Failed(error)
        finally:
            items.close()
        ready.put(end)

    # A daemon, so that a generator that was never closed does not keep the process.
    thread = threading.Thread(target=work, name="stopfast-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        while thread.is_alive():
            # Makes room for the item that the thread may be waiting to hand over.
            try:
                ready.get(timeout=0.01)
            except Empty:
                continue
        thread.join()
