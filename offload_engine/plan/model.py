"""What goes into a plan and what comes out: frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Literal, NamedTuple


class Use(NamedTuple):
    """One execution of segments that must be on the device together."""

    segments: tuple[str, ...]
    seconds: float  # compute
    workspace_nbytes: int = 0  # activations, on top of the weights


class Step(NamedTuple):
    """What to do at one boundary of the plan."""

    release: tuple[str, ...]  # segments whose slots are given back
    fetch: tuple[str, ...]  # segments to copy, in this order


class Span(NamedTuple):
    """Something that takes time: a copy on the link, a use on the device, a stall before a use."""

    kind: Literal["copy", "use", "stall"]
    position: int  # of the boundary that queued the copy, of the use that runs or waits
    segments: tuple[str, ...]  # copied, run, waited for
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Plan:
    """For each use, what to release and what to fetch; and what the model predicts.

    ``resident`` is what the device must hold at the start. A cyclic plan predicts one steady
    cycle; some of its residents may still be in flight when that begins.
    """

    steps: tuple[Step, ...]
    seconds: float
    stall_seconds: float
    fetched_nbytes: int
    peak_nbytes: int
    bound_seconds: float  # no legal plan is faster
    resident: tuple[str, ...]
    cyclic: bool
    budget_nbytes: int
    bandwidth: float
    nbytes: Mapping[str, int] = field(repr=False)
    uses: tuple[Use, ...] = field(repr=False)

    @cached_property
    def timeline(self) -> tuple[Span, ...]:
        """All copies, uses and stalls, by start."""
        from .timeline import spans

        return spans(self)

    @cached_property
    def held_nbytes(self) -> tuple[int, ...]:
        """Bytes of weights on the device, in flight included, after each step."""
        from .timeline import held_nbytes

        return held_nbytes(self)

    def explain(self) -> str:
        """A table for a person: what stays, what streams, where it stalls, and why."""
        from .explain import explain

        return explain(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture of memory, copies and uses over time. Needs matplotlib."""
        from .plot import plot

        plot(self, path)
