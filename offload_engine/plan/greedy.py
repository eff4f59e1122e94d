"""A forward rule: fetch what is missing next, drop what is needed last."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from math import inf

from .clock import Draft
from .problem import Problem, first_positions, next_positions


def fetch_limits(problem: Problem) -> list[int]:
    """For each boundary, the first use that nothing should be fetched for yet.

    All segments used from a boundary up to its limit fit together, and still do at each later
    boundary; what is fetched for a use past the limit could not stay until that use.
    """
    needs, sizes = problem.needs, problem.sizes
    count = [0] * len(sizes)  # of the uses inside the window
    end, held = problem.length, 0
    limits = [end] * end
    for position in range(end - 1, -1, -1):
        for segment in needs[position]:
            held += 0 if count[segment] else sizes[segment]
            count[segment] += 1
        while held > problem.room[position]:
            end -= 1
            for segment in needs[end]:
                count[segment] -= 1
                held -= 0 if count[segment] else sizes[segment]
        limits[position] = end
    return limits


class Forward:
    """One pass of the aggressive rule of Cao, Felten, Karlin and Li (SIGMETRICS 1995).

    At each boundary, while the link would idle before the next one: fetch the segment missing
    soonest, if what must go for it is needed later than it is. What goes is what is needed
    furthest ahead (Belady, 1966), where ``bulk`` seconds are taken off for each second that
    fetching it again would take. Everything happens at the first opportunity, but no more than
    ``lead`` seconds of compute ahead. What is ``kept`` does not go while its next use is fewer than
    so many uses ahead, unless a use has no room otherwise.
    """

    def __init__(
        self,
        problem: Problem,
        bulk: float = 0.0,
        lead: float = inf,
        kept: Mapping[int, float] | None = None,
    ) -> None:
        count = len(problem.sizes)
        self.problem = problem
        self.bulk = bulk
        self.lead = lead
        self.kept = kept or {}
        self.after = next_positions(problem.needs, count)
        self.limits = fetch_limits(problem)
        self.upcoming = first_positions(problem.needs, count)
        self.present = [False] * count
        self.fresh = [False] * count  # fetched, not yet used: never a victim
        self.landing = [0.0] * count
        self.held = 0
        self.guarded: set[int] = set()  # kept, used, and not among the victims
        self.victims: list[tuple[float, int, int]] = []  # heap, with outdated entries
        self.link_free = 0.0
        self.cursor = (0, 0)  # use and place in it: all that is used from here to there is present

    def draft(self, stop: int | None = None) -> Draft:
        """The draft of one pass over all uses, or those before ``stop``."""
        problem, draft = self.problem, Draft.empty(self.problem)
        for segment in problem.resident:
            self.present[segment] = True
            self.held += problem.sizes[segment]
            self._offer(segment)
        begin = 0.0
        for position in range(problem.length if stop is None else stop):
            release, fetch = draft.release[position], draft.fetch[position]
            end = self._demand(position, begin, release, fetch)
            while self.link_free < end and self._prefetch(position, begin, release, fetch):
                pass
            self._finish(position)
            begin = end
        return draft

    def _demand(self, position: int, begin: float, release: list[int], fetch: list[int]) -> float:
        """Fetch what use ``position`` lacks; returns when the use ends."""
        problem, now = self.problem, begin
        for segment in problem.needs[position]:
            if not self.present[segment]:
                self._fetch(segment, begin, fetch)
            if self.landing[segment] > now:
                now = self.landing[segment]
        if not self._make_room(position, problem.room[position], release):
            for kept in self.guarded:
                self._offer(kept)
            self.guarded.clear()
            self._make_room(position, problem.room[position], release)
        return now + problem.seconds[position]

    def _prefetch(self, position: int, begin: float, release: list[int], fetch: list[int]) -> bool:
        """Fetch the segment missing soonest, if all that is needed before it can stay, and what is
        kept."""
        segment, elapsed = self._missing(position), self.problem.elapsed
        if segment < 0 or elapsed[self.cursor[0]] - elapsed[position + 1] > self.lead:
            return False
        room = self.problem.room[position] - self.problem.sizes[segment]
        if not self._make_room(self.cursor[0], room, release):
            return False
        self._fetch(segment, begin, fetch)
        self.fresh[segment] = True
        return True

    def _missing(self, position: int) -> int:
        """The segment missing soonest after ``position`` and before its limit, or -1."""
        needs, present, limit = self.problem.needs, self.present, self.limits[position]
        use, place = max(self.cursor, (position, 0))
        while use < limit:
            needed = needs[use]
            while place < len(needed):
                if not present[needed[place]]:
                    self.cursor = use, place
                    return needed[place]
                place += 1
            use, place = use + 1, 0
        self.cursor = use, place
        return -1

    def _fetch(self, segment: int, begin: float, fetch: list[int]) -> None:
        starts = begin if begin > self.link_free else self.link_free
        self.link_free = self.landing[segment] = starts + self.problem.copy_seconds[segment]
        self.present[segment] = True
        self.held += self.problem.sizes[segment]
        fetch.append(segment)

    def _make_room(self, least: int, target: int, release: list[int]) -> bool:
        """Release segments next used after ``least``, so that at most ``target`` stay; False, and
        nothing is done, if there are not enough."""
        if self.held <= target:
            return True
        sizes, upcoming, chosen, spared = self.problem.sizes, self.upcoming, [], []
        excess = self.held - target
        while excess > 0 and self.victims:
            entry = heappop(self.victims)
            when, segment = -entry[1], entry[2]
            if not self.present[segment] or upcoming[segment] != when:
                continue
            if when <= least or self.fresh[segment]:
                spared.append(entry)
                continue
            chosen.append(entry)
            excess -= sizes[segment]
        is_enough = excess <= 0
        for entry in reversed(chosen):
            if sizes[entry[2]] <= -excess or not is_enough:  # the others are enough
                excess += sizes[entry[2]]
                spared.append(entry)
            else:
                self._release(entry[2], release)
        for entry in spared:
            heappush(self.victims, entry)
        return is_enough

    def _release(self, segment: int, release: list[int]) -> None:
        self.present[segment] = False
        self.held -= self.problem.sizes[segment]
        release.append(segment)

    def _finish(self, position: int) -> None:
        """Use ``position`` has run: its segments may go now."""
        for segment, later in zip(self.problem.needs[position], self.after[position], strict=True):
            self.upcoming[segment] = later
            self.fresh[segment] = False
            if later - position < self.kept.get(segment, 0):
                self.guarded.add(segment)
            else:
                self.guarded.discard(segment)
                self._offer(segment)

    def _offer(self, segment: int) -> None:
        """Make ``segment`` a victim, in the order of its next use."""
        problem, when = self.problem, self.upcoming[segment]
        if when == problem.length:
            rank = -2 * problem.elapsed[-1] - 1.0
        else:
            rank = self.bulk * problem.copy_seconds[segment] - problem.elapsed[when]
        heappush(self.victims, (rank, -when, segment))
