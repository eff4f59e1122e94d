"""Seconds that no legal plan can beat."""

from __future__ import annotations

from .problem import Problem, next_positions


def remaining_bounds(problem: Problem, stride: int = 1) -> tuple[list[float], list[float]]:
    """(from each boundary, from each use's start): seconds to the end that every plan needs."""
    needs, sizes, room, seconds = problem.needs, problem.sizes, problem.room, problem.seconds
    length = problem.length
    count = len(sizes)
    rate = 0.0
    for size, copy in zip(sizes, problem.copy_seconds):
        rate = copy / size
        break
    upcoming = [length] * count
    order: list[int] = []  # segments by next use
    from_boundary = [0.0] * (length + 1)
    from_start = [0.0] * (length + 1)
    for position in range(length - 1, -1, -1):
        from_start[position] = tail = seconds[position] + from_boundary[position + 1]
        for segment in needs[position]:
            if upcoming[segment] < length:
                order.remove(segment)
            upcoming[segment] = position
            order.insert(0, segment)
        best = tail
        if position % stride == 0 and position > 0:
            before = set(needs[position - 1])
            lost = sum(sizes[s] for s in before)
            have1 = room[position - 1] - lost  # plus those of before met
            have2 = room[position]
            got = 0
            i = 0
            while i < len(order):
                k = upcoming[order[i]]
                while i < len(order) and upcoming[order[i]] == k:
                    s = order[i]
                    got += sizes[s]
                    if s in before:
                        have1 += sizes[s]
                    i += 1
                have = have1 if have1 < have2 else have2
                if got > have:
                    value = (got - have) * rate + from_start[k]
                    if value > best:
                        best = value
        elif position == 0:
            at0 = set(problem.resident)
            got = 0
            i = 0
            while i < len(order):
                k = upcoming[order[i]]
                while i < len(order) and upcoming[order[i]] == k:
                    s = order[i]
                    if s not in at0:
                        got += sizes[s]
                    i += 1
                best = max(best, got * rate + from_start[k])
        from_boundary[position] = best
    return from_boundary, from_start
