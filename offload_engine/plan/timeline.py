"""A plan replayed in the model: when everything happens, and what the device holds."""

from __future__ import annotations

from .clock import Draft, Run, settle
from .model import Plan, Span
from .problem import Problem, read_problem


def replayed(plan: Plan) -> tuple[Problem, Draft, Run]:
    """The question that ``plan`` answers, its steps as a draft, and their times."""
    problem = read_problem(
        plan.nbytes, plan.uses, plan.budget_nbytes, plan.bandwidth, plan.resident, plan.cyclic
    )
    index = {name: segment for segment, name in enumerate(problem.names)}
    draft = Draft(
        [[index[name] for name in step.release] for step in plan.steps],
        [[index[name] for name in step.fetch] for step in plan.steps],
        [index[name] for name in plan.resident],
    )
    return problem, draft, settle(problem, draft)[1]


def spans(plan: Plan) -> tuple[Span, ...]:
    """All copies, uses and stalls of ``plan``, by start."""
    problem, _, run = replayed(plan)
    names = problem.names
    found = [
        Span("copy", position, (names[segment],), start, stop)
        for position, segment, start, stop in run.copies
    ]
    for index, use in enumerate(plan.uses):
        start = run.start[index]
        if index in run.late:
            late = tuple(names[segment] for segment in run.late[index])
            found.append(Span("stall", index, late, run.boundary[index], start))
        found.append(Span("use", index, use.segments, start, run.boundary[index + 1]))
    return tuple(sorted(found, key=lambda span: span.start_seconds))


def held_nbytes(plan: Plan) -> tuple[int, ...]:
    """Bytes of weights on the device, in flight included, after each step of ``plan``."""
    total, result = sum(plan.nbytes[name] for name in plan.resident), []
    for release, fetch in plan.steps:
        total += sum(plan.nbytes[name] for name in fetch)
        total -= sum(plan.nbytes[name] for name in release)
        result.append(total)
    return tuple(result)
