"""What a call did, as tables, JSON, a trace and a picture. Pure functions of the event log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import Mark
from .plan import Plan
from .residency import Event, Unit
from .sequence import Sequence
from .units import format_nbytes


@dataclass(frozen=True)
class ComponentReport:
    """One component in one call."""

    nbytes: int  # its weights, as one fetch copies them
    pinned: bool  # whether all of its masters are in pinned memory
    uses: int  # contiguous stretches of running
    fetches: int
    fetched_nbytes: int  # host to device
    fetch_seconds: float  # on the copy stream; device time
    stall_seconds: float  # the compute stream waited this long for its fetches
    write_back_nbytes: int  # device to host: weights that had changed


@dataclass(frozen=True)
class Report:
    """The last call. ``peak_nbytes`` is torch's own peak of allocated bytes on the device:
    that of this call where ``peak_is_exact``, else an upper bound from earlier."""

    device: str
    sequence: str
    components: dict[str, ComponentReport]
    peak_nbytes: int
    peak_is_exact: bool
    events: tuple[dict[str, Any], ...]
    seconds: float = 0.0  # from the first use to the end of the call; device time
    predicted_seconds: float | None = None  # by the plan that led the call; None: it had none
    bound_seconds: float | None = None  # no schedule within the budget is faster
    budget_nbytes: int | None = None  # of that plan

    @property
    def efficiency(self) -> float | None:
        """``bound_seconds / seconds``: 1.0 is as fast as the budget and the link allow."""
        if self.bound_seconds is None or not self.seconds:
            return None
        return self.bound_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {**asdict(self), "efficiency": self.efficiency}

    def __str__(self) -> str:
        rows = [_HEAD, *(_row(name, c) for name, c in self.components.items()), self._total()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        bound = "" if self.peak_is_exact else "at most "
        peak = f"peak {bound}{format_nbytes(self.peak_nbytes)}" if self.peak_nbytes else "no peak"
        return "\n".join([f"{self.sequence} on {self.device}, {peak}", *lines, *self._times()])

    def _times(self) -> list[str]:
        if self.predicted_seconds is None or self.bound_seconds is None or not self.seconds:
            return [f"{self.seconds:.4f} s, without a plan"] if self.seconds else []
        return [
            f"{self.seconds:.4f} s measured, {self.predicted_seconds:.4f} s predicted, "
            f"{self.bound_seconds:.4f} s at best within {format_nbytes(self.budget_nbytes or 0)}: "
            f"efficiency {self.efficiency:.1%}"
        ]

    def print(self) -> None:
        """Prints the table."""
        print(self)

    def _total(self) -> tuple[str, ...]:
        parts = list(self.components.values())
        total = ComponentReport(
            nbytes=sum(c.nbytes for c in parts),
            pinned=all(c.pinned for c in parts),
            **{
                name: sum(getattr(c, name) for c in parts)
                for name in _SUMMED  # type: ignore[arg-type]
            },
        )
        return _row("total", total)

    def trace(self, path: str | Path) -> Path:
        """Writes a trace for chrome://tracing or Perfetto; times are the host's."""
        rows = []
        for event in self.events:
            at = event["at_seconds"] * 1e6
            row = {"name": f"{event['kind']} {event['unit']}", "pid": 0, "tid": 0, "ts": at}
            rows.append({**row, "ph": "i", "s": "t", "args": {"nbytes": event["nbytes"]}})
            memory = {"allocated": event["allocated_nbytes"]}
            rows.append({"name": "memory", "ph": "C", "pid": 0, "ts": at, "args": memory})
            if event["kind"] == "fetch":
                length = event["seconds"] * 1e6
                rows.append({**row, "tid": 1, "ph": "X", "dur": length})
        Path(path).write_text(json.dumps({"traceEvents": rows}))
        return Path(path)

    def plot(self, path: str | Path) -> Path:
        """Draws device memory over the host's time, with every fetch and release marked.

        Needs matplotlib: ``pip install offload-engine[plot]``.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        axes = figure.add_subplot()
        times = [event["at_seconds"] for event in self.events]
        memory = [event["allocated_nbytes"] / 2**20 for event in self.events]
        axes.step(times, memory, where="post")
        for event in self.events:
            if event["kind"] == "fetch":
                place = (event["at_seconds"], event["allocated_nbytes"] / 2**20)
                axes.annotate(event["unit"], place, rotation=30, fontsize=8)
        axes.set(xlabel="host seconds", ylabel="allocated MiB", title=self.sequence)
        figure.savefig(path)
        return Path(path)


_SUMMED = (
    "uses",
    "fetches",
    "fetched_nbytes",
    "fetch_seconds",
    "stall_seconds",
    "write_back_nbytes",
)
_HEAD = (
    "component", "weights", "pinned", "uses", "fetches", "fetched", "fetch s", "stall s",
    "written back",
)  # fmt: skip


def build_report(
    log: list[Event],
    units: Mapping[str, Seq[Unit]],
    *,
    device: torch.device,
    sequence: Sequence,
    peak_before_nbytes: int,
    peak_nbytes: int,
    marks: Seq[Mark] = (),
    seconds: float = 0.0,
    plan: Plan | None = None,
) -> Report:
    """The report of the events in ``log``; ``units`` maps component names to what moved them.

    ``marks``: the uses as they were measured; ``seconds``: of the last call; ``plan``: what led
    it. Waits for the fetches in the log, to time them.
    """
    copies = {id(e): e.fetch.seconds for e in log if e.fetch}
    stalls: dict[str, float] = {}
    for mark in marks:
        stalls[mark.unit] = stalls.get(mark.unit, 0.0) + mark.stall_seconds
    components = {}
    for name, parts in units.items():
        names = {unit.name for unit in parts}
        mine = [event for event in log if event.unit in names]
        fetches = [event for event in mine if event.kind == "fetch"]
        components[name] = ComponentReport(
            nbytes=sum(unit.nbytes for unit in parts),
            pinned=all(unit.is_pinned for unit in parts),
            uses=sum(event.kind == "use" for event in mine),
            fetches=len(fetches),
            fetched_nbytes=sum(event.nbytes for event in fetches),
            fetch_seconds=sum(copies[id(event)] for event in fetches),
            stall_seconds=sum(stalls.get(each, 0.0) for each in names),
            write_back_nbytes=sum(e.nbytes for e in mine if e.kind == "write_back"),
        )
    first = log[0].at_seconds if log else 0.0
    events = tuple(
        {
            "kind": event.kind,
            "unit": event.unit,
            "nbytes": event.nbytes,
            "at_seconds": event.at_seconds - first,
            "allocated_nbytes": event.allocated_nbytes,
            "seconds": copies.get(id(event), 0.0),
        }
        for event in log
    )
    return Report(
        device=str(device),
        sequence=str(sequence),
        components=components,
        peak_nbytes=peak_nbytes,
        peak_is_exact=peak_nbytes > peak_before_nbytes,
        events=events,
        seconds=seconds,
        predicted_seconds=plan.seconds if plan is not None else None,
        bound_seconds=plan.bound_seconds if plan is not None else None,
        budget_nbytes=plan.budget_nbytes if plan is not None else None,
    )


def _row(name: str, component: ComponentReport) -> tuple[str, ...]:
    c = component
    return (
        name,
        format_nbytes(c.nbytes),
        "yes" if c.pinned else "no",
        str(c.uses),
        str(c.fetches),
        format_nbytes(c.fetched_nbytes),
        f"{c.fetch_seconds:.4f}",
        f"{c.stall_seconds:.4f}",
        format_nbytes(c.write_back_nbytes),
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = row
    cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
    return "  ".join([first.ljust(widths[0]), *cells])
