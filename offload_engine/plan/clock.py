"""The model's clock: when each copy and each use of a draft starts, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from .problem import Problem


@dataclass(slots=True)
class Draft:
    """A plan being made: the segments to release and to fetch at each boundary, as indices."""

    release: list[list[int]]
    fetch: list[list[int]]
    resident: list[int]  # at the start

    @classmethod
    def empty(cls, problem: Problem) -> Draft:
        length = problem.length
        return cls([[] for _ in range(length)], [[] for _ in range(length)], [*problem.resident])

    def copy(self) -> Draft:
        return Draft([[*s] for s in self.release], [[*s] for s in self.fetch], [*self.resident])


@dataclass(slots=True)
class Run:
    """The times of one pass through a draft, in seconds."""

    boundary: list[float]  # when each is reached; the last is the end
    start: list[float]  # of each use
    copies: list[tuple[int, int, float, float]] = field(default_factory=list)
    """(boundary that queued it, segment, start, landing), in link order."""
    late: dict[int, list[int]] = field(default_factory=dict)
    """The segments that each use with a stall waits for."""
    link_free: float = -inf  # after the last copy


def run_through(problem: Problem, draft: Draft, begin: float = 0.0, link_free: float = -inf) -> Run:
    """The times of ``draft``, begun at ``begin`` with a link that is free at ``link_free``.

    In a cyclic problem the copies still queued from the cycle before land up to ``link_free``.
    """
    copy_seconds, seconds = problem.copy_seconds, problem.seconds
    landing = [-inf] * len(problem.sizes)
    if problem.cyclic and link_free > -inf:
        _land_backwards(problem, draft, link_free, landing)
    now, run = begin, Run([], [])
    for position, needed in enumerate(problem.needs):
        run.boundary.append(now)
        for segment in draft.fetch[position]:
            starts = now if now > link_free else link_free
            link_free = landing[segment] = starts + copy_seconds[segment]
            run.copies.append((position, segment, starts, link_free))
        begin = now
        for segment in needed:
            if landing[segment] > now:
                now = landing[segment]
        if now > begin:
            run.late[position] = [segment for segment in needed if landing[segment] > begin]
        run.start.append(now)
        now += seconds[position]
    run.boundary.append(now)
    run.link_free = link_free
    return run


def _land_backwards(problem: Problem, draft: Draft, link_free: float, landing: list[float]) -> None:
    """Landing times of one cycle's last copies, which end at ``link_free`` without a gap.

    A copy before a gap landed before this cycle began: then its time here has no effect.
    """
    waiting = set(draft.resident)
    for position in range(problem.length - 1, -1, -1):
        waiting.difference_update(problem.needs[position])
        for segment in reversed(draft.fetch[position]):
            if segment not in waiting:
                return
            waiting.remove(segment)
            landing[segment] = link_free
            link_free -= problem.copy_seconds[segment]


def settle(problem: Problem, draft: Draft) -> tuple[float, Run]:
    """Seconds of one pass, and its times; of the steady cycle if the problem is cyclic.

    One cycle is a linear map of (boundary, link free) in the max-plus algebra, so two runs give
    its matrix, whose greatest cycle mean is the steady cycle (Baccelli, Cohen, Olsder, Quadrat,
    "Synchronization and Linearity", 1992, chapter 3).
    """
    if not problem.cyclic:
        run = run_through(problem, draft)
        return run.boundary[-1], run
    from_boundary = run_through(problem, draft)
    from_link = run_through(problem, draft, -inf, 0.0)
    mean_both = (from_boundary.link_free + from_link.boundary[-1]) / 2
    cycle = max(from_boundary.boundary[-1], from_link.link_free, mean_both)
    if cycle == from_link.link_free > from_boundary.boundary[-1]:
        backlog = cycle - from_link.boundary[-1]
    else:
        backlog = from_boundary.link_free - cycle
    return cycle, run_through(problem, draft, 0.0, backlog)


def held_sizes(problem: Problem, draft: Draft) -> list[int]:
    """Units held by segments during each use; asserts that ``draft`` keeps the model's rules.

    A draft never releases what it has not used since its fetch, so that no release can meet a
    segment in flight, at whatever speed link and compute really run.
    """
    sizes, held = problem.sizes, set(draft.resident)
    fresh = _in_flight_at_wrap(problem, draft)
    total = sum(sizes[segment] for segment in held)
    result = []
    for position, needed in enumerate(problem.needs):
        for segment in draft.release[position]:
            assert segment in held and segment not in fresh, "released while away or in flight"
            held.remove(segment)
            total -= sizes[segment]
        for segment in draft.fetch[position]:
            assert segment not in held, "fetched twice"
            held.add(segment)
            fresh.add(segment)
            total += sizes[segment]
        assert held.issuperset(needed), "used while away"
        assert total <= problem.room[position], "over budget"
        fresh.difference_update(needed)
        result.append(total)
    assert not problem.cyclic or held == set(draft.resident), "the cycle does not close"
    return result


def _in_flight_at_wrap(problem: Problem, draft: Draft) -> set[int]:
    """Segments fetched in one cycle and first used in the next."""
    fresh: set[int] = set()
    if problem.cyclic:
        for position, needed in enumerate(problem.needs):
            fresh.update(draft.fetch[position])
            fresh.difference_update(needed)
    return fresh


def fetched_size(problem: Problem, draft: Draft) -> int:
    """Units that ``draft`` copies."""
    return sum(problem.sizes[segment] for queue in draft.fetch for segment in queue)
