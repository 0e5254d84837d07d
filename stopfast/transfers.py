"""Small data between host and device, and work beside other work, without waiting for a GPU's queue.

Numbers that a GPU is given from the host's pageable memory, or that it is asked for, cost a wait until
everything queued before is computed. On the CPU all of this is plain.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def filled_pair(first: int, second: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (first, second), [2], written on the device."""
    pair = torch.full((2,), first, dtype=dtype, device=device)
    pair[1:].fill_(second)
    return pair


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; a GPU copies it in its turn, from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # which stays until it is copied, whoever lets go of it
    return tensor.to(device, non_blocking=True)


def read(numbers: Tensor) -> list[int]:
    """Return a device's few integers [n] as soon as the current stream has computed them."""
    if numbers.device.type != "cuda":
        return numbers.tolist()
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(numbers.device))
    done.synchronize()
    return host.tolist()


class SideStream:
    """A CUDA stream of its own, made when a device is first used, for work beside the current stream's.

    Args:
        priority: -1 for work that goes before other streams' on a busy GPU.
    """

    def __init__(self, priority: int = 0) -> None:
        self._priority = priority
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def beside(self, device: torch.device, *, after: bool) -> Iterator[None]:
        """Run what is inside on the stream; ``after`` what the current stream was given before, or at once.

        What is computed inside may be used after :meth:`join`. With ``after``, its memory is used
        again only by later work inside, which comes after all uses, so no tensor has to be recorded
        on a stream.

        Raises:
            ValueError: a device without streams.
        """
        if device.type != "cuda":
            raise ValueError(f"expected a CUDA device for a stream of its own, got {device}")
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=self._priority)
        stream = self._streams[device]
        if after:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield

    def join(self, device: torch.device, *results: Tensor) -> None:
        """Let the current stream go on after the work of this one.

        Args:
            device: that of the work.
            results: tensors made inside without ``after``: their memory is kept until the current
                stream has used them.
        """
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._streams[device])
        for tensor in results:
            tensor.record_stream(current)
