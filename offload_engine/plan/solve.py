"""Several drafts, the best of them, and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from .bound import remaining_bounds
from .clock import Draft, fetched_size, settle
from .cycle import closed, turned
from .greedy import Forward
from .kept import kept_segments
from .problem import Problem, rotated, unrolled
from .search import NARROW, WIDE, Beam, Search
from .tidy import tidy, without_waste


class Rule(NamedTuple):
    """A forward pass to try."""

    lead: float = inf  # as a part of the time to copy everything once; below 0: nothing ahead
    bulk: float = 0.0
    share: float = 0.0  # of the room, for what is kept; in cycles only


_BULKY = tuple(Rule(bulk=bulk) for bulk in (1, 0.5, -0.5, 2, -1))
_RULES_ONCE = (Rule(), Rule(0.25), Rule(0.06), Rule(0.03), *_BULKY)
_RULES = (
    Rule(),
    Rule(share=0.6),
    Rule(0.12, share=0.95),
    Rule(share=1),
    Rule(0.12, share=0.99),
    Rule(0.25, share=0.7),
    Rule(0.06),
    Rule(share=0.85),
    Rule(0.12, share=0.5),
    Rule(0),
    Rule(share=0.5),
    Rule(0.25, share=0.8),
    Rule(0.03),
    Rule(0.06, share=0.7),
    Rule(0.015),
    Rule(0.015, share=0.7),
    Rule(-1, share=0.97),
    Rule(0, share=0.98),
    *_BULKY,
)
"""Chosen from a grid of shares and leads, on the proportions in benchmarks/shapes.py and FLUX.1
under many budgets; the first ones matter most. All but the bulky are tried even if one takes as
long as the bound: another may fetch less."""
_MOST_USES_TRIED = 16_000  # of all forward passes together
_MOST_USES_TIDIED = 8_000  # of all tidied drafts together
_CLOSE = 1 + 1e-9
_AS_GOOD = 1 + 2e-3  # for a big problem, where bytes can count more than that
_THRIFT = 0.25  # so many percent of time are as bad as a percent of bytes
_SLOWEST = 1.035  # times the bound, to fetch less
_SLOWEST_YET = 1.06  # times the fastest, before it is tidied

_WHOLE_TREE = 2_500  # uses times segments, up to which the search may be exact
_MOST_EFFORT = 1_000_000  # of all searches together

_ROUNDS = 4  # that a cycle is unrolled to
_FEW_ROUNDS = 3  # the same, for a long one
_LONG = 400  # uses
_SEARCH_ROUNDS = 8  # the same, for a search


def solve(problem: Problem) -> tuple[Draft, float]:
    """A draft for ``problem``, and seconds that no legal plan can beat."""
    if not problem.length:
        return Draft.empty(problem), 0.0
    if not problem.cyclic:
        best = _once(problem)
        return best.tidiest(), best.bound
    first = _tightest(problem)
    best = _steady(rotated(problem, first))
    return turned(best.tidiest(), -first % problem.length), best.bound


class Best:
    """Drafts, the seconds of the fastest, and seconds that no draft can beat."""

    def __init__(self, problem: Problem, bound: float) -> None:
        self.problem = problem
        self.bound = bound
        self.seconds = inf
        self.drafts: list[tuple[float, Draft]] = []
        self._known: set[tuple[float, int]] = set()  # seconds and units fetched of each

    def offer(self, draft: Draft) -> None:
        seconds = settle(self.problem, draft)[0]
        self.seconds = min(seconds, self.seconds)
        key = seconds, fetched_size(self.problem, draft)
        if key not in self._known:
            self._known.add(key)
            self.drafts.append((seconds, draft))

    def raise_bound(self, bound: float) -> None:
        self.bound = max(self.bound, bound)

    @property
    def is_proven(self) -> bool:
        return self.seconds <= self.bound * _CLOSE

    def tidiest(self) -> Draft:
        """Of the drafts, tidied, the one that fetches least among those as good as the fastest.

        A big problem is not solved exactly, and there a little time is given for fewer bytes: the
        best is the least of seconds * bytes ** `_THRIFT`, not far above the bound.
        """
        problem = self.problem
        most = _most(_MOST_USES_TIDIED, problem)
        if _size(problem) <= _WHOLE_TREE:
            drafts = [entry for entry in self.drafts if entry[0] <= self.seconds * _CLOSE]
            timed = self._tidied(sorted(drafts, key=self._thrift)[:most])
            limit = min(seconds for seconds, _ in timed) * _CLOSE
            return min((entry for entry in timed if entry[0] <= limit), key=self._thrift)[1]
        limit = self.seconds * _SLOWEST_YET
        drafts = [entry for entry in self.drafts if entry[0] <= limit]
        timed = self._tidied(
            [min(drafts, key=lambda entry: entry[0]), *sorted(drafts, key=self._cost)[:most]]
        )
        fastest = min(seconds for seconds, _ in timed)
        limit = max(fastest * _AS_GOOD, self.bound * _SLOWEST)
        return min((entry for entry in timed if entry[0] <= limit), key=self._cost)[1]

    def _tidied(self, drafts: Sequence[tuple[float, Draft]]) -> list[tuple[float, Draft]]:
        tidied = [tidy(self.problem, draft) for _, draft in drafts]
        return [(settle(self.problem, draft)[0], draft) for draft in tidied]

    def _thrift(self, entry: tuple[float, Draft]) -> int:
        return fetched_size(self.problem, entry[1])

    def _cost(self, entry: tuple[float, Draft]) -> tuple[float, float]:
        seconds, draft = entry
        return seconds * float(fetched_size(self.problem, draft)) ** _THRIFT, seconds


def _once(problem: Problem) -> Best:
    """Drafts for uses that run once."""
    bounds = remaining_bounds(problem)
    best = Best(problem, bounds.from_boundary[0])
    once = sum(problem.copy_seconds)
    for rule in _RULES_ONCE[: _most(_MOST_USES_TRIED, problem)]:
        if rule.bulk and best.is_proven:
            break
        forward = Forward(problem, rule.bulk, rule.lead * once)
        best.offer(without_waste(problem, forward.draft()))
    search, left = Search(problem, bounds), _MOST_EFFORT
    for beam in [] if best.is_proven else _beams(problem):
        found = search.run(best.seconds, beam, left)
        left -= found.effort
        if found.draft:
            best.offer(without_waste(problem, found.draft))
        best.raise_bound(found.bound)
        if best.is_proven or left <= 0:
            break
    return best


def _steady(problem: Problem) -> Best:
    """Drafts for uses that repeat for ever."""
    rounds = _ROUNDS if problem.length <= _LONG else _FEW_ROUNDS
    rolled = unrolled(problem, rounds)
    best = Best(problem, _steady_bound(rolled, rounds))
    once = sum(problem.copy_seconds)
    kept: dict[float, dict[int, float]] = {0: {}}
    for rule in _RULES[: _most(_MOST_USES_TRIED, problem)]:
        if rule.bulk and best.is_proven:
            break
        if rule.share not in kept:
            kept[rule.share] = kept_segments(problem, rule.share)
        forward = Forward(rolled, rule.bulk, rule.lead * once, kept[rule.share])
        draft = forward.draft(rolled.length - problem.length)  # `closed` looks no further
        for turn in range(1, rounds - 1):
            best.offer(closed(problem, draft, turn))
    if not best.is_proven:
        _search_rounds(problem, best)
    return best


def _most(uses: int, problem: Problem) -> int:
    """How many passes over ``problem`` are ``uses`` altogether, at least one."""
    return max(1, uses // problem.length)


def _beams(problem: Problem) -> list[Beam]:
    """The searches to try, none for big problems."""
    if _size(problem) <= _WHOLE_TREE:
        return [NARROW, Beam()]
    return [NARROW, WIDE] if _size(problem) <= 20 * _WHOLE_TREE else []


def _size(problem: Problem) -> int:
    return problem.length * len(problem.sizes)


def _tightest(problem: Problem) -> int:
    """The boundary over which the least can be kept."""
    need = [sum(problem.sizes[s] for s in needed) for needed in problem.needs]
    spare = [room - units for room, units in zip(problem.room, need, strict=True)]
    return min(range(problem.length), key=lambda i: (spare[i - 1], spare[i], i))


def _steady_bound(rolled: Problem, rounds: int) -> float:
    """Seconds that no steady cycle can beat, from windows over one and more rounds."""
    ahead = remaining_bounds(rolled, rolled.length - 1).from_boundary
    length = rolled.length // rounds
    return max(ahead[(rounds - left) * length] / left for left in range(1, rounds + 1))


def _search_rounds(problem: Problem, best: Best) -> None:
    """Search the best way through several rounds, which shows the best steady cycle.

    [Note: steady bound] The labels after a round follow from those before it, and a delay of all
    of those delays all of these. So if every label after a round is no better, whatever comes,
    than some label before it that is delayed by some seconds, then each further round takes at
    least as long as that delay.
    """
    left = _MOST_EFFORT
    for beam in _beams(problem):
        rounds = _SEARCH_ROUNDS if beam.is_whole else _SEARCH_ROUNDS // 2
        rolled = unrolled(problem, rounds)
        search = Search(rolled, remaining_bounds(rolled))
        found = search.run(inf, beam, left, every=problem.length)
        left -= found.effort
        if found.draft:
            for turn in range(1, rounds - 1):
                best.offer(closed(problem, found.draft, turn))
        for before, after in pairwise(found.fronts[:-1]):
            delays = (max(search.lead(first, second) for first in before) for second in after)
            best.raise_bound(min(delays))
        if best.is_proven or left <= 0:
            break
