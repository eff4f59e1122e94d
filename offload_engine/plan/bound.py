"""Seconds that no legal plan can beat. The proof of each step is in docs/planning.md."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import inf, prod

from .problem import Problem

_MOST_SUMS = 8192  # beyond, sums of sizes are taken to reach every number
_MOST_IN_HEAD = 16  # segments whose sums are looked at one by one
_MOST_IN_HEAD_SUMS = 64
_MOST_SEGMENTS = 64  # with more, windows begin at some boundaries only
_MOST_STEPS = 1_500_000  # through all windows together; the same


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds to the end that every plan needs, whatever the device holds by then."""

    from_boundary: list[float]  # from reaching each; the last is the end
    from_start: list[float]  # from the start of each use


class Windows:
    """The bound, built from the last boundary to the first.

    A window from boundary a to use k: all that is used in it must be on the device by the start
    of k, at most the room of a boundary is there at its beginning, and the rest takes the link
    some time. A chain of windows and uses is a path; the longest path is the bound, as strong as
    the linear program of Albers, Garg and Leonardi (J. ACM 2000) where segments can be divided.
    Two facts sharpen it: what is held is a sum of whole segments, and whenever a copy starts,
    its slot is taken but empty.
    """

    def __init__(self, problem: Problem, before: int | None) -> None:
        length = problem.length
        problem, self.parts = _bundled(problem)
        self.problem = problem
        self.before = before  # the use before the first, if any
        self.upcoming = [length] * len(problem.sizes)
        self.order: list[int] = []  # segments used at or after the boundary, by next use
        self.from_boundary = [0.0] * (length + 1)
        self.from_start = [0.0] * (length + 1)
        self.if_copy_starts = [0.0] * (length + 1)  # from each boundary, if one does in its step
        self.floor: Callable[[int], int] = _identity
        self.most: dict[tuple[tuple[int, ...], int, float, float], tuple[int, int]] = {}
        self.heads: dict[object, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def bounds(self) -> Bounds:
        length = self.problem.length
        count = len(self.problem.sizes)
        stride = max(1 + count // _MOST_SEGMENTS, length * count // _MOST_STEPS)
        for position in range(length - 1, -1, -1):
            tail = self.problem.seconds[position] + self.from_boundary[position + 1]
            self.from_start[position] = tail
            self._enter(position)
            if position % stride:
                self.from_boundary[position] = self.if_copy_starts[position] = tail
            else:
                self._look_ahead(position, tail)
        return Bounds(self.from_boundary, self.from_start)

    def _enter(self, position: int) -> None:
        """Move the segments of use ``position`` to the head of the order."""
        known = len(self.order)
        for segment in self.problem.needs[position]:
            if self.upcoming[segment] < self.problem.length:
                self.order.remove(segment)
            self.upcoming[segment] = position
            self.order.insert(0, segment)
        if len(self.order) > known:
            self.floor = floor_of_sums(
                [size for bundle in self.order for size in self.parts[bundle]]
            )
            self.most.clear()

    def _look_ahead(self, position: int, tail: float) -> None:
        """Set what every plan needs from boundary ``position``."""
        problem, order, upcoming = self.problem, self.order, self.upcoming
        sizes, parts, floor = problem.sizes, self.parts, self.floor
        from_start = self.from_start
        room, rate = problem.room[position], problem.unit_seconds
        there, spare = self._before(position)
        room_floor, others_floor = floor(room), max(0, floor(spare))
        smallest_later, biggest = self._later_sizes()
        enough = min(room_floor, others_floor, floor(max(0, room - biggest)))
        heads = self._heads(there)
        best = if_copy_starts = tail
        window, window_end = -inf, position
        wanted = met = 0
        smallest: float = inf
        number, count = 0, len(order)
        while number < count:
            use = upcoming[order[number]]
            while number < count and upcoming[order[number]] == use:
                segment = order[number]
                size = sizes[segment]
                wanted += size
                if parts[segment][0] < smallest:
                    smallest = parts[segment][0]
                if segment in there:
                    met += size
                number += 1
            if number < len(heads):
                whole, others = heads[number]
                had = min(_floor(whole, room), met + _floor(others, spare))
                copying = self._at_copy_start(whole, wanted, room, smallest, smallest_later[number])
            elif wanted <= enough:
                continue
            else:
                had = room_floor if room_floor < others_floor + met else others_floor + met
                copying = self._at_copy_start((), wanted, room, smallest, smallest_later[number])
            if wanted > had:
                value = (wanted - had) * rate + from_start[use]
                if value > best:
                    best = value
                if value > window and wanted > room:
                    window, window_end = value, use
            if wanted > copying and use > position:
                value = (wanted - copying) * rate + from_start[use]
                if value > if_copy_starts:
                    if_copy_starts = value
        self.if_copy_starts[position] = if_copy_starts
        if window_end > position and if_copy_starts > best:
            best = max(best, self._first_copy(position, window, window_end))
        self.from_boundary[position] = best

    def _before(self, position: int) -> tuple[set[int], int]:
        """Segments that may be there when ``position`` is reached, and units beside them."""
        problem = self.problem
        before = position - 1 if position else self.before
        if before is None:
            return set(problem.resident), 0
        there = set(problem.needs[before])
        return there, problem.room[before] - sum(problem.sizes[segment] for segment in there)

    def _later_sizes(self) -> tuple[list[float], int]:
        """The smallest size from each place in the order on, and the biggest of all."""
        parts = [self.parts[segment] for segment in reversed(self.order)]
        smallest = [*accumulate((part[0] for part in parts), min, initial=inf)]
        smallest.reverse()
        return smallest, max((part[-1] for part in parts), default=0)

    def _heads(self, there: set[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each small number of segments from the order's head: all sums of their sizes, and
        of those not ``there``. Few are enough to see that a big one cannot be there in part.
        """
        head = tuple(self.order[:_MOST_IN_HEAD])
        key = head, tuple([segment in there for segment in head])
        if key not in self.heads:
            whole: tuple[int, ...] = (0,)
            others: tuple[int, ...] = (0,)
            found = [(whole, others)]
            for segment, is_there in zip(*key, strict=True):
                for size in self.parts[segment]:
                    whole = _with_size(whole, size)
                    others = others if is_there else _with_size(others, size)
                if len(whole) > _MOST_IN_HEAD_SUMS:
                    break
                found.append((whole, others))
            self.heads[key] = found
        return self.heads[key]

    def _at_copy_start(
        self, sums: tuple[int, ...], wanted: int, room: int, smallest: float, smallest_later: float
    ) -> int:
        """Most of the ``wanted`` units that are there when a copy starts in a step with ``room``.

        Either it copies a segment of the window, whose slot is still empty; or one used later,
        whose slot does not help and whose copy the rest has to wait for, if there is any.
        ``sums`` are those of sizes in the window, if they are few.
        """
        key = sums, room, smallest, smallest_later
        if key not in self.most:
            floor = partial(_floor, sums) if sums else self.floor
            later = floor(room - int(smallest_later)) if smallest_later < inf else -1
            self.most[key] = floor(room - int(smallest)), later
        most, later = self.most[key]
        if later < 0:
            return most
        return wanted if later >= wanted else max(most, later - int(smallest_later))

    def _first_copy(self, position: int, window: float, window_end: int) -> float:
        """The least over the steps in which the first copy after ``position`` can start."""
        elapsed, if_copy_starts = self.problem.elapsed, self.if_copy_starts
        least = if_copy_starts[position]
        for step in range(position + 1, window_end + 1):
            spent = elapsed[step] - elapsed[position]
            if spent + window >= least:
                break
            least = min(least, spent + max(window, if_copy_starts[step]))
        return least


def remaining_bounds(problem: Problem, before: int | None = None) -> Bounds:
    """Lower bounds from every point of ``problem``; ``before`` is the use before its first."""
    return Windows(problem, before).bounds()


def _bundled(problem: Problem) -> tuple[Problem, list[tuple[int, ...]]]:
    """``problem`` with segments that are always used together as one, and the sizes in each such
    bundle, the smallest first: a window has all of it, or nothing."""
    used: dict[int, list[int]] = {}
    for place, needed in enumerate(dict.fromkeys(problem.needs)):
        for segment in needed:
            used.setdefault(segment, []).append(place)
    resident = set(problem.resident)
    bundles: dict[tuple[object, ...], list[int]] = {}
    for segment, places in used.items():
        bundles.setdefault((segment in resident, *places), []).append(segment)
    sizes = [sorted(problem.sizes[segment] for segment in bundle) for bundle in bundles.values()]
    bundle_of = {s: number for number, bundle in enumerate(bundles.values()) for s in bundle}
    renamed = {
        needed: tuple(dict.fromkeys(bundle_of[segment] for segment in needed))
        for needed in set(problem.needs)
    }
    bundled = replace(
        problem,
        names=(),
        sizes=tuple(map(sum, sizes)),
        copy_seconds=(),
        needs=tuple(renamed[needed] for needed in problem.needs),
        resident=tuple({bundle_of[segment] for segment in resident if segment in bundle_of}),
    )
    return bundled, [tuple(bundle) for bundle in sizes]


def floor_of_sums(sizes: Sequence[int]) -> Callable[[int], int]:
    """The greatest sum of some of ``sizes`` that is at most a given number."""
    counts = Counter(sizes)
    if prod(many + 1 for many in counts.values()) > _MOST_SUMS:
        return _identity
    sums = {0}
    for size, many in counts.items():
        sums = {known + times * size for known in sums for times in range(many + 1)}
    ordered = tuple(sorted(sums))
    return lambda number: _floor(ordered, number)


def _floor(ordered: tuple[int, ...], number: float) -> int:
    """The greatest of ``ordered``, which begins with 0, that is at most ``number``; or 0."""
    return ordered[max(0, bisect_right(ordered, number) - 1)]


def _with_size(sums: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(sorted({*sums, *(known + size for known in sums)}))


def _identity(number: int) -> int:
    return number
