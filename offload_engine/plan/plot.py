"""A picture of a plan: memory against the budget, the copy lane, the compute lane."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from .model import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WEIGHTS, _WORKSPACE, _COPY, _USE, _STALL = "#4878a8", "#a8c4e0", "#e0a030", "#50986a", "#c84848"
_GIB = 2**30


def plot(plan: Plan, path: str | PathLike[str]) -> None:
    """Write the picture to ``path``; its suffix gives the format. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plan.plot() draws with matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(12, 5), layout="constrained")
    memory, copies, compute = figure.subplots(3, 1, sharex=True, height_ratios=[6, 1, 1])
    _draw_memory(plan, memory)
    _draw_lane(plan, copies, "copy", {"copy": _COPY})
    _draw_lane(plan, compute, "compute", {"use": _USE, "stall": _STALL})
    memory.set_title(
        f"{plan.seconds:.3f} s, of which {plan.stall_seconds:.3f} s stall; "
        f"bound {plan.bound_seconds:.3f} s"
    )
    compute.set_xlabel("seconds")
    figure.savefig(path)


def _draw_memory(plan: Plan, axes: Axes) -> None:
    """Weights and workspace, step by step, under the line of the budget."""
    ends = {span.position: span.stop_seconds for span in plan.timeline if span.kind == "use"}
    times = [0.0, *(ends[index] for index in range(len(plan.uses)))]
    weights = [held / _GIB for held in plan.held_nbytes]
    taken = [
        held + use.workspace_nbytes / _GIB for held, use in zip(weights, plan.uses, strict=True)
    ]
    # `stairs` draws one level between each two times
    axes.stairs(taken, times, fill=True, color=_WORKSPACE, label="workspace")
    axes.stairs(weights, times, fill=True, color=_WEIGHTS, label="weights")
    axes.axhline(plan.budget_nbytes / _GIB, color=_STALL, linestyle="--", label="budget")
    axes.set_ylabel("GiB")
    axes.legend(loc="lower right")


def _draw_lane(plan: Plan, axes: Axes, label: str, colors: dict[str, str]) -> None:
    for kind, color in colors.items():
        spans = [
            (span.start_seconds, span.stop_seconds - span.start_seconds)
            for span in plan.timeline
            if span.kind == kind
        ]
        axes.broken_barh(spans, (0, 1), facecolor=color, edgecolor="white", linewidth=0.2)
    axes.set_yticks([0.5], [label])
    axes.tick_params(left=False)
