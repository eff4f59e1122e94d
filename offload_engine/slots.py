"""Lends and reclaims device memory.

A slot is one flat allocation from torch's caching allocator, made on the compute stream; it goes
back when its last reference does. Nothing here synchronises unless memory has run out.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .units import format_nbytes

_log = logging.getLogger("offload_engine")


class OutOfDeviceMemory(torch.OutOfMemoryError):
    """The device has no room for a component, not even after everything else was released.

    ``name``, ``needed_nbytes``, ``free_nbytes`` and ``total_nbytes`` (of the device).
    """

    def __init__(self, name: str, needed_nbytes: int, device: torch.device) -> None:
        free_nbytes, total_nbytes = memory_info(device)
        super().__init__(
            f"{name} needs {format_nbytes(needed_nbytes)} on {device}, where "
            f"{format_nbytes(free_nbytes)} of {format_nbytes(total_nbytes)} are free after every "
            f"other component was released. Use a smaller dtype, a quantised {name}, or free what "
            "else is on the device."
        )
        self.name = name
        self.needed_nbytes = needed_nbytes
        self.free_nbytes = free_nbytes
        self.total_nbytes = total_nbytes


def memory_info(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device; zeros where it does not say."""
    try:
        return torch.accelerator.get_memory_info(device)
    except (RuntimeError, AttributeError, NotImplementedError):
        return 0, 0


def allocated_nbytes(device: torch.device) -> int:
    """Bytes in live tensors on ``device``; zero on the CPU."""
    return 0 if device.type == "cpu" else _counts(device)["current"]


def peak_nbytes(device: torch.device) -> int:
    """The process's peak of ``allocated_nbytes``; only read, never reset: it is the user's."""
    return 0 if device.type == "cpu" else _counts(device)["peak"]


def ever_allocated_nbytes(device: torch.device) -> int:
    """Sum of all allocations so far; zero where the device does not count it."""
    return _counts(device).get("allocated", 0)


def _counts(device: torch.device) -> dict[str, int]:
    """Bytes of live tensors: "current", "peak", "allocated".

    Read at every switch. The public calls take 80 us, since they sort every statistic there is.
    """
    name = "_cuda_memoryStats" if device.type == "cuda" else "_accelerator_getDeviceStats"
    try:
        return getattr(torch._C, name)(device.index)["allocated_bytes"]["all"]  # type: ignore
    except (AttributeError, KeyError, TypeError, RuntimeError):
        current = torch.accelerator.memory_allocated(device)
        return {"current": current, "peak": torch.accelerator.max_memory_allocated(device)}


def lend(
    name: str, nbytes: int, device: torch.device, make_room: Callable[[], None] | None
) -> Tensor:
    """A flat device buffer (uint8, 1-D) on the current stream.

    Out of memory: calls ``make_room``, gives torch's cache back, tries once more, then raises
    OutOfDeviceMemory. Without ``make_room`` it raises at once.
    """
    try:
        return _empty(nbytes, device)
    except torch.OutOfMemoryError:
        if make_room is None:
            raise
        _log.warning(
            "No room for %s (%s) on %s: releasing everything else.",
            name,
            format_nbytes(nbytes),
            device,
        )
    make_room()
    torch.accelerator.empty_cache()
    try:
        return _empty(nbytes, device)
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(name, nbytes, device) from error


def lent_nbytes(device: torch.device) -> int:
    """Bytes in all slots on ``device``, of whatever pipeline, that were not given back yet."""
    lent = _lent.get(device, {})
    for key, (memory, _) in list(lent.items()):
        if memory() is None:
            lent.pop(key, None)
    return sum(nbytes for _, nbytes in list(lent.values()))


def outside_nbytes(device: torch.device) -> int:
    """Bytes allocated on ``device`` that are not in slots."""
    return max(0, allocated_nbytes(device) - lent_nbytes(device))


# The memory of each slot, which may be gone, and its bytes. Counted when asked: what a finalizer
# counts is wrong for good once an interrupt, which Python swallows there, falls into it.
_lent: dict[torch.device, dict[int, tuple[weakref.ref[torch.UntypedStorage], int]]] = {}
_numbers = itertools.count()


def _empty(nbytes: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    lent = _lent.setdefault(device, {})
    lent[next(_numbers)] = (weakref.ref(flat.untyped_storage()), nbytes)
    return flat
