"""Seconds that no legal plan can beat."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from math import inf

from .problem import Problem


def sum_floor(sizes, limit=4096):
    sums = {0}
    for size, many in Counter(sizes).items():
        if len(sums) * (many + 1) > limit:
            return lambda room: room
        sums = {s + i * size for s in sums for i in range(many + 1)}
    ordered = sorted(sums)
    return lambda room: ordered[bisect_right(ordered, room) - 1] if room >= 0 else room


def remaining_bounds(problem: Problem, stride: int = 1, mode=2) -> tuple[list[float], list[float]]:
    """(from each boundary, from each use's start): seconds to the end that every plan needs."""
    needs, sizes, room, seconds = problem.needs, problem.sizes, problem.room, problem.seconds
    elapsed = problem.elapsed
    length = problem.length
    count = len(sizes)
    rate = max((c / s for c, s in zip(problem.copy_seconds, sizes)), default=0.0)
    upcoming = [length] * count
    order: list[int] = []  # segments by next use
    from_boundary = [0.0] * (length + 1)  # V
    from_start = [0.0] * (length + 1)  # G
    if_started = [0.0] * (length + 1)  # Y
    floor = lambda x: x
    memo = {}
    for position in range(length - 1, -1, -1):
        from_start[position] = tail = seconds[position] + from_boundary[position + 1]
        new = False
        for segment in needs[position]:
            if upcoming[segment] < length:
                order.remove(segment)
            else:
                new = True
            upcoming[segment] = position
            order.insert(0, segment)
        if new:
            floor = sum_floor([sizes[s] for s in order])
            memo = {}
        best = tail
        there = set(needs[position - 1]) if position else set(problem.resident)
        have1 = room[position - 1] - sum(sizes[s] for s in there) if position else 0
        have2 = room[position]
        # suffix min of sizes over order
        m = inf
        suffix = [inf] * (len(order) + 1)
        for i in range(len(order) - 1, -1, -1):
            m = min(m, sizes[order[i]])
            suffix[i] = m
        got = 0
        i = 0
        min_in = inf
        started = tail
        window = -inf
        window_k = -1
        while i < len(order):
            k = upcoming[order[i]]
            while i < len(order) and upcoming[order[i]] == k:
                s = order[i]
                got += sizes[s]
                if sizes[s] < min_in:
                    min_in = sizes[s]
                if s in there:
                    have1 += sizes[s]
                i += 1
            have = have1 if have1 < have2 else have2
            if got > have:
                value = (got - have) * rate + from_start[k]
                if value > best:
                    best = value
                if got > have2:
                    cap = min(have1, floor(have2))
                    value = (got - cap) * rate + from_start[k]
                    if value > window:
                        window = value
                        window_k = k
            key = (have2, min_in, suffix[i])
            left = memo.get(key)
            if left is None:
                left = floor(have2 - min_in)
                if suffix[i] < inf:
                    left = max(left, floor(have2 - suffix[i]) - suffix[i])
                memo[key] = left
            if got > left and k > position:
                value = (got - left) * rate + from_start[k]
                if value > started:
                    started = value
        if_started[position] = started
        if mode == 2 and window_k > position and started > best:
            least = started
            j = position + 1
            while j <= window_k:
                spent = elapsed[j] - elapsed[position]
                if spent + window >= least:
                    break
                z = spent + max(window, if_started[j])
                if z < least:
                    least = z
                j += 1
            best = max(best, least)
        from_boundary[position] = best
    return from_boundary, from_start
