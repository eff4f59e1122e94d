"""Steady cycles: uses that repeat for ever, closed so that each round ends as it began."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from .clock import Draft
from .problem import Problem


@dataclass(slots=True)
class Way:
    """The way of a segment from one use to its next, counted in boundaries ahead of the latter.

    It stays (``back`` is None), or leaves after the one use and is fetched ``back`` ahead of the
    next; ``since`` is the distance of the two.
    """

    segment: int
    use: int
    since: int
    back: int | None

    @property
    def away(self) -> range:
        """How far ahead of the use the boundaries are at which the segment is away."""
        return range(0) if self.back is None else range(self.back + 1, self.since)


def closed(problem: Problem, rounds: Draft, number: int) -> Draft:
    """Round ``number`` of a draft for the unrolled problem, as a draft that repeats.

    Where ways that began in different rounds do not fit together, those with the furthest use
    give in: they come back later.
    """
    ways = _ways(problem, rounds, number)
    _make_fit(problem, ways)
    return _as_draft(problem, ways)


def turned(draft: Draft, first: int) -> Draft:
    """``draft`` of a cycle, begun ``first`` boundaries later."""
    here = set(draft.resident)
    for position in range(first):
        here.difference_update(draft.release[position])
        here.update(draft.fetch[position])
    return Draft(
        draft.release[first:] + draft.release[:first],
        draft.fetch[first:] + draft.fetch[:first],
        sorted(here),
    )


def _ways(problem: Problem, rounds: Draft, number: int) -> list[Way]:
    length = problem.length
    ways: list[Way] = []
    fetched: dict[int, int] = {}
    used: dict[int, int] = {}
    for boundary in range((number - 1) * length, (number + 1) * length):
        for segment in rounds.fetch[boundary]:
            fetched[segment] = boundary
        position = boundary % length
        for segment in problem.needs[position]:
            back = boundary - fetched.pop(segment) if segment in fetched else None
            if boundary >= number * length:
                ways.append(Way(segment, position, boundary - used[segment], back))
            used[segment] = boundary
    return ways


def _held(problem: Problem, ways: list[Way]) -> list[int]:
    """Units held at each boundary."""
    length, sizes = problem.length, problem.sizes
    change = [0] * (2 * length + 1)
    for way in ways:
        if way.away:
            first = way.use - way.away[-1] + length
            change[first] -= sizes[way.segment]
            change[first + len(way.away)] += sizes[way.segment]
    total = sum(sizes[segment] for segment in {way.segment for way in ways})
    away = [*accumulate(change)]
    return [total + away[position] + away[position + length] for position in range(length)]


def _make_fit(problem: Problem, ways: list[Way]) -> None:
    length, held = problem.length, _held(problem, ways)
    of_segment: dict[int, list[Way]] = {}
    for way in ways:
        of_segment.setdefault(way.segment, []).append(way)
    for position in range(length):
        if held[position] <= problem.room[position]:
            continue
        there = []
        for own in of_segment.values():
            number = bisect_left(own, position, key=lambda way: way.use)
            way = own[number % len(own)]
            ahead = (way.use - position) % length
            if ahead not in way.away and ahead:
                there.append((ahead, way.segment, way))
        there.sort(key=lambda entry: entry[:2])
        while held[position] > problem.room[position]:
            ahead, segment, way = there.pop()
            before = set(way.away)
            way.back = 0 if way.back is None else ahead - 1
            for distance in set(way.away) - before:
                held[(way.use - distance) % length] -= problem.sizes[segment]


def _as_draft(problem: Problem, ways: list[Way]) -> Draft:
    length = problem.length
    draft = Draft.empty(problem)
    fetches: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    here = {way.segment for way in ways}
    for way in ways:
        if way.away:
            draft.release[(way.use - way.since + 1) % length].append(way.segment)
            fetches[(way.use - way.away[0] + 1) % length].append((way.away[0] - 1, way.segment))
            if (way.use + 1) % length in way.away:
                here.discard(way.segment)
    draft.fetch = [[segment for _, segment in sorted(queue)] for queue in fetches]
    draft.resident = sorted(here)
    return draft
