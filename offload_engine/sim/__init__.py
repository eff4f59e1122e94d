"""A simulated accelerator: the torch device ``sim``, for machines without a GPU.

``load()`` builds it once (a C++ compiler is needed) and registers it for this process. Ordering,
memory and capacity are checked at every operator; time is virtual. Simulated runs prove order and
bytes, never speed.
"""

from .build import SimUnavailable, why_unavailable
from .control import (
    Counters,
    allow,
    configure,
    counters,
    inject_oom,
    inject_pin_failure,
    load,
    now,
    register_host,
    reset,
    spend,
    unregister_host,
    violations,
)
from .violations import CHECKS, Found, Violation

__all__ = [
    "CHECKS",
    "Counters",
    "Found",
    "SimUnavailable",
    "Violation",
    "allow",
    "configure",
    "counters",
    "inject_oom",
    "inject_pin_failure",
    "load",
    "now",
    "register_host",
    "reset",
    "spend",
    "unregister_host",
    "violations",
    "why_unavailable",
]
