"""What to release and what to fetch at each switch of a call. Pure, no torch.

A guide leads one call. `Chain` keeps one stage of the sequence at a time. `Careful` stays inside
a budget without knowing what the activations take. `Planned` follows a plan, and finds back to it
when the call does something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from math import inf
from typing import NamedTuple, Protocol

from .plan import Plan
from .sequence import Cursor
from .sequence.follow import Follower


class Move(NamedTuple):
    """What to do before a unit runs; names of units."""

    release: Seq[str]
    fetch: Seq[str]  # in this order; the unit that runs is among them, or is there
    copy_nbytes: float = inf  # to queue ahead of need at each forward ([Note: pacing])


class Guide(Protocol):
    """Leads one call."""

    watches_forwards: bool  # whether it wants to see every forward, not only the switches
    samples: bool  # whether it wants to know what they allocate
    tells_ways_apart: bool  # whether a unit that is entered by another method has more work to it
    is_still: bool  # whether it moves nothing any more: then each unit need enter only once

    def enter(self, name: str, work: int, here: Mapping[str, int], needs: Seq[str] = ()) -> Move:
        """Before ``name`` runs: ``here`` has the bytes of every unit with a slot, ``work`` the
        elements in the arguments of ``name``, ``needs`` the units it cannot run without."""

    def wraps(self, name: str) -> bool:
        """Whether ``name`` begins a new round, outside of calls."""


class Chain:
    """Chain mode's first call: what the cursor keeps, nothing else."""

    tells_ways_apart = is_still = False

    def __init__(self, cursor: Cursor, *, watches_forwards: bool = False) -> None:
        self.cursor = cursor
        self.watches_forwards = watches_forwards
        self.samples = False

    def saw(self, name: str, needs: Seq[str] = ()) -> None:
        """``name`` runs, and another guide has decided what moves."""
        self.cursor.enter(name)

    def enter(self, name: str, work: int, here: Mapping[str, int], needs: Seq[str] = ()) -> Move:
        keep = self.cursor.enter(name)
        release = [o for o in here if o not in keep and o != name and o not in needs]
        return Move(release, [each for each in (*needs, name) if each not in here])

    def wraps(self, name: str) -> bool:
        return self.cursor.wraps(name)


class Careful:
    """Inside a budget, with workspaces that are not known: a unit that was not measured yet runs
    alone; beside one that was, others stay while there is room."""

    watches_forwards, samples, tells_ways_apart, is_still = True, True, True, False

    def __init__(
        self,
        nbytes: Mapping[str, int],
        budget_nbytes: int,
        workspace_of: Callable[[str], tuple[int, int]],
    ) -> None:
        """``workspace_of``: the work of the largest use of a unit that was measured, -1 if none
        was; and the workspace that it will need now if it has no more to do."""
        self._nbytes = nbytes
        self._budget_nbytes = budget_nbytes
        self._workspace_of = workspace_of
        self._used: dict[str, None] = {}  # in order of last use

    def saw(self, name: str, needs: Seq[str] = ()) -> None:
        """``name`` runs, and another guide has decided what moves."""
        for each in (*needs, name):
            self._used.pop(each, None)
            self._used[each] = None

    def enter(self, name: str, work: int, here: Mapping[str, int], needs: Seq[str] = ()) -> Move:
        self.saw(name, needs)
        needed = (*needs, name)
        fetch = [each for each in needed if each not in here]
        known_work, workspace = self._workspace_of(name)
        others = [other for other in here if other not in needed]
        if work > known_work:
            return Move(others, fetch)
        room = self._budget_nbytes - workspace - sum(self._nbytes[each] for each in needed)
        # What other pipelines left goes first. Of the rest, what has just run is needed last, if
        # this is a loop; and if not, it hardly matters.
        last = {other: at for at, other in enumerate(self._used)}
        others.sort(key=lambda other: -last.get(other, len(last)))
        return Move(_fit(others, here, room), fetch)

    def wraps(self, name: str) -> bool:
        return False


class Planned:
    """Follows a plan.

    A unit that the plan does not expect here is fetched on demand, into the room of what the plan
    would not have here. If it has more to do than the plan knows (larger images), or is not in the
    plan at all, another guide decides.
    """

    tells_ways_apart = False

    def __init__(
        self,
        plan: Plan,
        trace: Seq[str],
        works: Seq[int],
        otherwise: Chain | Careful,
        unit_of: Mapping[str, str] | None = None,
        forwards: Seq[int] = (),
    ) -> None:
        """``trace``: the unit that enters each use of ``plan``; ``works``: the largest work
        measured for each; ``otherwise``: who decides what the plan does not know. ``unit_of``: in
        chain mode the unit behind each segment of the plan; then a segment that is not needed
        again is released, room or no room. ``forwards``: of each use, where that is known."""
        self.plan = plan
        self.watches_forwards = self.samples = False
        self.follower = Follower(trace)
        self.is_still = not any(step.release or step.fetch for step in plan.steps)
        self.surprised = False  # the call did what the plan does not know
        self._works = works
        self._forwards = forwards
        self._otherwise = otherwise
        self._targets = _Targets(plan)
        self._unit_of = unit_of
        self._segment_of: dict[str, str] = {}  # of units in slots, where the names differ
        self._deferred: dict[str, str] = {}  # units to be fetched anew once they are released
        self._last_use: dict[str, int] = {}
        if unit_of is not None:
            for at, use in enumerate(plan.uses):
                self._last_use.update(dict.fromkeys(use.segments, at))

    def enter(self, name: str, work: int, here: Mapping[str, int], needs: Seq[str] = ()) -> Move:
        before = self.follower.at
        at = self.follower.enter(name)
        is_jump = at is not None and at not in (before, before + 1)
        if at is None or work > self._works[at]:
            self.surprised, self.is_still = True, False
            return self._otherwise.enter(name, work, here, needs)
        self._otherwise.saw(name, needs)
        if self._unit_of is None:
            return self._enter(at, here, is_jump)
        if is_jump:
            self._deferred.clear()  # the plan has no room for them here
        self._segment_of[name] = self.plan.uses[at].segments[0]
        self._deferred.pop(name, None)
        move = self._enter(at, {self._segment_of.get(o, o): size for o, size in here.items()})
        unit_of = {segment: unit for unit, segment in self._segment_of.items()}
        release = [unit_of.get(segment, segment) for segment in move.release]
        fetch: dict[str, str] = {}
        for segment in move.fetch:
            unit = self._unit_of[segment]
            stays = unit in fetch or (unit in here and unit not in release)
            (self._deferred if stays else fetch)[unit] = segment
        fetch |= {unit: self._deferred.pop(unit) for unit in release if unit in self._deferred}
        self._segment_of |= fetch
        return Move(release, list(fetch), move.copy_nbytes)

    def _enter(self, at: int, here: Mapping[str, int], is_jump: bool = False) -> Move:
        """Before use ``at``, with segments ``here``; after a jump, what the plan has there and is
        missing is fetched as well."""
        here = dict(here)
        use, step = self.plan.uses[at], self.plan.steps[at]
        release = [segment for segment in step.release if segment in here]
        release += [s for s in here if self._last_use.get(s, at) < at and s not in release]
        for segment in release:
            del here[segment]
        fetch = [segment for segment in step.fetch if segment not in here]
        fetch = [s for s in use.segments if s not in here and s not in fetch] + fetch
        if is_jump:
            lost = self._targets.after(at).difference(here, fetch)
            fetch += sorted(lost, key=lambda segment: self._targets.next_use(segment, at))
        nbytes = self.plan.nbytes
        room = self.plan.budget_nbytes - use.workspace_nbytes - sum(nbytes[s] for s in fetch)
        if sum(here.values()) > room:
            target = self._targets.after(at)
            rest = [s for s in here if s not in use.segments]
            rest.sort(key=lambda s: (s in target, s in nbytes, -self._targets.next_use(s, at)))
            kept = sum(here[s] for s in here if s in use.segments)
            release += _fit(rest, here, room - kept)
        forwards = max(1, self._forwards[at]) if self._forwards else 1
        return Move(release, fetch, use.seconds * self.plan.bandwidth / forwards)

    def wraps(self, name: str) -> bool:
        return False


class _Targets:
    """What a plan has on the device after each step, and when it needs a segment next."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._place = -1
        self._here = set(plan.resident)
        self._uses: dict[str, list[int]] | None = None

    def after(self, place: int) -> frozenset[str]:
        """Names of the segments that are there after step ``place``."""
        if place < self._place:
            self._place, self._here = -1, set(self._plan.resident)
        for step in self._plan.steps[self._place + 1 : place + 1]:
            self._here.difference_update(step.release)
            self._here.update(step.fetch)
        self._place = place
        return frozenset(self._here)

    def next_use(self, segment: str, place: int) -> int:
        """How many uses lie between ``place`` and the next use of ``segment``, round the end."""
        if self._uses is None:
            self._uses = {}
            for index, use in enumerate(self._plan.uses):
                for name in use.segments:
                    self._uses.setdefault(name, []).append(index)
        count = len(self._plan.uses)
        uses = self._uses.get(segment, ())
        return min(((use - place - 1) % count for use in uses), default=count)


def _fit(victims: Iterable[str], here: Mapping[str, int], room: int) -> list[str]:
    """The first of ``victims``, as many as must go until the rest of them fits into ``room``."""
    victims = list(victims)
    held = sum(here[name] for name in victims)
    gone: list[str] = []
    for name in victims:
        if held <= room:
            break
        held -= here[name]
        gone.append(name)
    return gone
