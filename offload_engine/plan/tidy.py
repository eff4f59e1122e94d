"""Fewer bytes for the same seconds: drop wasted fetches, fetch later, keep what has room."""

from __future__ import annotations

from math import inf

from .clock import Draft, Run, held_sizes, settle
from .problem import Problem

_ROUNDS = 4


def tidy(problem: Problem, draft: Draft) -> Draft:
    """A draft as fast as ``draft`` that fetches no more, as early as its memory allows."""
    seconds, run = settle(problem, draft)
    tidier = draft.copy()
    for _ in range(_ROUNDS):
        fetch_late(problem, tidier, run)
        if not keep_more(problem, tidier):
            break
        _, run = settle(problem, tidier)
    _, run = settle(problem, tidier)
    fetch_early(problem, tidier, run)
    return tidier if settle(problem, tidier)[0] <= seconds * (1 + 1e-12) else draft


def without_waste(problem: Problem, draft: Draft) -> Draft:
    """``draft`` less the fetches that serve no use, each segment released after its last use."""
    length = problem.length
    clean = Draft.empty(problem)
    clean.resident = [*draft.resident]
    since = dict.fromkeys(draft.resident, -1)  # boundary of the fetch
    last: dict[int, int] = {}  # use since then
    final = {segment: i for i, needed in enumerate(problem.needs) for segment in needed}
    wanted: set[tuple[int, int]] = set()  # fetches
    for position, needed in enumerate(problem.needs):
        for segment in draft.release[position]:
            if segment in last:
                wanted.add((since.pop(segment), segment))
                used = last.pop(segment)
                is_done = used == final[segment]
                clean.release[used + 1 if is_done else position].append(segment)
            elif since.pop(segment) < 0:
                clean.release[position].append(segment)
        for segment in draft.fetch[position]:
            since[segment] = position
        for segment in needed:
            last[segment] = position
    for segment, begun in since.items():
        used = last.get(segment, -1)
        if used >= 0:
            wanted.add((begun, segment))
        if used + 1 < length and (used >= 0 or begun < 0):
            clean.release[used + 1].append(segment)
    for position in range(length):
        clean.fetch[position] = [s for s in draft.fetch[position] if (position, s) in wanted]
    return clean


def fetch_late(problem: Problem, draft: Draft, run: Run) -> None:
    """Move each fetch to the last boundary that leaves every use where ``run`` has it."""
    copies, length = run.copies, problem.length
    limit = inf
    if problem.cyclic and copies:
        limit = run.boundary[length] + copies[0][2]
    latest = length - 1
    fetch: list[list[int]] = [[] for _ in range(length)]
    for (position, segment, start, _), due in reversed(
        [*zip(copies, _due(problem, run), strict=True)]
    ):
        cycles, use = divmod(due, length)
        landing = min(limit, run.start[use] + cycles * run.boundary[length])
        limit = max(start, landing - problem.copy_seconds[segment])
        latest = min(latest, due)
        while latest > position and run.boundary[latest] > limit:
            latest -= 1
        fetch[latest].append(segment)
    for queue in fetch:
        queue.reverse()
    draft.fetch = fetch


def _due(problem: Problem, run: Run) -> list[int]:
    """For each copy, the use that it serves; past the end, one of the next cycle."""
    upcoming = [2 * problem.length] * len(problem.sizes)
    if problem.cyclic:
        for position in range(problem.length - 1, -1, -1):
            for segment in problem.needs[position]:
                upcoming[segment] = position + problem.length
    due, done = [0] * len(run.copies), problem.length
    for number in range(len(run.copies) - 1, -1, -1):
        position, segment, _, _ = run.copies[number]
        while done > position:
            done -= 1
            for needed in problem.needs[done]:
                upcoming[needed] = done
        due[number] = upcoming[segment]
    return due


def keep_more(problem: Problem, draft: Draft) -> int:
    """Cancel releases whose segment has room to stay until it is fetched again; how many."""
    length = problem.length
    held = held_sizes(problem, draft)
    spare = [room - units for room, units in zip(problem.room, held, strict=True)]
    cancelled = 0
    for _, out, back, segment in sorted(_gaps(problem, draft)):
        size = problem.sizes[segment]
        least = min(spare[out : min(back, length)], default=size)
        if back > length and least >= size:
            least = min(least, *spare[: back - length])
        if least >= size:
            for position in range(out, back):
                spare[position % length] -= size
            draft.release[out].remove(segment)
            draft.fetch[back % length].remove(segment)
            if back >= length:
                draft.resident.append(segment)
            cancelled += 1
    return cancelled


def _gaps(problem: Problem, draft: Draft) -> list[tuple[int, int, int, int]]:
    """(boundaries, release, fetch, segment) of each absence; past the end, the next cycle's."""
    gaps, gone, first = [], {}, {}
    for position in range(problem.length):
        for segment in draft.release[position]:
            gone[segment] = position
        for segment in draft.fetch[position]:
            out = gone.pop(segment, None)
            if out is None:
                first[segment] = position + problem.length
            else:
                gaps.append((position - out, out, position, segment))
    if problem.cyclic:
        gaps += [(first[s] - out, out, first[s], s) for s, out in gone.items() if s in first]
    return gaps


def fetch_early(problem: Problem, draft: Draft, run: Run) -> None:
    """Move each fetch to the first boundary with room for it, as long as the link is not behind.

    It is queued no earlier than at the last boundary before the link can begin it.
    """
    held = held_sizes(problem, draft)
    spare = [room - units for room, units in zip(problem.room, held, strict=True)]
    fetch: list[list[int]] = [[] for _ in range(problem.length)]
    away = set(range(len(problem.sizes))).difference(draft.resident)
    link_free, number, wait = run.copies[0][2] if run.copies else 0.0, 0, -1
    for position in range(problem.length):
        away.update(draft.release[position])
        while number < len(run.copies):
            planned, segment, _, _ = run.copies[number]
            if planned > position:
                is_early = link_free < run.boundary[position + 1] and position > wait
                if segment not in away or not is_early:
                    break
                wait = _last_without(spare, problem.sizes[segment], position, planned)
                if wait >= position:
                    break
                for earlier in range(position, planned):
                    spare[earlier] -= problem.sizes[segment]
            link_free = max(link_free, run.boundary[position]) + problem.copy_seconds[segment]
            fetch[position].append(segment)
            away.discard(segment)
            number, wait = number + 1, -1
    draft.fetch = fetch


def _last_without(spare: list[int], size: int, first: int, stop: int) -> int:
    """The last boundary in [first, stop) with less than ``size`` to spare, or -1."""
    for position in range(stop - 1, first - 1, -1):
        if spare[position] < size:
            return position
    return -1
