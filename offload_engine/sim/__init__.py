"""A simulated accelerator: the torch device ``sim``, for machines without a GPU.

``load()`` builds it once (a C++ compiler is needed) and registers it for this process. Operators
run on the CPU, with the CPU's results to the bit, and each one checks that its bytes are where it
expects them and ordered after whatever wrote them. Time is virtual and the same on every run.
Simulated runs prove order and bytes, never speed.

    device = sim.load()
    sim.configure(capacity_nbytes=8 * 2**30)
    before = sim.counters()
    ...                                   # a race raises sim.Violation
    assert sim.counters().since(before).pageable_copies == 0

Not modelled: rounding and fragmentation of allocators, workspaces inside an operator, operators
that run side by side on one device, graphs, quantised and sparse tensors, several processes.
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
