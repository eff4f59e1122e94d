"""What it costs the host to notice that weights changed, beside the fetch that it protects.

The denoiser of SDXL, with all of its 1680 tensors. Here each tensor is small, since the check does
not look at clean weights; the fetch it is set against is that of the published sizes in 16 bits,
over a link of a stated bandwidth. Where weights are clean, none of this touches the device.
"""

from __future__ import annotations

import cProfile
import gc
import io
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import offload_engine
from offload_engine import residency
from offload_engine.guide import Move

from . import models
from .tables import table
from .ways import modules

LINK = 24e9  # bytes per second: PCIe 4.0 x16, pinned
ROUNDS = 40


class _Components:
    """What `models` takes for a pipeline."""

    def __init__(self, **components: Any) -> None:
        self.components = components


@dataclass(frozen=True)
class Noticing:
    """Host CPU seconds for each fetch of a unit whose weights nobody changed; medians.

    The engine settles a unit before each fetch and again at its release. Both look for changes; the
    second also points every tensor back to its master, which any way to release has to do.
    """

    tensors: int
    nbytes: int  # of the published model
    bandwidth: float
    fetch_seconds: float  # nbytes / bandwidth
    before_seconds: float  # settling before the fetch
    after_seconds: float  # settling at release, with the pointing
    pointing_seconds: float  # the same pointing, done alone
    release_seconds: float  # all of a release: the second settling and the entries
    samples: dict[str, list[float]]

    @property
    def noticing_seconds(self) -> float:
        """Both settlings, less what has to be done anyhow: the pointing."""
        return self.before_seconds + self.after_seconds - self.pointing_seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the part of the fetch that has a target."""
        part = self.noticing_seconds / self.fetch_seconds
        return {**asdict(self), "noticing_to_fetch": part}


def measure(device: torch.device, rounds: int = ROUNDS, bandwidth: float = LINK) -> Noticing:
    """Fetches and releases the denoiser twice ``rounds`` times."""
    published = _Components(unet=models.sdxl_unet())
    nbytes = models.component_nbytes(published, torch.bfloat16)["unet"]
    engine, unit, room = _attached(device)
    names = ("before", "after", "pointing", "release")
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for _ in range(rounds + 2):
        with timed_settling() as settling:
            _fetch(room, unit)
            release = _seconds(lambda: room.release(unit))
        assert len(settling) == 2, settling
        _fetch(room, unit)
        pointing = _seconds(lambda: _point_all(unit))
        room.release(unit)
        for name, taken in zip(names, (*settling, pointing, release), strict=True):
            samples[name].append(taken)
    tensors = len(unit._weights)
    engine.detach()
    kept = {name: taken[2:] for name, taken in samples.items()}
    medians = [statistics.median(kept[name]) for name in names]
    return Noticing(tensors, nbytes, bandwidth, nbytes / bandwidth, *medians, kept)


def _fetch(room: Any, unit: Any) -> None:
    room.enter(unit, Move((), (unit.name,)))
    torch.accelerator.synchronize()


def _attached(device: torch.device) -> tuple[Any, Any, Any]:
    small = _Components(unet=models.sdxl_unet(**models.NARROW_UNET))
    models.materialise(small, torch.device("cpu"), torch.float32, lambda drawn: drawn)
    engine = offload_engine.attach(modules(small), "unet", device=device)
    return engine, engine._mounts["unet"].unit, engine._residency


def _point_all(unit: Any) -> None:
    for weight in unit._weights.values():
        residency._point(weight.tensor, weight.host)


def _seconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread: other processes do not weigh on it."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


@contextmanager
def timed_settling() -> Iterator[list[float]]:
    """Within, the list fills with the CPU seconds of every settling, of any unit."""
    taken: list[float] = []
    original = residency.Unit._settle_all

    def settle_all(unit: Any, *arguments: Any) -> None:
        taken.append(_seconds(lambda: original(unit, *arguments)))

    residency.Unit._settle_all = settle_all  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        residency.Unit._settle_all = original  # type: ignore[method-assign]


def profile(device: torch.device, rounds: int = 20) -> str:
    """Where the time of releasing goes, by function; the profiler itself makes calls dearer."""
    engine, unit, room = _attached(device)
    profiler = cProfile.Profile()
    for _ in range(rounds):
        _fetch(room, unit)
        profiler.runcall(room.release, unit)
    engine.detach()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(14)
    return text.getvalue()


def show(result: Noticing) -> str:
    """The table; the last column is what the target of 2 % is about."""
    link = f"{result.nbytes / 1e9:.3f} GB at {result.bandwidth / 1e9:.0f} GB/s"
    rows = [
        ["settling before the fetch", result.before_seconds],
        ["settling at release, with pointing back", result.after_seconds],
        ["pointing back alone", result.pointing_seconds],
        ["noticing: both settlings less pointing", result.noticing_seconds],
        ["all of a release, entries included", result.release_seconds],
        [f"the fetch it protects: {link}", result.fetch_seconds],
    ]
    head = [f"{result.tensors} tensors, host CPU time", "ms", "% of the fetch"]
    parts = ((f"{s * 1e3:.3f}", f"{100 * s / result.fetch_seconds:.2f}") for _, s in rows)
    return table(head, [[name, *part] for (name, _), part in zip(rows, parts, strict=True)])
