"""What the next call will do and cost, from what the last ones did and cost. Pure, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import repeat
from math import inf
from statistics import median
from typing import NamedTuple

from .plan import Plan, Use, build_plan
from .sequence import Pattern


class Observed(NamedTuple):
    """One use, as it was measured."""

    unit: str
    seconds: float
    workspace_nbytes: int  # exact or an upper bound
    is_exact: bool
    is_sampled: bool  # a close bound
    work: int  # elements in its arguments
    forwards: int  # 0: not counted


class Times(NamedTuple):
    """Seconds of the uses at one place of the pattern: the last one may run into what follows."""

    usual: float  # the median
    last: float

    def scaled(self, factor: float) -> Times:
        return Times(self.usual * factor, self.last * factor)

    def at_most(self, other: Times) -> Times:
        return Times(min(self.usual, other.usual), min(self.last, other.last))


_NEVER = Times(inf, inf)


class Cost(NamedTuple):
    """What all uses at one place of the pattern have in common."""

    times: Times  # in the last call or the one before, whichever was shorter
    measured: Times  # in the last call
    workspace_nbytes: int
    least_nbytes: int  # it certainly is no less: measured to the byte in one use at least
    most_nbytes: int  # it certainly was no more in any use of the last call
    work: int
    forwards: int


@dataclass(frozen=True)
class Forecast:
    """The pattern of a call with ``steps`` denoising steps, and what each place of it costs."""

    pattern: Pattern
    steps: int | None
    costs: tuple[Cost, ...]  # by leaf of the pattern
    most_steps: int = 0  # of any call that was seen

    @classmethod
    def of(cls, observed: Seq[Observed], steps: int | None) -> Forecast:
        """What one call showed."""
        pattern = Pattern.of([use.unit for use in observed])
        return cls(pattern, steps, _costs(pattern, observed), steps or 0)

    def updated(self, observed: Seq[Observed], steps: int | None) -> Forecast:
        """This forecast with another call taken in.

        A pattern that explains the call is kept: a call with one step shows no loop. A workspace
        that is known for as much work is kept where the new one is a mere bound and no better.
        """
        pattern = self._pattern_for(steps)
        if pattern.trace == [use.unit for use in observed]:
            fresh = Forecast(self.pattern, self.steps, _costs(pattern, observed))
            before: list[Cost | None] = list(self.costs)
            costs = tuple(map(self._normal, fresh.costs, self.costs, repeat(steps)))
        else:
            fresh = Forecast.of(observed, steps)
            largest = self._largest()
            before = [largest.get(name) for name in fresh.pattern.names]
            costs = tuple(map(self._counted, fresh.costs, before, repeat(steps)))
            before = [known and known._replace(measured=_NEVER) for known in before]
        is_shorter = bool(steps and self.steps and steps < self.steps)
        is_shorter = is_shorter or len(observed) < len(self.pattern.leaves)
        costs = tuple(map(_kept, costs, before, repeat(is_shorter)))
        return Forecast(fresh.pattern, fresh.steps, costs, max(self.most_steps, steps or 0))

    def _normal(self, cost: Cost, known: Cost, steps: int | None) -> Cost:
        """``cost``, of a call with ``steps``, as if with those of this forecast."""
        if not steps or not self.steps or steps == self.steps:
            return cost if cost.forwards else cost._replace(forwards=known.forwards)
        if not _scales(known, self.steps) and not _scales(cost, steps):
            return cost._replace(forwards=known.forwards or cost.forwards)
        factor = self.steps / steps
        return cost._replace(
            times=cost.times.scaled(factor),
            measured=cost.measured.scaled(factor),
            forwards=known.forwards or round(cost.forwards * factor),
        )

    def _counted(self, cost: Cost, known: Cost | None, steps: int | None) -> Cost:
        """``cost``, of a call with ``steps``, with the forwards that are ``known`` of its unit, if
        they were not counted."""
        if cost.forwards or known is None:
            return cost
        if steps and self.steps and _scales(known, self.steps):
            return cost._replace(forwards=known.forwards // self.steps * steps)
        return cost._replace(forwards=known.forwards)

    def _largest(self) -> dict[str, Cost]:
        """For each unit, the cost of the use with the most work, with the largest workspace of all:
        a decoder that encodes as well has more work then, and needs less room."""
        found: dict[str, Cost] = {}
        most: dict[str, int] = {}
        for name, cost in zip(self.pattern.names, self.costs, strict=True):
            most[name] = max(most.get(name, 0), cost.workspace_nbytes)
            if name not in found or _size(cost) > _size(found[name]):
                found[name] = cost
        return {name: cost._replace(workspace_nbytes=most[name]) for name, cost in found.items()}

    def known_workspaces(self) -> dict[str, tuple[int, int]]:
        """For each unit, the work and the workspace of its largest use."""
        return {name: _size(cost) for name, cost in self._largest().items()}

    @property
    def is_unsure(self) -> bool:
        """Whether the workspaces of some units are to be learned anew."""
        return any(cost.work < 0 for cost in self.costs)

    def without(self, units: Collection[str]) -> Forecast:
        """This forecast with the workspaces of ``units`` forgotten: whatever they do is more."""
        names = self.pattern.names
        costs = tuple(
            cost._replace(work=-1) if name in units else cost
            for name, cost in zip(names, self.costs, strict=True)
        )
        return Forecast(self.pattern, self.steps, costs, self.most_steps)

    def room_nbytes(self, plan: Plan, steps: int | None) -> list[int]:
        """For each place, by how much the workspace may grow within ``plan``, which was made for a
        call with ``steps``."""
        room = [plan.budget_nbytes] * len(self.costs)
        leaves = self._pattern_for(steps).leaves
        for leaf, use, held in zip(leaves, plan.uses, plan.held_nbytes, strict=True):
            room[leaf] = min(room[leaf], plan.budget_nbytes - held - use.workspace_nbytes)
        return room

    def is_like(
        self,
        other: Forecast,
        spare_nbytes: float,
        tolerance: float,
        room_nbytes: Seq[int] = (),
    ) -> bool:
        """Whether a plan made for ``other`` serves this one as well: its seconds differ by no more
        than ``tolerance``, no workspace is larger by more than there is room (``room_nbytes``; none
        by default), and a new one would have less than ``spare_nbytes`` of room more."""
        if (self.pattern, self.steps) != (other.pattern, other.steps):
            return False
        mine, theirs = self.expect(None).seconds, other.expect(None).seconds
        change = sum(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        pairs = list(zip(self.costs, other.costs, strict=True))
        spared = max((b.workspace_nbytes - a.workspace_nbytes for a, b in pairs), default=0)
        return (
            change <= tolerance * sum(mine)
            and spared <= spare_nbytes
            and all(
                a.workspace_nbytes <= b.workspace_nbytes + room and a.work <= b.work
                for (a, b), room in zip(pairs, room_nbytes or repeat(0), strict=False)
            )
        )

    def expect(self, steps: int | None) -> Expected:
        """What a call with ``steps`` denoising steps will do; None: as many as this one."""
        pattern, costs = self._pattern_for(steps), self.costs
        if steps and self.steps and steps != self.steps:
            costs = tuple(_for_steps(cost, self.steps, steps) for cost in costs)
        names, leaves = pattern.names, pattern.leaves
        return Expected(tuple(names[n] for n in leaves), tuple(costs[n] for n in leaves))

    def _pattern_for(self, steps: int | None) -> Pattern:
        if not steps or not self.steps or steps == self.steps:
            return self.pattern
        return self.pattern.with_steps(self.steps, steps)


class Expected(NamedTuple):
    """The uses of a call to come."""

    trace: tuple[str, ...]  # the unit that enters each use
    costs: tuple[Cost, ...]

    @property
    def seconds(self) -> list[float]:
        """Of each use."""
        last = {id(cost): at for at, cost in enumerate(self.costs)}
        return [
            cost.times.last if last[id(cost)] == at else cost.times.usual
            for at, cost in enumerate(self.costs)
        ]

    @property
    def forwards(self) -> list[int]:
        return [cost.forwards for cost in self.costs]

    @property
    def works(self) -> list[int]:
        return [cost.work for cost in self.costs]

    def plan(
        self,
        nbytes: Mapping[str, int],
        *,
        budget_nbytes: int,
        bandwidth: float,
        segments: Seq[str] = (),
        beside_nbytes: Seq[int] = (),
        needs: Mapping[str, Seq[str]] | None = None,
        cyclic: bool = False,
    ) -> Plan:
        """The plan for it; ``segments``: what to call the segment of each use, else its unit.
        ``beside_nbytes``: of other segments that were there whenever the use ran. ``needs``: for
        each unit, those it cannot run without.

        A workspace that is known by a bound, which is too high for the budget, is taken to fill it:
        that use ran, so it needs no more. Raises PlanError where a use does not fit.
        """
        sizes: dict[str, int] = {}
        uses = []
        segments = segments or self.trace
        beside_nbytes = beside_nbytes or [0] * len(self.trace)
        for name, segment, cost, seconds, beside in zip(
            self.trace, segments, self.costs, self.seconds, beside_nbytes, strict=True
        ):
            together = (*(needs or {}).get(name, ()), segment)
            sizes[segment] = max(1, nbytes[name])
            sizes.update((other, max(1, nbytes[other])) for other in together[:-1])
            room = max(0, budget_nbytes - beside - sum(sizes[each] for each in together))
            workspace = max(cost.least_nbytes, min(cost.workspace_nbytes, room))
            uses.append(Use(together, seconds, workspace))
        return build_plan(
            sizes, uses, budget_nbytes=budget_nbytes, bandwidth=bandwidth, cyclic=cyclic
        )


def _costs(pattern: Pattern, observed: Seq[Observed]) -> tuple[Cost, ...]:
    groups: list[list[Observed]] = [[] for _ in pattern.names]
    for leaf, use in zip(pattern.leaves, observed, strict=True):
        groups[leaf].append(use)
    return tuple(map(_cost, groups))


def _cost(uses: Seq[Observed]) -> Cost:
    times = Times(median(use.seconds for use in uses), uses[-1].seconds)
    close = [use.workspace_nbytes for use in uses if use.is_exact or use.is_sampled]
    others = [use.workspace_nbytes for use in uses if not (use.is_exact or use.is_sampled)]
    return Cost(
        times=times,
        measured=times,
        # Of mere bounds the lowest: what runs there is much the same each time.
        workspace_nbytes=max(*close, min(others, default=0), 0),
        least_nbytes=max((use.workspace_nbytes for use in uses if use.is_exact), default=0),
        most_nbytes=max(use.workspace_nbytes for use in uses),
        work=max(use.work for use in uses),
        forwards=round(median(use.forwards for use in uses)),
    )


def _size(cost: Cost) -> tuple[int, int]:
    return cost.work, cost.workspace_nbytes


def _kept(cost: Cost, known: Cost | None, is_shorter: bool) -> Cost:
    """``cost`` with what was ``known`` before, where that says more.

    Of the times of two calls with as much work the shorter count: the other waited for something.
    A call that ``is_shorter`` says nothing against what longer ones needed: the first round of a
    loop needs less than the next, which has its results beside it.
    """
    if known is None or cost.work > known.work:
        return cost
    if cost.work < known.work:
        least = max(cost.least_nbytes, known.least_nbytes)
        workspace = max(known.workspace_nbytes, least)
        return cost._replace(work=known.work, workspace_nbytes=workspace, least_nbytes=least)
    most = known.workspace_nbytes if is_shorter else cost.most_nbytes
    workspace = max(cost.least_nbytes, min(known.workspace_nbytes, most))
    return cost._replace(
        times=cost.times.at_most(known.measured),
        workspace_nbytes=workspace,
        least_nbytes=max(cost.least_nbytes, min(known.least_nbytes, workspace)),
    )


def _scales(cost: Cost, steps: int) -> bool:
    """Whether it runs once per step, or twice..., as it seems. One step shows nothing."""
    return steps > 1 and cost.forwards > 0 and cost.forwards % steps == 0


def _for_steps(cost: Cost, before: int, now: int) -> Cost:
    """``cost``, of a call with ``before`` steps, in one with ``now``."""
    if not _scales(cost, before):
        return cost
    return cost._replace(
        times=cost.times.scaled(now / before),
        measured=cost.measured.scaled(now / before),
        forwards=cost.forwards // before * now,
    )
