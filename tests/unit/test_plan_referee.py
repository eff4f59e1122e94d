"""A second opinion for the planner's tests, sharing no code with it.

`replay` runs a plan in the planning model, rule by rule. `optimum` (benchmarks.instances) is held
against plain enumeration here.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, permutations
from math import inf
from typing import NamedTuple

import pytest

from benchmarks.instances import Instance, anything, optimum
from offload_engine.plan import Plan, Use


class Replay(NamedTuple):
    """What came out of running a plan; of the last cycle, if it is cyclic."""

    seconds: float
    peak: float
    fetched: float


def replay(plan: Plan, instance: Instance, cyclic: bool = False, cycles: int = 12) -> Replay:
    """Run ``plan`` in the model; asserts that every step is legal."""
    nbytes, uses, budget, bandwidth, resident = instance
    slack = 1e-9 * max(1.0, abs(budget))
    assert len(plan.steps) == len(uses)
    start = _start_of_cycle(plan, uses) if cyclic else set(resident)
    landing = dict.fromkeys(start, 0.0)  # of every segment that is there or in flight
    now, link_free, ends = 0.0, 0.0, [0.0]
    for _ in range(cycles if cyclic else 1):
        peak = fetched = 0
        for use, step in zip(uses, plan.steps, strict=True):
            for name in step.release:
                assert name in landing, f"{name} is released while away"
                assert landing[name] <= now + 1e-9, f"{name} is released in flight"
                del landing[name]
            for name in step.fetch:
                assert name not in landing, f"{name} is fetched twice"
                link_free = max(now, link_free) + nbytes[name] / bandwidth
                landing[name] = link_free
                fetched += nbytes[name]
            taken = sum(nbytes[name] for name in landing) + use.workspace_nbytes
            assert taken <= budget + slack, f"{taken} over {budget}"
            peak = max(peak, taken)
            now = max([now, *(landing[name] for name in use.segments)]) + use.seconds
        ends.append(now)
    assert not cyclic or set(landing) == start, "the cycle ends with other residents"
    seconds = (ends[-1] - ends[2]) / (cycles - 2) if cyclic else now
    return Replay(seconds, peak if uses else 0, fetched if uses else 0)


def _start_of_cycle(plan: Plan, uses: list) -> set:
    """What a cyclic plan must begin with: all that it uses or releases before it fetches it."""
    first: dict[str, str] = {}
    for use, step in zip(uses, plan.steps, strict=True):
        for kind, names in (("r", step.release), ("f", step.fetch), ("u", use.segments)):
            for name in names:
                first.setdefault(name, kind)
    return {name for name, kind in first.items() if kind != "f"}


def enumerated(instance: Instance) -> float:
    """The least seconds, by trying every release and every order of fetches at every step."""
    nbytes, uses, budget, bandwidth, resident = instance

    @cache
    def rest(position: int, state: frozenset, link: float) -> float:
        if position == len(uses):
            return 0.0
        use, times, best = uses[position], dict(state), inf
        landed = [name for name, wait in times.items() if wait <= 0]
        for released in _subsets(landed):
            kept = {name: wait for name, wait in times.items() if name not in released}
            for fetched in _sequences([name for name in nbytes if name not in kept]):
                held = {**kept}
                free = link
                for name in fetched:
                    free += nbytes[name] / bandwidth
                    held[name] = free
                taken = sum(nbytes[name] for name in held) + use.workspace_nbytes
                if taken > budget * (1 + 1e-12) or not held.keys() >= set(use.segments):
                    continue
                spent = max([0.0, *(held[name] for name in use.segments)]) + use.seconds
                later = {name: max(0.0, round(wait - spent, 9)) for name, wait in held.items()}
                left = max(0.0, round(free - spent, 9))
                best = min(best, spent + rest(position + 1, frozenset(later.items()), left))
        return best

    return rest(0, frozenset((name, 0.0) for name in resident), 0.0)


def _subsets(items: list):
    return (some for count in range(len(items) + 1) for some in combinations(items, count))


def _sequences(items: list):
    return (some for count in range(len(items) + 1) for some in permutations(items, count))


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_the_optimum_is_that_of_plain_enumeration(first):
    for seed in range(first, first + 100):
        instance = anything(seed, segments=4, length=5)
        assert optimum(instance) == pytest.approx(enumerated(instance), abs=1e-6), seed


def test_a_replay_follows_the_model():
    steps = ((), ("a", "b")), (("a",), ("c",)), ((), ())
    plan = type(
        "Steps", (), {"steps": [type("S", (), {"release": r, "fetch": f}) for r, f in steps]}
    )
    uses = [Use(("a",), 1.0, 10), Use(("b",), 5.0), Use(("c",), 1.0)]
    instance = Instance({"a": 10, "b": 20, "c": 30}, uses, 60, 10.0)
    # a lands at 1, b at 3; c is queued at 2, copied from 3 to 6, while b runs from 3 to 8
    assert replay(plan, instance) == Replay(seconds=9.0, peak=50, fetched=60)


def test_a_replay_refuses_what_the_model_forbids():
    def plan(*steps):
        made = [type("S", (), {"release": r, "fetch": f}) for r, f in steps]
        return type("Steps", (), {"steps": made})

    uses = [Use(("a",), 0.1), Use(("a",), 1.0)]
    instance = Instance({"a": 10, "b": 20}, uses, 30, 10.0)
    for match, steps in {
        "in flight": (((), ("a", "b")), (("b",), ())),
        "while away": (((), ("a",)), (("b",), ())),
        "twice": (((), ("a",)), ((), ("a",))),
    }.items():
        with pytest.raises(AssertionError, match=match):
            replay(plan(*steps), instance)
    with pytest.raises(AssertionError, match="over"):
        replay(plan(((), ("a", "b")), ((), ())), instance._replace(budget=29))
