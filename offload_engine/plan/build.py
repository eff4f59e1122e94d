"""From the question to the plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .clock import Draft, held_sizes, settle
from .model import Plan, Step, Use
from .problem import Problem, read_problem
from .solve import solve


def build_plan(
    nbytes: Mapping[str, int],
    uses: Sequence[Use],
    *,
    budget_nbytes: int,
    bandwidth: float,
    resident: Collection[str] = (),
    cyclic: bool = False,
) -> Plan:
    """The plan for ``uses`` of segments of ``nbytes``, within the budget.

    The link copies ``bandwidth`` bytes per second. ``resident`` is on the device at the start; a
    cyclic plan begins with what it ends with, so there it is only checked. Raises OffloadError
    for bad input and PlanError if a use cannot fit.
    """
    problem = read_problem(nbytes, uses, budget_nbytes, bandwidth, resident, cyclic)
    draft, bound = solve(problem)
    seconds, run = settle(problem, draft)
    names = problem.names
    return Plan(
        steps=_steps(names, draft),
        seconds=seconds,
        stall_seconds=max(0.0, seconds - problem.elapsed[-1]),
        fetched_nbytes=sum(nbytes[names[segment]] for _, segment, _, _ in run.copies),
        peak_nbytes=_peak_nbytes(problem, draft, nbytes, uses),
        bound_seconds=min(seconds, bound * (1 - 1e-12)),
        resident=tuple(names[segment] for segment in sorted(draft.resident)),
        cyclic=cyclic,
        budget_nbytes=budget_nbytes,
        bandwidth=bandwidth,
        nbytes=dict(nbytes),
        uses=tuple(Use(*use) for use in uses),
    )


def _steps(names: tuple[str, ...], draft: Draft) -> tuple[Step, ...]:
    return tuple(
        Step(tuple([names[s] for s in release]), tuple([names[s] for s in fetch]))
        for release, fetch in zip(draft.release, draft.fetch, strict=True)
    )


def _peak_nbytes(
    problem: Problem, draft: Draft, nbytes: Mapping[str, int], uses: Sequence[Use]
) -> int:
    """The most that segments and a workspace take together, in the caller's own numbers."""
    held = held_sizes(problem, draft)
    if not held:
        return 0
    peak = min(range(len(held)), key=lambda i: problem.room[i] - held[i])
    here = set(draft.resident)
    for position in range(peak + 1):
        here.difference_update(draft.release[position])
        here.update(draft.fetch[position])
    return sum(nbytes[problem.names[segment]] for segment in sorted(here)) + uses[peak][2]
