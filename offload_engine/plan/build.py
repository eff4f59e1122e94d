"""From the question to the plan: several drafts, the best of them, and the bound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from math import inf

from .bound import remaining_bounds
from .clock import Draft, held_sizes, settle
from .cycle import closed, turned
from .greedy import Forward
from .model import Plan, Step, Use
from .problem import Problem, read_problem, rotated, unrolled
from .search import Beam, Search
from .tidy import tidy, without_waste

_BULKS = (0.0, 1.0, 0.5, -0.5, 2.0, -1.0)
_NARROW = Beam(width=4, reach=3, fetches=6, releases=3)
_WIDE = Beam(width=64, reach=4, fetches=12, releases=4)
_MOST_EFFORT = 600_000
_MOST_USES_TRIED = 40_000  # of all forward passes together
_WHOLE_TREE = 2_500  # uses times segments, up to which the search may be exact
_CLOSE = 1 + 1e-9
_ROUNDS = 4  # that a cycle is unrolled to
_SEARCH_ROUNDS = 8  # the same, for a search


class Best:
    """The fastest draft so far; of equally fast ones, the first."""

    def __init__(self, problem: Problem, bound: float) -> None:
        self.problem = problem
        self.bound = bound
        self.seconds = inf
        self.draft = Draft.empty(problem)

    def offer(self, draft: Draft) -> None:
        seconds = settle(self.problem, draft)[0]
        if seconds < self.seconds:
            self.seconds, self.draft = seconds, draft

    def raise_bound(self, bound: float) -> None:
        self.bound = max(self.bound, bound)

    @property
    def is_proven(self) -> bool:
        return self.seconds <= self.bound * _CLOSE


def build_plan(
    nbytes: Mapping[str, int],
    uses: Sequence[Use],
    *,
    budget_nbytes: int,
    bandwidth: float,
    resident: Collection[str] = (),
    cyclic: bool = False,
) -> Plan:
    """The plan for ``uses`` of segments of ``nbytes`` within the budget, over a link of
    ``bandwidth`` bytes per second. ``resident`` is there at the start; a cyclic plan begins
    with what it ends with, whatever that is. Raises PlanError if a use cannot fit.
    """
    problem = read_problem(nbytes, uses, budget_nbytes, bandwidth, resident, cyclic)
    best = _steady(problem) if cyclic else _single(problem)
    draft = tidy(problem, best.draft) if problem.length else best.draft
    seconds = settle(problem, draft)[0] if problem.length else 0.0
    held = held_sizes(problem, draft)
    return Plan(
        steps=tuple(map(_step(problem), draft.release, draft.fetch)),
        seconds=seconds,
        stall_seconds=max(0.0, seconds - problem.elapsed[-1]),
        fetched_nbytes=sum(nbytes[problem.names[s]] for queue in draft.fetch for s in queue),
        peak_nbytes=_peak_nbytes(problem, draft, held, nbytes, uses),
        bound_seconds=min(seconds, best.bound * (1 - 1e-12)),
        resident=tuple(problem.names[segment] for segment in sorted(draft.resident)),
        cyclic=cyclic,
        budget_nbytes=budget_nbytes,
        bandwidth=bandwidth,
        nbytes=dict(nbytes),
        uses=tuple(Use(*use) for use in uses),
    )


def _step(problem: Problem) -> Callable[[list[int], list[int]], Step]:
    names = problem.names
    return lambda release, fetch: Step(
        tuple([names[segment] for segment in release]), tuple([names[segment] for segment in fetch])
    )


def _peak_nbytes(
    problem: Problem, draft: Draft, held: list[int], nbytes: Mapping[str, int], uses: Sequence[Use]
) -> int:
    """The most that segments and a workspace take together, in the caller's own numbers."""
    if not held:
        return 0
    peak = min(range(len(held)), key=lambda i: problem.room[i] - held[i])
    here = set(draft.resident)
    for position in range(peak + 1):
        here.difference_update(draft.release[position])
        here.update(draft.fetch[position])
    return sum(nbytes[problem.names[segment]] for segment in sorted(here)) + uses[peak][2]


def _single(problem: Problem) -> Best:
    """The best draft for uses that run once."""
    bounds = remaining_bounds(problem)
    best = Best(problem, bounds.from_boundary[0])
    for bulk in _bulks(problem):
        best.offer(without_waste(problem, Forward(problem, bulk).draft()))
        if best.is_proven:
            return best
    search, left = Search(problem, bounds), _MOST_EFFORT
    for beam in _beams(problem):
        found = search.run(best.seconds, beam, left)
        left -= found.effort
        if found.draft:
            best.offer(without_waste(problem, found.draft))
        best.raise_bound(found.bound)
        if best.is_proven or left <= 0:
            break
    return best


def _bulks(problem: Problem) -> tuple[float, ...]:
    return _BULKS[: max(1, _MOST_USES_TRIED // max(1, problem.length))]


def _beams(problem: Problem) -> list[Beam]:
    size = problem.length * len(problem.sizes)
    if size <= _WHOLE_TREE:
        return [_NARROW, Beam()]
    if size <= 20 * _WHOLE_TREE:
        return [_NARROW, _WIDE]
    return []


def _steady(problem: Problem) -> Best:
    """The best draft for uses that repeat for ever."""
    if not problem.length:
        return Best(problem, 0.0)
    first = _tightest(problem)
    problem = rotated(problem, first)
    rounds = _ROUNDS if problem.length <= 400 else 3
    rolled = unrolled(problem, rounds)
    best = Best(problem, _steady_bound(rolled, rounds))
    for bulk in _bulks(rolled):
        draft = Forward(rolled, bulk).draft()
        for number in range(1, rounds - 1):
            best.offer(closed(problem, draft, number))
        if best.is_proven:
            break
    else:
        _search_rounds(problem, best)
    best.draft = turned(best.draft, -first % problem.length)
    return best


def _tightest(problem: Problem) -> int:
    """The boundary over which the least can be kept."""
    need = [sum(problem.sizes[s] for s in needed) for needed in problem.needs]
    spare = [room - units for room, units in zip(problem.room, need, strict=True)]
    return min(range(problem.length), key=lambda i: (spare[i - 1], spare[i], i))


def _steady_bound(rolled: Problem, rounds: int) -> float:
    """Seconds that no steady cycle can beat, from windows over one and more cycles."""
    ahead = remaining_bounds(rolled, rolled.length - 1).from_boundary
    length = rolled.length // rounds
    return max(ahead[(rounds - left) * length] / left for left in range(1, rounds + 1))


def _search_rounds(problem: Problem, best: Best) -> None:
    """Search the best way through several rounds, which shows the best steady cycle.

    [Note: steady bound] The labels after a round follow from those before it, and a delay of all
    of those delays all of these. So if every label after a round is, within the model, no better
    than some label before it delayed by some seconds, then every further round takes as long.
    """
    left = _MOST_EFFORT
    for beam in _beams(problem):
        rounds = _SEARCH_ROUNDS if beam.is_whole else _SEARCH_ROUNDS // 2
        rolled = unrolled(problem, rounds)
        search = Search(rolled, remaining_bounds(rolled))
        found = search.run(inf, beam, left, problem.length)
        left -= found.effort
        if found.draft:
            for number in range(1, rounds - 1):
                best.offer(closed(problem, found.draft, number))
        for before, after in pairwise(found.fronts[:-1] if beam.is_whole else []):
            delays = (max(search.lead(first, second) for first in before) for second in after)
            best.raise_bound(min(delays))
        if best.is_proven or left <= 0:
            break
