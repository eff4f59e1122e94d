"""Which guide leads a call: from what the calls before cost to the plan of the next."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from .errors import OffloadError, PlanError
from .forecast import Forecast, Observed
from .guide import Careful, Chain, Guide, Planned
from .measure import Meter
from .plan import Plan
from .residency import Event, Unit
from .sequence import stages_of
from .transfers import elapsed_seconds
from .units import format_nbytes

_SPARE = 1 / 256  # of the budget: for less room a new plan is not worth its making
_LEFT_NBYTES = 4096  # at most, of timesteps and the like
_AS_BEFORE = 0.02  # nor for seconds that differ by less than this part of the call
_AS_IN_FIRST = 1e-3  # the same, after the first call that was planned

_log = logging.getLogger("offload_engine")


class Planner:
    """Plans the calls of one pipeline.

    With ``vram_nbytes`` the plan is cyclic and uses all of it. In chain mode each call begins and
    ends with nothing on the device, and the budget is what one component at a time has taken.
    """

    def __init__(self, vram_nbytes: int | None) -> None:
        self.vram_nbytes = vram_nbytes
        self.plan: Plan | None = None
        self.plan_of_last_call: Plan | None = None
        self.outside_nbytes = 0  # allocated on the device by others before the engine was there
        self._forecast: Forecast | None = None
        self._bandwidth = 0.0
        self._chain_peak_nbytes = 0
        self._steps: int | None = None
        self._planned_calls = 0  # in a row, that went as planned
        self._was_interrupted = False  # the last call, by one of another pipeline
        self._saw_no_peak = False  # in chain mode, the last call that was measured
        self._cached_beside: int | None = None  # on the device before a call that cached much there
        self._last_still: Meter | None = None
        self._asked: _Asked | None = None  # what a plan was made for last
        self._answer: Plan | None = None  # that plan, if there can be one
        self._room_nbytes: list[int] = []  # by which workspaces may grow within it
        self._last: tuple[Guide, Meter, deque[Event], frozenset[str]] | None = None

    def guide(
        self,
        chain: Callable[[], Chain],
        units: Collection[Unit],
        steps: int | None,
        meter: Meter,
        *,
        solo: bool,
    ) -> Guide:
        """The guide of a call that begins; ``units``: those of the pipeline."""
        self._study()
        is_confirmed = self._is_confirmed()
        self._steps = steps
        if self._forecast is not None and self._forecast.most_steps == 1 < (steps or 0):
            # What the first round leaves to the next was never seen.
            self._forecast = self._forecast.without(self._forecast.pattern.names)
        self.outside_nbytes = min(self.outside_nbytes, meter.outside_nbytes)
        meter.outside_nbytes = self.normal(meter.outside_nbytes)
        if self.vram_nbytes is None and (solo or self._was_interrupted):
            self.plan = None  # what is fetched ahead would be thrown away and fetched again
        else:
            self._make_plan(units, steps, meter.outside_nbytes)
        self.plan_of_last_call = self.plan
        if self.plan is not None and self._forecast is not None:
            expected = self._forecast.expect(steps)
            unit_of = None
            if self.vram_nbytes is None:
                names = _stretches(expected.trace, _sizes(units))
                unit_of = dict(zip(names, expected.trace, strict=True))
            otherwise = self.guide_by_hand(chain, units, meter)
            guide = Planned(
                self.plan,
                expected.trace,
                expected.works,
                otherwise,
                unit_of,
                expected.forwards,
            )
            guide.is_still = guide.is_still and is_confirmed
            measures = self._forecast.is_unsure
            measures |= self._cached_much(meter.outside_nbytes) and not guide.is_still
            guide.samples = guide.watches_forwards = measures
            return guide
        by_hand = self.guide_by_hand(chain, units, meter)
        by_hand.samples = by_hand.samples or self._saw_no_peak
        return by_hand

    def guide_by_hand(
        self, chain: Callable[[], Chain], units: Collection[Unit], meter: Meter
    ) -> Chain | Careful:
        """The guide of what runs without a plan."""
        if self.vram_nbytes is None:
            return chain()
        if self._forecast is not None:
            for name, known in self._forecast.known_workspaces().items():
                meter.workspaces.setdefault(name, known)
        return Careful(_sizes(units), self._budget(meter.outside_nbytes), meter.workspace_of)

    def ended(self, guide: Guide, meter: Meter, log: deque[Event], units: frozenset[str]) -> None:
        """A call that ``guide`` led came to its end."""
        self._was_interrupted = meter.is_interrupted
        if guide.is_still:  # such a call shows each unit once: only its length tells anything
            self._last_still = meter
        else:
            self._last = (guide, meter, log, units)

    def prepare(self, units: Collection[Unit], outside_nbytes: int) -> Plan | None:
        """The plan for the next call, if it is to be like the last one."""
        outside_nbytes = self.normal(outside_nbytes)
        if self._last is not None:
            guide, meter, _, _ = self._last
            self._cached_beside = meter.outside_nbytes
            if not self._cached_much(outside_nbytes):
                self._cached_beside = None
            # What it changes in the plan is prepared for now, rather than waited for in the next.
            if guide.samples or not _went_as_planned(guide) or _has_ended(meter):
                self._study()
        self._make_plan(units, self._steps, outside_nbytes)
        return self.plan

    def ran_out(self) -> None:
        """Memory ran out: what is known of the workspaces is too little, in one use at least. The
        peak, which is high now, will not tell of which others."""
        if self._forecast is not None:
            self._forecast = self._forecast.without(self._forecast.pattern.names)

    def curve(self, units: Collection[Unit], points: int) -> list[tuple[int, Plan]]:
        """Plans for ``points`` budgets, from the least to what holds everything."""
        self._study()
        if self._forecast is None or not self._bandwidth:
            raise OffloadError("curve() needs a measured call: call the pipeline once first.")
        expected = self._forecast.expect(self._steps)
        sizes = {name: max(1, nbytes) for name, nbytes in _sizes(units).items()}
        needs = {unit.name: [other.name for other in unit.needs] for unit in units}
        least = most = 0
        for name, cost in zip(expected.trace, expected.costs, strict=True):
            together = sum(sizes[each] for each in (*needs[name], name))
            least = max(least, together + cost.workspace_nbytes)
            most = max(most, cost.workspace_nbytes)
        most += sum(
            sizes[name] for name in {*expected.trace, *(n for ns in needs.values() for n in ns)}
        )
        budgets = [least + (most - least) * i // max(1, points - 1) for i in range(points)]
        return [
            (
                budget,
                expected.plan(
                    sizes,
                    budget_nbytes=budget,
                    bandwidth=self._bandwidth,
                    needs=needs,
                    cyclic=True,
                ),
            )
            for budget in dict.fromkeys(budgets)
        ]

    # ---- inside

    def normal(self, outside_nbytes: int) -> int:
        """What is allocated beside weights, without the few numbers that schedulers leave on the
        device: they count as the next call's own, which puts its own in their place."""
        growth = outside_nbytes - self.outside_nbytes
        return self.outside_nbytes if 0 < growth <= _LEFT_NBYTES else outside_nbytes

    def _budget(self, outside_nbytes: int) -> int:
        """Bytes for weights and workspaces. What is on the device since attaching, such as results
        that the user keeps, counts as well."""
        assert self.vram_nbytes is not None
        return max(1, self.vram_nbytes - max(0, outside_nbytes - self.outside_nbytes))

    def _cached_much(self, outside_nbytes: int) -> bool:
        """Whether a call has left much on the device, such as caches of the pipeline.

        That call measured them as workspace, and now they are in ``outside_nbytes``, too: the next
        one is to be measured anew.
        """
        if self._cached_beside is None:
            return False
        return outside_nbytes - self._cached_beside > _SPARE * self._budget(outside_nbytes)

    def _is_confirmed(self) -> bool:
        """Whether the last call, if nothing moved in it, took as long as its plan says; if not,
        the next one is to be measured use by use."""
        meter, self._last_still = self._last_still, None
        if meter is None or self.plan is None or not meter.marks:
            return True
        ended = meter.marks[-1].ended
        if ended is None or not ended.query():
            return True
        took = elapsed_seconds(meter.marks[0].reached, ended)
        return abs(took - self.plan.seconds) <= _AS_BEFORE * took

    def _study(self) -> None:
        """Reads what the last call measured. Waits for its end on the device, unless it went as
        planned and nothing was to be measured anew: then there is no need to know."""
        if self._last is None:
            return
        guide, meter, log, units = self._last
        self._last = None
        ended = meter.marks[-1].ended
        if not all(mark.unit in units for mark in meter.marks) or ended is None:
            return
        if not ended.query():
            if _went_as_planned(guide) and not guide.samples:
                return
            ended.synchronize()
        self._planned_calls = self._planned_calls + 1 if _went_as_planned(guide) else 0
        observed = []
        for mark in meter.marks:
            workspace, is_exact = mark.workspace_nbytes(meter.outside_nbytes)
            sampled = mark.grown_nbytes is not None
            seconds, work = mark.seconds, mark.work
            observed.append(
                Observed(mark.unit, seconds, workspace, is_exact, sampled, work, mark.forwards)
            )
        self._bandwidth = _bandwidth(log) or self._bandwidth
        forecast = self._forecast
        self._forecast = (
            forecast.updated(observed, self._steps)
            if forecast is not None
            else Forecast.of(observed, self._steps)
        )
        if not isinstance(guide, Planned):
            self._chain_peak_nbytes = _peak_of_weights_and_work(meter, observed)
            self._saw_no_peak = self.vram_nbytes is None and not self._chain_peak_nbytes
            if self._saw_no_peak and guide.samples:
                seen = max(mark.seen_nbytes for mark in meter.marks)
                self._chain_peak_nbytes = max(0, seen - meter.outside_nbytes)
                self._saw_no_peak = False

    def _make_plan(self, units: Collection[Unit], steps: int | None, outside_nbytes: int) -> None:
        nbytes, self.plan = _sizes(units), None
        if self._forecast is not None and self._asked is not None:
            before = self._asked.nbytes
            grown = {n for n in nbytes.keys() & before.keys() if nbytes[n] != before[n]}
            grown |= {u.name for u in units if any(part.name in grown for part in u.parts)}
            if grown:  # cast, or with an adapter: its activations may be others, too
                self._forecast = self._forecast.without(grown)
        forecast, is_chain = self._forecast, self.vram_nbytes is None
        if (
            forecast is None
            or not self._bandwidth
            or not set(forecast.pattern.names) <= set(nbytes)
        ):
            return
        needs = {unit.name: [other.name for other in unit.needs] for unit in units}
        if is_chain and any(needs.values()):  # cut by another pipeline, with a budget
            return
        budget = self._chain_peak_nbytes if is_chain else self._budget(outside_nbytes)
        asked = _Asked(forecast, steps, budget, self._bandwidth, nbytes)
        tolerance = _AS_BEFORE if self._planned_calls > 1 else _AS_IN_FIRST
        if self._asked is None or not self._asked.is_like(asked, tolerance, self._room_nbytes):
            self._asked, self._answer = asked, self._plan_for(asked, needs)
            answer = self._answer
            self._room_nbytes = [] if answer is None else forecast.room_nbytes(answer, steps)
        self.plan = self._answer

    def _plan_for(self, asked: _Asked, needs: Mapping[str, Seq[str]]) -> Plan | None:
        expected, is_chain = asked.forecast.expect(asked.steps), self.vram_nbytes is None
        trace, nbytes = expected.trace, asked.nbytes
        try:
            plan = expected.plan(
                nbytes,
                budget_nbytes=asked.budget_nbytes,
                bandwidth=asked.bandwidth,
                segments=_stretches(trace, nbytes) if is_chain else (),
                beside_nbytes=_beside(trace, nbytes) if is_chain else (),
                needs=needs,
                cyclic=not is_chain,
            )
        except PlanError as error:
            if not is_chain:
                said = format_nbytes(asked.budget_nbytes)
                _log.warning("No plan for a budget of %s: %s", said, error)
            return None
        # Known by bounds alone, a loop may seem not to fit in chain mode; it does.
        return None if is_chain and plan.fetched_nbytes > sum(plan.nbytes.values()) else plan


class _Asked(NamedTuple):
    """What a plan is made for."""

    forecast: Forecast
    steps: int | None
    budget_nbytes: int
    bandwidth: float
    nbytes: dict[str, int]

    def is_like(self, now: _Asked, tolerance: float, room_nbytes: Seq[int]) -> bool:
        """Whether the plan for this serves ``now`` as well; it has ``room_nbytes`` more for
        workspaces."""
        spare = _SPARE * now.budget_nbytes
        return (
            now.forecast.is_like(self.forecast, spare, tolerance, room_nbytes)
            and now.steps == self.steps
            and self.budget_nbytes <= now.budget_nbytes <= self.budget_nbytes * (1 + _SPARE)
            and now.nbytes == self.nbytes
            and abs(now.bandwidth - self.bandwidth) <= 0.02 * self.bandwidth
        )


def _peak_of_weights_and_work(meter: Meter, observed: Seq[Observed]) -> int:
    """Bytes, without what lay on the device before; 0 where torch's peak, which tells it, did not
    grow in this call."""
    uses = zip(meter.marks, observed, strict=True)
    return max(
        (mark.held_nbytes + use.workspace_nbytes for mark, use in uses if use.is_exact), default=0
    )


def opening(plan: Plan) -> tuple[list[str], float]:
    """What a cyclic ``plan`` begins with, in the order of its fetches; and how many bytes of that
    a steady cycle still has to copy when it begins."""
    fetched = [name for step in plan.steps for name in step.fetch if name in plan.resident]
    order = [name for name in plan.resident if name not in fetched] + [*dict.fromkeys(fetched)]
    ends = [span.stop_seconds for span in plan.timeline if span.kind == "copy"]
    return order, max(0.0, max(ends, default=0.0) - plan.seconds) * plan.bandwidth


def _has_ended(meter: Meter) -> bool:
    """Whether the device is done with the call."""
    ended = meter.marks[-1].ended if meter.marks else None
    return ended is not None and ended.query()


def _went_as_planned(guide: Guide) -> bool:
    return isinstance(guide, Planned) and not (guide.surprised or guide.follower.deviations)


def _sizes(units: Collection[Unit]) -> dict[str, int]:
    return {unit.name: unit.nbytes for unit in units}


def _stretches(trace: Seq[str], nbytes: Mapping[str, int]) -> list[str]:
    """A name for each use in ``trace``: its unit and the number of its stage.

    To a plan for chain mode, a unit is another one in each stage: so it is released after each.
    """
    stages = stages_of(trace, nbytes)
    return [f"{name} in stage {stage + 1}" for name, stage in zip(trace, stages, strict=True)]


def _beside(trace: Seq[str], nbytes: Mapping[str, int]) -> list[int]:
    """For each use in ``trace``, the bytes of the others in its stage."""
    stages = stages_of(trace, nbytes)
    members: dict[int, set[str]] = {}
    for name, stage in zip(trace, stages, strict=True):
        members.setdefault(stage, set()).add(name)
    total = {stage: sum(nbytes[name] for name in names) for stage, names in members.items()}
    return [total[stage] - nbytes[name] for name, stage in zip(trace, stages, strict=True)]


def _bandwidth(log: deque[Event]) -> float:
    """Bytes a second of the copies in ``log`` that have ended; 0.0 if none could be timed."""
    nbytes, seconds = 0, 0.0
    for event in log:
        if event.fetch is not None and event.fetch.has_landed:
            took = event.fetch.seconds
            if took > 0:
                nbytes, seconds = nbytes + event.nbytes, seconds + took
    return nbytes / seconds if seconds else 0.0
