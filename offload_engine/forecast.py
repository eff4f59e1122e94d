"""What the next call will do and cost, from what the last ones did and cost. Pure, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
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


class Cost(NamedTuple):
    """What all uses at one place of the pattern have in common."""

    times: Times  # in the last call or the one before, whichever was shorter
    measured: Times  # in the last call
    workspace_nbytes: int
    is_exact: bool
    work: int
    forwards: int

    @property
    def least_nbytes(self) -> int:
        """Of workspace, for certain."""
        return self.workspace_nbytes if self.is_exact else 0


@dataclass(frozen=True)
class Forecast:
    """The pattern of a call with ``steps`` denoising steps, and what each place of it costs."""

    pattern: Pattern
    steps: int | None
    costs: tuple[Cost, ...]  # by leaf of the pattern

    @classmethod
    def of(cls, observed: Seq[Observed], steps: int | None) -> Forecast:
        """What one call showed."""
        pattern = Pattern.of([use.unit for use in observed])
        return cls(pattern, steps, _costs(pattern, observed))

    def updated(self, observed: Seq[Observed], steps: int | None) -> Forecast:
        """This forecast with another call taken in.

        A pattern that explains the call is kept: a call with one step shows no loop. A workspace
        that is known for as much work is kept where the new one is a mere bound and no better.
        """
        pattern = self._pattern_for(steps)
        if pattern.trace != [use.unit for use in observed]:
            fresh = Forecast.of(observed, steps)
            known, names = self.known_workspaces(), fresh.pattern.names
            before = [known.get(name, (-1, 0)) for name in names]
            times = [Times(inf, inf)] * len(names)
        else:
            costs = tuple(
                _normal(fresh, known, steps or self.steps, self.steps)
                for fresh, known in zip(_costs(pattern, observed), self.costs, strict=True)
            )
            fresh = Forecast(self.pattern, self.steps, costs)
            before = [(cost.work, cost.workspace_nbytes) for cost in self.costs]
            times = [cost.measured for cost in self.costs]
        costs = tuple(map(_kept, fresh.costs, before, times))
        return Forecast(fresh.pattern, fresh.steps, costs)

    def known_workspaces(self) -> dict[str, tuple[int, int]]:
        """For each unit, the work and the workspace of its largest use."""
        found: dict[str, tuple[int, int]] = {}
        for name, cost in zip(self.pattern.names, self.costs, strict=True):
            here = (cost.work, cost.workspace_nbytes)
            found[name] = max(found.get(name, here), here)
        return found

    def without(self, units: Collection[str]) -> Forecast:
        """This forecast with the workspaces of ``units`` forgotten: whatever they do is more."""
        names = self.pattern.names
        costs = tuple(
            cost._replace(work=-1) if name in units else cost
            for name, cost in zip(names, self.costs, strict=True)
        )
        return Forecast(self.pattern, self.steps, costs)

    def is_like(self, other: Forecast, spare_nbytes: float, tolerance: float) -> bool:
        """Whether a plan made for ``other`` serves this one as well: its seconds differ by no more
        than ``tolerance``, and a new one would have less than ``spare_nbytes`` of room more."""
        if (self.pattern, self.steps) != (other.pattern, other.steps):
            return False
        mine, theirs = self.expect(None).seconds, other.expect(None).seconds
        change = sum(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        pairs = list(zip(self.costs, other.costs, strict=True))
        spared = max((b.workspace_nbytes - a.workspace_nbytes for a, b in pairs), default=0)
        return (
            change <= tolerance * sum(mine)
            and spared <= spare_nbytes
            and all(a.workspace_nbytes <= b.workspace_nbytes and a.work <= b.work for a, b in pairs)
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
        needs: Mapping[str, Seq[str]] | None = None,
        cyclic: bool = False,
    ) -> Plan:
        """The plan for it; ``segments``: what to call the segment of each use, else its unit.
        ``needs``: for each unit, those it cannot run without.

        A workspace that is known by a bound alone, which is too high for the budget, is taken to
        fill it: that use ran, so it needs no more. Raises PlanError where a use does not fit.
        """
        sizes: dict[str, int] = {}
        uses = []
        segments = segments or self.trace
        for name, segment, cost, seconds in zip(
            self.trace, segments, self.costs, self.seconds, strict=True
        ):
            together = (*(needs or {}).get(name, ()), segment)
            sizes[segment] = max(1, nbytes[name])
            sizes.update((other, max(1, nbytes[other])) for other in together[:-1])
            room = max(0, budget_nbytes - sum(sizes[each] for each in together))
            workspace = cost.workspace_nbytes if cost.is_exact else min(cost.workspace_nbytes, room)
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
    known = [use.workspace_nbytes for use in uses if use.is_exact or use.is_sampled]
    times = Times(median(use.seconds for use in uses), uses[-1].seconds)
    return Cost(
        times=times,
        measured=times,
        # Of mere bounds the lowest: what runs there is the same each time.
        workspace_nbytes=max(known) if known else min(use.workspace_nbytes for use in uses),
        is_exact=any(use.is_exact for use in uses),
        work=max(use.work for use in uses),
        forwards=round(median(use.forwards for use in uses)),
    )


def _kept(cost: Cost, known: tuple[int, int], times: Times) -> Cost:
    """``cost`` with what was ``known`` before (work, workspace), where that says more.

    Of the ``times`` of two calls with as much work the shorter count: the other waited for
    something.
    """
    work, workspace_nbytes = known
    if cost.work > work:
        return cost
    if cost.work < work:
        return cost._replace(work=work, workspace_nbytes=max(workspace_nbytes, cost.least_nbytes))
    cost = cost._replace(times=cost.times.at_most(times))
    if cost.is_exact and cost.workspace_nbytes > workspace_nbytes:
        return cost
    return cost._replace(workspace_nbytes=min(workspace_nbytes, cost.workspace_nbytes))


def _normal(cost: Cost, known: Cost, steps: int | None, normal: int | None) -> Cost:
    """``cost``, of a call with ``steps``, as if with ``normal``; forwards that were not counted
    are those that are ``known``."""
    if not cost.forwards:
        forwards = known.forwards
        if steps and normal and steps != normal:
            forwards = _for_steps(known, normal, steps).forwards
        cost = cost._replace(forwards=forwards)
    return _for_steps(cost, steps, normal) if steps and normal and steps != normal else cost


def _for_steps(cost: Cost, before: int, now: int) -> Cost:
    """``cost`` of a use that runs once per step, if it seems to be one."""
    if not cost.forwards or cost.forwards % before or before == 1:
        return cost
    return cost._replace(
        times=cost.times.scaled(now / before),
        measured=cost.measured.scaled(now / before),
        forwards=cost.forwards // before * now,
    )
