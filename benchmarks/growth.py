"""Whether anything grows when one pipeline is called again and again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from offload_engine import host_store

from . import host
from .tables import table

_POINTS = 10  # readings after the first


@dataclass(frozen=True)
class Reading:
    """What is held after so many calls."""

    calls: int
    allocated_nbytes: int  # on the device
    reserved_nbytes: int
    peak_nbytes: int  # allocated since the reading before
    pinned_nbytes: int  # by the engine
    rss_nbytes: int | None
    objects: int  # that Python's collector tracks


@dataclass(frozen=True)
class Growth:
    """Readings from the first, after the warm calls, to the last."""

    readings: list[Reading]

    def of(self, name: str) -> int:
        """How much the last reading is above the first."""
        first, last = getattr(self.readings[0], name), getattr(self.readings[-1], name)
        return int(last or 0) - int(first or 0)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(call: Callable[[], Any], device: torch.device, calls: int = 200) -> Growth:
    """Runs ``call`` that often; the first tenth, at least two, are warm calls."""
    warm = max(2, calls // 10)
    read(device, 0)
    for _ in range(warm):
        call()
    readings = [read(device, warm)]
    step = max(1, (calls - warm) // _POINTS)
    for done in range(warm + 1, calls + 1):
        call()
        if (calls - done) % step == 0:
            readings.append(read(device, done))
    return Growth(readings)


def read(device: torch.device, calls: int) -> Reading:
    """What is held now; the peak starts anew."""
    host.settle()
    memory = (0, 0, 0)
    if device.type != "cpu":
        torch.accelerator.synchronize()
        memory = (
            torch.accelerator.memory_allocated(device),
            torch.accelerator.memory_reserved(device),
            torch.accelerator.max_memory_allocated(device),
        )
        torch.accelerator.reset_peak_memory_stats(device)
    pinned = host_store.HostStore.pinned_nbytes
    return Reading(calls, *memory, pinned, host.rss_nbytes(), len(gc.get_objects()))


def show(growth: Growth, title: str) -> str:
    """The table: every reading, then the growth."""
    head = [title, "device KiB", "reserved", "peak", "pinned", "host RSS KiB", "objects"]
    names = ("allocated_nbytes", "reserved_nbytes", "peak_nbytes", "pinned_nbytes", "rss_nbytes")
    rows = [
        [f"after {r.calls}", *(f"{(getattr(r, n) or 0) / 1024:.1f}" for n in names), r.objects]
        for r in growth.readings
    ]
    grown = [f"{growth.of(name) / 1024:+.1f}" for name in names]
    return table(head, [*rows, ["growth", *grown, f"{growth.of('objects'):+d}"]])
