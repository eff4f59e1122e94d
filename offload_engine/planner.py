"""Which guide leads a call: from what the calls before cost to the plan of the next."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from .errors import PlanError
from .forecast import Forecast, Observed
from .guide import Careful, Chain, Guide, Planned
from .measure import Meter
from .plan import Plan
from .residency import Event
from .sequence import stages_of
from .units import format_nbytes

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
        self._planned_for: tuple[Forecast, int | None, int, float, dict[str, int]] | None = None
        self._last: tuple[Guide, Meter, deque[Event], frozenset[str]] | None = None

    def guide(
        self,
        chain: Callable[[], Chain],
        nbytes: Mapping[str, int],
        steps: int | None,
        meter: Meter,
        *,
        solo: bool,
    ) -> Guide:
        """The guide of a call that begins."""
        self._study()
        self._steps = steps
        self.outside_nbytes = min(self.outside_nbytes, meter.outside_nbytes)
        if self.vram_nbytes is None and solo:
            self.plan = None
        else:
            self._make_plan(nbytes, steps, meter.outside_nbytes)
        self.plan_of_last_call = self.plan
        if self.plan is not None and self._forecast is not None:
            expected = self._forecast.expect(steps)
            unit_of = None
            if self.vram_nbytes is None:
                unit_of = dict(zip(_stretches(expected.trace, nbytes), expected.trace, strict=True))
            return Planned(self.plan, expected.trace, expected.works, unit_of)
        return self.guide_by_hand(chain, nbytes, meter)

    def guide_by_hand(
        self, chain: Callable[[], Chain], nbytes: Mapping[str, int], meter: Meter
    ) -> Guide:
        """The guide of what runs without a plan."""
        if self.vram_nbytes is None:
            return chain()
        if self._forecast is not None:
            for name, known in self._forecast.known_workspaces().items():
                meter.workspaces.setdefault(name, known)
        return Careful(nbytes, self._budget(meter.outside_nbytes), meter.workspaces)

    def ended(self, guide: Guide, meter: Meter, log: deque[Event], units: frozenset[str]) -> None:
        """A call that ``guide`` led came to its end."""
        if not guide.is_still:  # such a call shows each unit once
            self._last = (guide, meter, log, units)

    def prepare(self, nbytes: Mapping[str, int], outside_nbytes: int) -> Plan | None:
        """The plan for the next call, if it is to be like the last one."""
        self._study()
        self._make_plan(nbytes, self._steps, outside_nbytes)
        return self.plan

    # ---- inside

    def _budget(self, outside_nbytes: int) -> int:
        """Bytes for weights and workspaces. What is on the device since attaching, such as results
        that the user keeps, counts as well."""
        assert self.vram_nbytes is not None
        return max(1, self.vram_nbytes - max(0, outside_nbytes - self.outside_nbytes))

    def _study(self) -> None:
        """Reads what the last call measured; waits for its end on the device."""
        if self._last is None:
            return
        guide, meter, log, units = self._last
        self._last = None
        if not all(mark.unit in units for mark in meter.marks):
            return
        observed = []
        for mark in meter.marks:
            workspace, is_exact = mark.workspace_nbytes(meter.outside_nbytes)
            observed.append(
                Observed(mark.unit, mark.seconds, workspace, is_exact, mark.work, mark.forwards)
            )
        self._bandwidth = _bandwidth(log) or self._bandwidth
        forecast = self._forecast
        self._forecast = (
            forecast.updated(observed, self._steps)
            if forecast is not None
            else Forecast.of(observed, self._steps)
        )
        if not isinstance(guide, Planned):
            # Torch's peak is that of this call only if it grew in it.
            self._chain_peak_nbytes = max(
                (
                    mark.held_nbytes + use.workspace_nbytes
                    for mark, use in zip(meter.marks, observed, strict=True)
                    if use.is_exact
                ),
                default=0,
            )

    def _make_plan(self, nbytes: Mapping[str, int], steps: int | None, outside_nbytes: int) -> None:
        forecast = self._forecast
        if (
            forecast is None
            or not self._bandwidth
            or not set(forecast.pattern.names) <= set(nbytes)
        ):
            self.plan = None
            return
        is_chain = self.vram_nbytes is None
        budget = self._chain_peak_nbytes if is_chain else self._budget(outside_nbytes)
        asked = (forecast, steps, budget, self._bandwidth, dict(nbytes))
        if self.plan is not None and _is_same(self._planned_for, asked):
            return
        expected = forecast.expect(steps)
        try:
            self.plan = expected.plan(
                nbytes,
                budget_nbytes=budget,
                bandwidth=self._bandwidth,
                segments=_stretches(expected.trace, nbytes) if is_chain else (),
                cyclic=not is_chain,
            )
            self._planned_for = asked
        except PlanError as error:
            self.plan = None
            if not is_chain:
                _log.warning("No plan for a budget of %s: %s", format_nbytes(budget), error)


def opening(plan: Plan) -> tuple[list[str], float]:
    """What a cyclic ``plan`` begins with, in the order of its fetches; and how many bytes of that
    a steady cycle still has to copy when it begins."""
    fetched = [name for step in plan.steps for name in step.fetch if name in plan.resident]
    order = [name for name in plan.resident if name not in fetched] + [*dict.fromkeys(fetched)]
    ends = [span.stop_seconds for span in plan.timeline if span.kind == "copy"]
    return order, max(0.0, max(ends, default=0.0) - plan.seconds) * plan.bandwidth


def _stretches(trace: Seq[str], nbytes: Mapping[str, int]) -> list[str]:
    """A name for each use in ``trace``: its unit and the number of its stage.

    To a plan for chain mode, a unit is another one in each stage: so it is released after each.
    """
    stages = stages_of(trace, nbytes)
    return [f"{name} in stage {stage + 1}" for name, stage in zip(trace, stages, strict=True)]


def _is_same(
    before: tuple[Forecast, int | None, int, float, dict[str, int]] | None,
    now: tuple[Forecast, int | None, int, float, dict[str, int]],
) -> bool:
    """Whether a plan made for ``before`` serves ``now``."""
    return (
        before is not None
        and now[0].is_like(before[0])
        and now[1:3] == before[1:3]
        and now[4] == before[4]
        and abs(now[3] - before[3]) <= 0.02 * before[3]
    )


def _bandwidth(log: deque[Event]) -> float:
    """Bytes a second of the copies in ``log``; 0.0 if there were none that could be timed."""
    nbytes, seconds = 0, 0.0
    for event in log:
        if event.fetch is not None:
            took = event.fetch.seconds
            if took > 0 and not event.fetch.to_queue:
                nbytes, seconds = nbytes + event.nbytes, seconds + took
    return nbytes / seconds if seconds else 0.0
