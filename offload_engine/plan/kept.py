"""What a cycle had better keep: chosen before a forward pass, which then does not drop it.

[Note: kept] A forward pass drops what is needed furthest ahead. In a loop that is what has just
run, so the hole wanders: each round keeps something else, and a cycle that has to end as it began
pays for it. Where some of each use stays for good, and the rest streams, nothing wanders. What
should stream is as much of each use as the link can copy while it runs: so the bytes of a use are
ranked by how slow a link would still bring them in time, and the memory goes to those that need
the fastest. Among alike uses it is spread evenly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf

from .problem import Problem

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many there are


def kept_segments(problem: Problem, share: float) -> dict[int, float]:
    """Segments of a cyclic ``problem`` to keep, each with the uses that its next use is to be fewer
    ahead for that. They take at most ``share`` (0 to 1) of the room that each use leaves.

    What all uses leave room for is kept for good (inf), other segments in all but the longest of
    their gaps.
    """
    used: dict[int, list[int]] = {}
    alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for position, needed in enumerate(problem.needs):
        alike.setdefault((needed, problem.room[position]), []).append(position)
        for segment in needed:
            used.setdefault(segment, []).append(position)
    places = list(alike.values())
    spare = [
        share * (room - sum(problem.sizes[segment] for segment in needed)) for needed, room in alike
    ]
    within: dict[int, set[int]] = {}
    for number, (needed, _) in enumerate(alike):
        for segment in needed:
            within.setdefault(segment, set()).add(number)
    kept: dict[int, float] = {}
    for segment in _ranked(problem, used):
        size, own = problem.sizes[segment], within[segment]
        others = [number for number in range(len(places)) if number not in own]
        distance = inf
        if any(spare[number] < size for number in others):
            gap, one, later = _longest_gap(used[segment], problem.length)
            others = [n for n in others if _is_outside(places[n], one, later, problem.length)]
            distance = gap
        if distance > 1 and all(spare[number] >= size for number in others):
            kept[segment] = distance
            for number in others:
                spare[number] -= size
    return kept


def _ranked(problem: Problem, used: dict[int, list[int]]) -> list[int]:
    """Segments, first those that are used most often; see [Note: kept]."""
    rank: dict[int, tuple[float, ...]] = {}
    for position, needed in enumerate(problem.needs):
        if all(segment in rank for segment in needed):
            continue
        seconds, before = problem.seconds[position], 0.0
        often = {segment: len(used[segment]) for segment in needed}
        for segment in needed:
            if segment in rank:
                continue
            middle = before + problem.copy_seconds[segment] / 2
            speed = middle / seconds if seconds else inf
            rank[segment] = (-often[segment], -speed, position * _GOLDEN % 1)
            if often[segment] == min(often.values()):
                before += problem.copy_seconds[segment]
    return sorted(rank, key=rank.__getitem__)


def _longest_gap(used: Sequence[int], length: int) -> tuple[int, int, int]:
    """The uses between two of ``used`` in a cycle of ``length``, at most, and the two; the second
    may be in the next round."""
    following = [*used[1:], used[0] + length]
    return max((later - one, one, later) for one, later in zip(used, following, strict=True))


def _is_outside(places: Sequence[int], first: int, last: int, length: int) -> bool:
    """Whether any of ``places`` is not between ``first`` and ``last``, which may be in the next
    round."""
    inside = bisect_left(places, last) - bisect_left(places, first + 1)
    return inside + bisect_left(places, last - length) < len(places)
