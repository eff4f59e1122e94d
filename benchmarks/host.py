"""The memory of this process, as Linux counts it; None where the system does not say."""

from __future__ import annotations

import gc
import re
from pathlib import Path

from offload_engine.host_store import trim

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")


def rss_nbytes() -> int | None:
    """Bytes of this process in memory now."""
    return _field(_STATUS, "VmRSS")


def peak_rss_nbytes() -> int | None:
    """The most bytes in memory since the process began, or since `forget_peak`."""
    return _field(_STATUS, "VmHWM")


def available_nbytes() -> int | None:
    """Bytes that the machine could give to a process now."""
    return _field(_MEMINFO, "MemAvailable")


def forget_peak() -> bool:
    """Starts the peak anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def settle() -> None:
    """Collects garbage and gives freed memory back, so that what is left is in use."""
    gc.collect()
    trim()


def _field(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
