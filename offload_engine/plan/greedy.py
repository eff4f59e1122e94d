"""A forward rule: fetch what is missing next, drop what is needed last."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from .clock import Draft
from .problem import Problem, first_positions, next_positions


def fetch_limits(problem: Problem, after: list[list[int]]) -> list[int]:
    """For each boundary: prefetching for a use at or past this limit is wasted.

    Up to the limit, all that is used from any later boundary on fits into its room.
    """
    needs, sizes, room = problem.needs, problem.sizes, problem.room
    length = problem.length
    limits = [length] * length
    last_seen = [-1] * len(sizes)  # right-most use inside the window
    end, held = length, 0
    count = [0] * len(sizes)
    for position in range(length - 1, -1, -1):
        for segment in needs[position]:
            if not count[segment]:
                held += sizes[segment]
            count[segment] += 1
        while held > room[position]:
            end -= 1
            for segment in needs[end]:
                count[segment] -= 1
                if not count[segment]:
                    held -= sizes[segment]
        limits[position] = end
    del last_seen
    return limits


def go_forward(problem: Problem, lead: float = inf) -> Draft:
    """The draft of the aggressive rule (Cao, Felten, Karlin, Li, SIGMETRICS 1995).

    At each boundary, while the link would idle before the next: fetch the segment missing
    soonest, if what must go for it is needed later than it is.
    """
    needs, sizes, room, seconds = problem.needs, problem.sizes, problem.room, problem.seconds
    copy_seconds, elapsed = problem.copy_seconds, problem.elapsed
    length = problem.length
    after = next_positions(needs, len(sizes))
    limits = fetch_limits(problem, after)
    upcoming = first_positions(needs, len(sizes))
    draft = Draft.empty(problem)
    present = [False] * len(sizes)
    furthest: list[tuple[int, int]] = []
    held = 0
    for segment in problem.resident:
        present[segment] = True
        held += sizes[segment]
        heappush(furthest, (-upcoming[segment], segment))
    now = link_free = 0.0
    landing = [0.0] * len(sizes)
    cursor = 0  # every segment used in [position, cursor) is present
    part = 0

    def evict(least: int, target: int, step: list[int]) -> bool:
        """Release what is next used after ``least``, furthest first, down to ``target``."""
        nonlocal held
        while held > target:
            while furthest:
                when, segment = furthest[0]
                if present[segment] and upcoming[segment] == -when:
                    break
                heappop(furthest)
            if not furthest or -furthest[0][0] <= least:
                return False
            when, segment = heappop(furthest)
            present[segment] = False
            held -= sizes[segment]
            step.append(segment)
        return True

    for position in range(length):
        needed = needs[position]
        release, fetch = draft.release[position], draft.fetch[position]
        while furthest and furthest[0][0] == -length:
            evict(length - 1, held - 1, release)
        if cursor < position:
            cursor, part = position, 0
        missing = [segment for segment in needed if not present[segment]]
        begin = now
        for segment in missing:
            present[segment] = True
            held += sizes[segment]
            link_free = (begin if begin > link_free else link_free) + copy_seconds[segment]
            landing[segment] = link_free
            fetch.append(segment)
        for segment in needed:
            if landing[segment] > now:
                now = landing[segment]
        fits = evict(position, room[position], release)
        assert fits
        now += seconds[position]
        # prefetch while the link would idle before the next boundary
        limit = limits[position]
        while link_free < now:
            segment = -1
            while cursor < limit:
                for segment in needs[cursor][part:]:
                    if not present[segment]:
                        break
                    part += 1
                else:
                    cursor, part = cursor + 1, 0
                    continue
                break
            if cursor >= limit:
                break
            starts = begin if begin > link_free else link_free
            if lead < inf and (
                elapsed[cursor] - elapsed[position + 1]
                > copy_seconds[segment] + lead
            ):
                break
            if not evict(cursor, room[position] - sizes[segment], release):
                break
            present[segment] = True
            held += sizes[segment]
            link_free = starts + copy_seconds[segment]
            landing[segment] = link_free
            fetch.append(segment)
            heappush(furthest, (-cursor, segment))
        for segment, later in zip(needed, after[position], strict=True):
            upcoming[segment] = later
            heappush(furthest, (-later, segment))
    return draft
