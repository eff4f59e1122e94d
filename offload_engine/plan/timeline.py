"""A plan replayed in the model: when everything happens, and what the device holds."""

from __future__ import annotations

from .clock import Draft, Run, held_sizes, settle
from .model import Plan, Span
from .problem import Problem, read_problem


def replay(plan: Plan) -> tuple[Problem, Draft, Run]:
    """The question that ``plan`` answers, its steps and their times."""
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
    """All copies, uses and stalls, by start."""
    problem, _, run = replay(plan)
    found = [
        Span("copy", position, (problem.names[segment],), start, stop)
        for position, segment, start, stop in run.copies
    ]
    landing = {}
    copies = iter([*run.copies, (problem.length, 0, 0.0, 0.0)])
    position, segment, _, stop = next(copies)
    for index, use in enumerate(plan.uses):
        while position <= index and position < problem.length:
            landing[problem.names[segment]] = stop
            position, segment, _, stop = next(copies)
        begin, start = run.boundary[index], run.start[index]
        if start > begin:
            late = tuple(name for name in use.segments if landing.get(name, start) > begin)
            found.append(Span("stall", index, late, begin, start))
        found.append(Span("use", index, use.segments, start, run.boundary[index + 1]))
    return tuple(sorted(found, key=lambda span: span.start_seconds))


def held_nbytes(plan: Plan) -> tuple[int, ...]:
    """Bytes of weights on the device, in flight included, after each step."""
    problem, draft, _ = replay(plan)
    units = held_sizes(problem, draft)
    if all(isinstance(size, int) for size in plan.nbytes.values()):
        if problem.sizes == tuple(plan.nbytes.values()):
            return tuple(units)
    scale = sum(plan.nbytes.values()) / sum(problem.sizes)
    return tuple(number * scale for number in units)  # type: ignore[misc]
