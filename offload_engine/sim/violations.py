"""What the simulator finds wrong. Imports nothing."""

from __future__ import annotations

from typing import NamedTuple

# The order of these is the order of sim::Check in csrc/violations.h.
CHECKS = (
    "unordered-read",  # reads bytes that another stream may still be writing
    "unordered-write",  # writes bytes that another stream, or their allocation, may still use
    "unordered-free",  # frees memory that another stream may still use
    "use-after-free",
    "source-changed",  # a pinned source written before the host knew that its copy was over
    "pinned-free",  # pinned memory freed or unregistered before the host knew that
)


class Violation(RuntimeError):
    """A correct program never does this; ``check`` is one of CHECKS.

    Raised by the operator that did it, or by the next one when it was found in a destructor.
    """

    @property
    def check(self) -> str:
        return str(self).removeprefix("sim violation: ").partition(":")[0]


class Found(NamedTuple):
    """A violation and what became of it: "raised", "allowed", or "unraised" so far."""

    check: str
    state: str
    text: str
