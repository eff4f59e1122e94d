"""Load, set, count and disturb the simulated device. Importing this loads no torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import build
from .build import SimUnavailable
from .violations import CHECKS, Found

if TYPE_CHECKING:
    import torch

_N_DEVICES = 2
_loaded = False
_failure: str | None = None  # of the first attempt; another would fail the same, and take as long


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the device did since the last reset(); all devices together.

    ``pageable_copies`` are those among the copies whose host side was not pinned. ``host_syncs``
    are the times that the host waited for the device, blocking copies and ``.item()`` included.
    """

    # The order of these is the order of sim::Counters in csrc/machine.h.
    h2d_nbytes: int
    d2h_nbytes: int
    d2d_nbytes: int
    h2d_copies: int
    d2h_copies: int
    pageable_copies: int
    host_syncs: int
    record_stream_calls: int
    empty_cache_calls: int
    allocations: int
    pinned_nbytes: int  # pinned now
    peak_pinned_nbytes: int

    def since(self, earlier: Counters) -> Counters:
        """What happened after ``earlier``; the two numbers about pinned memory stay as they are."""
        gauges = {"pinned_nbytes", "peak_pinned_nbytes"}
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(earlier)
        return Counters(**{k: v if k in gauges else v - theirs[k] for k, v in ours.items()})


def load() -> torch.device:
    """Build the device if need be and register it in this process, for good; returns ``sim:0``.

    Raises SimUnavailable, with the compiler's output, where it cannot be built.
    """
    global _loaded
    import torch

    if not _loaded:
        from . import device_module

        torch.ops.load_library(str(_library()))
        device_module.register()
        _loaded = True
    return torch.device("sim", 0)


def _library() -> Path:
    global _failure
    if _failure is not None:
        raise SimUnavailable(_failure)
    try:
        return build.library()
    except SimUnavailable as error:
        _failure = str(error)
        raise


def _ops() -> Any:
    if not _loaded:
        raise SimUnavailable("The simulated device is not loaded; call offload_engine.sim.load().")
    import torch

    return torch.ops.offload_engine_sim


def configure(
    *,
    capacity_nbytes: int | None = None,
    h2d_bandwidth: float | None = None,
    d2h_bandwidth: float | None = None,
    pageable_bandwidth: float | None = None,
    launch_seconds: float | None = None,
    memory_bandwidth: float | None = None,
    pinned_limit_nbytes: int | None = None,
    device: torch.device | int | None = None,
) -> None:
    """Set what is given, on one device or (None) on both, until the next reset().

    Bandwidths are in bytes per second. An operator takes ``launch_seconds`` plus the bytes that it
    touches at ``memory_bandwidth``. The limit on pinned memory is the host's.
    """
    index_of = getattr(device, "index", device)
    for index in range(_N_DEVICES) if index_of is None else (index_of,):
        _ops().configure(
            index,
            capacity_nbytes,
            h2d_bandwidth,
            d2h_bandwidth,
            pageable_bandwidth,
            launch_seconds,
            memory_bandwidth,
        )
    if pinned_limit_nbytes is not None:
        _ops().set_pinned_limit(pinned_limit_nbytes)


def counters() -> Counters:
    """The counters now."""
    return Counters(*_ops().counters())


def violations() -> list[Found]:
    """Everything found since the last reset(), raised or not."""
    texts = _ops().violations()
    return [Found(*texts[i : i + 3]) for i in range(0, len(texts), 3)]


def reset() -> None:
    """Counters, peaks, clock, violations, faults and configuration as at the start.

    Everything in flight lands first. Live memory stays.
    """
    _ops().reset()


@contextlib.contextmanager
def allow(*checks: str) -> Iterator[list[Found]]:
    """Within, violations of ``checks`` (default: all) are not raised; the list fills on leaving."""
    unknown = set(checks) - set(CHECKS)
    if unknown:
        raise ValueError(f"unknown checks {sorted(unknown)}; there are {', '.join(CHECKS)}.")
    found: list[Found] = []
    seen = len(violations())
    before = _ops().allow(sum(1 << CHECKS.index(check) for check in checks or CHECKS))
    try:
        yield found
    finally:
        _ops().allow(before)
        found.extend(f for f in violations()[seen:] if f.state == "allowed")


def spend(seconds: float) -> None:
    """Queue ``seconds`` of computing on the current stream."""
    _ops().spend(seconds)


def now() -> float:
    """The host's virtual clock, in seconds. It advances only while the host waits."""
    return float(_ops().now())


def inject_oom(after: int = 1) -> None:
    """Let the ``after``-th device allocation from now fail, once, with OutOfMemoryError."""
    _ops().inject_oom(after)


def inject_pin_failure(after: int = 1) -> None:
    """Let the ``after``-th request for pinned memory from now fail, once, with RuntimeError."""
    _ops().inject_pin_failure(after)


def register_host(tensor: torch.Tensor) -> None:
    """Pin the CPU memory of ``tensor`` in place, as ``cudaHostRegister`` does."""
    _ops().register_host(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def unregister_host(tensor: torch.Tensor) -> None:
    """Undo register_host(); no copy from or to the memory may be in flight."""
    _ops().unregister_host(tensor.data_ptr())
