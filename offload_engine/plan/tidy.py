"""Fewer bytes for the same seconds: drop wasted fetches, fetch later, keep what has room."""

from __future__ import annotations

from .clock import Draft, held_sizes, run_through, settle
from .problem import Problem


def without_waste(problem: Problem, draft: Draft) -> Draft:
    """``draft`` less the fetches that no use needed, releasing each segment after its last use."""
    length = problem.length
    release: list[list[int]] = [[] for _ in range(length)]
    fetch: list[list[int]] = [[] for _ in range(length)]
    since: dict[int, int] = {segment: -1 for segment in draft.resident}
    last: dict[int, int] = {}
    kept: set[tuple[int, int]] = set()
    for position, needed in enumerate(problem.needs):
        for segment in draft.release[position]:
            if segment in last:
                kept.add((since[segment], segment))
                release[position].append(segment)
            elif since.get(segment, 0) == -1:
                release[position].append(segment)
            since.pop(segment, None)
            last.pop(segment, None)
        for segment in draft.fetch[position]:
            since[segment] = position
        for segment in needed:
            last[segment] = position
    for segment, begun in since.items():
        if segment in last:
            kept.add((begun, segment))
            if last[segment] + 1 < length:
                release[last[segment] + 1].append(segment)
        elif begun == -1 and length:
            release[0].append(segment)
    for position in range(length):
        fetch[position] = [s for s in draft.fetch[position] if (position, s) in kept]
    return Draft(release, fetch, draft.resident)
