"""Branch and bound over the boundaries: exact where few segments compete, else a beam."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, islice
from math import inf
from typing import NamedTuple

from .bound import Bounds
from .clock import Draft
from .problem import Problem

_MOST_COMPARED = 64  # labels that may dominate one
_MORE_VICTIMS = 4  # than must go, looked at by a narrow beam
_MOST_STEPS = 20_000  # to find what to release


@dataclass(frozen=True, slots=True)
class Beam:
    """How much of the tree to walk; all of it by default."""

    width: int = 1 << 60  # labels kept at each boundary
    reach: int = 1 << 60  # missing segments looked at, soonest first
    fetches: int = 1000  # choices of what to fetch, per label
    releases: int = 1000  # choices of what to release, per choice of fetches

    @property
    def is_whole(self) -> bool:
        """Whether a search that meets no limit has seen everything."""
        return self.reach == 1 << 60


NARROW = Beam(width=4, reach=3, fetches=6, releases=3)
WIDE = Beam(width=64, reach=4, fetches=12, releases=4)


@dataclass(frozen=True, slots=True)
class Found:
    """The best of a search."""

    seconds: float
    draft: Draft | None  # None if nothing better than what was known before
    bound: float  # no plan is faster; 0 if nothing is proved
    effort: int  # steps taken, roughly
    fronts: list[list[Label]]  # the labels of each so many boundaries, as long as none was lost


class Label(NamedTuple):
    """One way to have reached a boundary."""

    least: float  # seconds of the whole plan, at least
    tie: float
    now: float
    link_free: float  # never before now
    held: int  # bits of the segments that are there or in flight, and still of use
    flying: int  # the segment in flight, or -1
    came: tuple[Label, int, tuple[int, ...]] | None  # from, released bits, fetched


class Search:
    """Labels go from boundary to boundary; those that cannot win or are dominated die.

    Nothing is lost by looking only at plans that queue a copy at the last boundary before it
    starts, fetch what a use lacks before anything else, release no more than they must and,
    among segments of one size, fetch the soonest needed and release the furthest needed first.
    """

    def __init__(self, problem: Problem, bounds: Bounds) -> None:
        self.problem = problem
        self.bounds = bounds
        self.needed = [_bits(needed) for needed in problem.needs]
        self.totals: dict[int, int] = {0: 0}
        self.copies: dict[int, float] = {}
        self.effort = 0
        self._read_order()

    def _read_order(self) -> None:
        """For each boundary: segments of use from there on, by next use, and their bits."""
        problem, starts = self.problem, self.bounds.from_start
        entry: dict[int, tuple[int, int, float, float]] = {}
        self.order: list[tuple[tuple[int, int, float, float], ...]] = [()] * (problem.length + 1)
        self.future = [0] * (problem.length + 1)
        for position in range(problem.length - 1, -1, -1):
            head = {}
            for s in problem.needs[position]:
                entry.pop(s, None)
                head[s] = (1 << s, s, problem.copy_seconds[s], starts[position])
            entry = head | entry
            self.order[position] = tuple(entry.values())
            self.future[position] = self.future[position + 1] | self.needed[position]

    def run(
        self, best: float, beam: Beam = Beam(), most_effort: float = inf, every: int = 0
    ) -> Found:
        """A plan faster than ``best`` seconds, if there is one within the beam.

        A search that has spent ``most_effort`` ends with a narrow beam. Fronts are those after
        ``every`` boundaries.
        """
        self.beam, self.best, self.most_effort = beam, best * (1 - 1e-12), most_effort
        self.effort, self.spent, self.lost = 0, 0, inf if beam.is_whole else 0.0
        fronts: list[list[Label]] = []
        start = _bits(self.problem.resident) & self.future[0]
        labels = [Label(0.0, 0.0, 0.0, 0.0, start, -1, None)]
        for position in range(self.problem.length):
            table: dict[tuple[int, int], list[Label]] = {}
            for label in labels:
                self._expand(position, label, table)
            parents = len(labels)
            labels = [label for same in table.values() for label in same]
            labels.sort(key=_promise)
            width = self._width(position, parents)
            if len(labels) > width:
                self.lost = min(self.lost, labels[width].least)
                del labels[width:]
            labels = self._undominated(labels)
            if every and (position + 1) % every == 0 and self.lost == inf:
                fronts.append(labels)
        labels.sort(key=lambda label: label.now)
        seconds = labels[0].now if labels else best
        draft = self._draft(labels[0]) if labels else None
        return Found(seconds, draft, min(seconds, best, self.lost), self.effort, fronts)

    def _width(self, position: int, parents: int) -> int:
        """How many labels to keep, so that the effort lasts to the end."""
        spent, self.spent = self.effort - self.spent, self.effort
        if self.most_effort == inf:
            return self.beam.width
        share = max(1 / 16, 1 / (self.problem.length - position))
        affordable = (self.most_effort - self.effort) * share * parents / max(1, spent)
        return min(self.beam.width, max(2, int(affordable)))

    def _expand(
        self, position: int, label: Label, table: dict[tuple[int, int], list[Label]]
    ) -> None:
        """Add to ``table`` what can follow ``label`` at boundary ``position``."""
        _, _, now, link_free, held, flying, _ = label
        problem, needed, future = self.problem, self.needed[position], self.future[position + 1]
        flying_bit = 1 << flying if flying >= 0 else 0
        missing = needed & ~held
        must = needed | flying_bit
        spare = problem.room[position] - self.total(must)
        if spare < 0:
            return
        lacking = _segments(missing)
        for segment in lacking:
            link_free += problem.copy_seconds[segment]
        end = (link_free if missing or flying_bit & needed else now) + problem.seconds[position]
        optional = held & ~must & future
        choices = self._fetches(position, held | missing, link_free, end, spare)
        for bits, fetched, free, late in choices:
            if free > end:
                late = late if late >= 0 else flying
            else:
                free, late = end, -1
            if late >= 0 and not future >> late & 1:
                late = -1
            if self.effort > self.most_effort:
                self.beam, self.lost = NARROW, min(self.lost, label.least)
                if table:
                    break
            excess = self.total(bits) + self.total(optional) - spare
            releases = self._releases(position, optional, excess)
            self._note_limit(label, len(choices), self.beam.fetches)
            self._note_limit(label, len(releases), self.beam.releases)
            for released in releases:
                now_held = (must | bits | optional & ~released) & future
                least, tie = self._least(position + 1, end, free, now_held, late)
                if least < self.best:
                    came = (label, released, (*lacking, *fetched))
                    new = Label(least, tie, end, free, now_held, late, came)
                    _add(table.setdefault((now_held, late), []), new)

    def _note_limit(self, label: Label, count: int, limit: int) -> None:
        """What a limit has cut off takes as long as ``label``, at least."""
        if count >= limit:
            self.lost = min(self.lost, label.least)

    def _fetches(
        self, position: int, held: int, link_free: float, end: float, spare: int
    ) -> list[tuple[int, tuple[int, ...], float, int]]:
        """Choices of (bits, segments, link free, segment in flight at ``end`` or -1)."""
        if link_free >= end:
            return [(0, (), link_free, -1)]
        choices: list[tuple[int, tuple[int, ...], float, int]] = []
        sizes, beam = self.problem.sizes, self.beam
        away = (entry for entry in self.order[position + 1] if not held & entry[0])
        missing = list(islice(away, beam.reach))

        def choose(
            first: int,
            bits: int,
            chosen: tuple[int, ...],
            free: float,
            spare: int,
            passed: set[int],
        ) -> None:
            passed = set(passed)
            for number in range(first, len(missing)):
                bit, segment, copy, _ = missing[number]
                size = sizes[segment]
                if len(choices) >= beam.fetches:
                    return
                if size in passed or size > spare:
                    continue
                if free + copy <= end:
                    more = bits | bit, (*chosen, segment), free + copy, spare - size
                    choose(number + 1, *more, passed)
                    passed.add(size)
                else:
                    choices.append((bits | bit, (*chosen, segment), free + copy, segment))
            if self.beam.is_whole and free < end:
                # earlier ones, passed over for this choice, may be the one in flight
                for bit, segment, copy, _ in missing[:first]:
                    if not bits & bit and free + copy > end and sizes[segment] <= spare:
                        choices.append((bits | bit, (*chosen, segment), free + copy, segment))
            choices.append((bits, chosen, free, -1))

        choose(0, 0, (), link_free, spare, set())
        return choices

    def _releases(self, position: int, optional: int, excess: int) -> list[int]:
        """Least sets out of ``optional`` that give back ``excess`` units, as bits."""
        if excess <= 0:
            return [0]
        sizes, most = self.problem.sizes, self.beam.releases
        far = [
            (bit, sizes[segment])
            for bit, segment, _, _ in reversed(self.order[position + 1])
            if optional & bit
        ]
        if not self.beam.is_whole:
            enough = bisect_left([*accumulate(size for _, size in far)], excess)
            del far[enough + _MORE_VICTIMS :]
        after = [0] * (len(far) + 1)
        for number in range(len(far) - 1, -1, -1):
            after[number] = after[number + 1] + far[number][1]
        found: list[int] = []
        effort = self.effort + _MOST_STEPS

        def choose(number: int, bits: int, excess: int, least: float, kept: frozenset[int]) -> None:
            if excess <= 0:
                if least + excess > 0:  # without the smallest it would not be enough
                    found.append(bits)
                return
            if after[number] < excess or len(found) >= most or self.effort > effort:
                return
            self.effort += 1
            bit, size = far[number]
            if size not in kept:
                choose(number + 1, bits | bit, excess - size, min(least, size), kept)
            choose(number + 1, bits, excess, least, kept | {size})

        choose(0, 0, excess, inf, frozenset())
        if self.effort > effort:
            self.lost = 0.0
        return found

    def _least(
        self, position: int, now: float, link_free: float, held: int, flying: int
    ) -> tuple[float, float]:
        """Seconds of any plan that goes on like this, at least; and when all would have landed."""
        order = self.order[position]
        self.effort += len(order) + 16
        least = now + self.bounds.from_boundary[position]
        free = link_free
        for bit, segment, copy, rest in order:
            if not held & bit:
                free += copy
                if free + rest > least:
                    least = free + rest
            elif segment == flying and link_free + rest > least:
                least = link_free + rest
        return least, free

    def total(self, bits: int) -> int:
        """Units of the segments in ``bits``."""
        known = self.totals.get(bits)
        if known is None:
            known = sum(self.problem.sizes[segment] for segment in _segments(bits))
            self.totals[bits] = known
        return known

    def _undominated(self, labels: list[Label]) -> list[Label]:
        """``labels`` by promise, less those from which no plan is sooner than from another."""
        if len(labels) < 2:
            return labels
        kept: list[Label] = []
        for label in sorted(labels, key=lambda label: (label.now, -label.held.bit_count())):
            if all(self.lead(other, label) < 0 for other in kept[:_MOST_COMPARED]):
                kept.append(label)
        kept.sort(key=_promise)
        return kept

    def lead(self, first: Label, second: Label) -> float:
        """Seconds by which ``first`` is ahead of ``second``, whatever comes.

        It is, if it can fetch what the other holds before the other is there: then it does what
        the other does, no later. What it has in flight must be in flight there too, or it could
        be in the way.
        """
        lacking = second.held & ~first.held
        if first.flying >= 0 and first.flying != second.flying:
            return -inf
        if not lacking:
            lead = second.now - first.now
            if first.flying >= 0:
                lead = min(lead, second.link_free - first.link_free)
            return lead
        return second.now - max(first.now, first.link_free) - self.copying(lacking)

    def copying(self, bits: int) -> float:
        """Seconds that copies of the segments in ``bits`` take."""
        known = self.copies.get(bits)
        if known is None:
            known = sum(self.problem.copy_seconds[segment] for segment in _segments(bits))
            self.copies[bits] = known
        return known

    def _draft(self, label: Label) -> Draft:
        draft, position = Draft.empty(self.problem), self.problem.length - 1
        while label.came is not None:
            label, released, fetched = label.came
            draft.release[position] = _segments(released)
            draft.fetch[position] = [*fetched]
            position -= 1
        return draft


def _promise(label: Label) -> tuple[float, float]:
    return label.least, label.tie


def _add(same: list[Label], new: Label) -> None:
    """Add ``new`` to labels that hold the same, unless one of them is as soon."""
    for other in same:
        if other.now <= new.now and other.link_free <= new.link_free:
            return
    same[:] = [o for o in same if not (new.now <= o.now and new.link_free <= o.link_free)]
    same.append(new)


def _bits(segments: tuple[int, ...] | frozenset[int]) -> int:
    return sum(1 << segment for segment in segments)


def _segments(bits: int) -> list[int]:
    found = []
    while bits:
        bit = bits & -bits
        found.append(bit.bit_length() - 1)
        bits ^= bit
    return found
