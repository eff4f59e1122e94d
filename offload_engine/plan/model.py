"""What goes into a plan and what comes out: frozen data."""

from __future__ import annotations

from typing import NamedTuple


class Use(NamedTuple):
    """One execution of segments that must be on the device together."""

    segments: tuple[str, ...]
    seconds: float  # compute
    workspace_nbytes: int = 0  # activations, on top of the weights
