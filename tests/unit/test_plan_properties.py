"""Whatever the question: the plan is legal, its predictions are true, its bound is below it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.instances import Instance
from offload_engine.plan import Use

from .test_plan import plan_of
from .test_plan_quality import assert_replays


@st.composite
def instances(draw, segments=12, length=40, real=False):
    """Any segments, uses of any of them, a budget from just enough to more than all."""
    sizes = st.floats(0.01, 100) if real else st.integers(1, 100)
    names = [f"s{i}" for i in range(draw(st.integers(1, segments)))]
    nbytes = {name: draw(sizes) for name in names}
    amount = st.floats(0, 20, width=32) if real else st.integers(0, 20)
    use = st.builds(
        lambda some, seconds, workspace: Use(tuple(some), seconds, workspace),
        st.lists(st.sampled_from(names), max_size=3, unique=True),
        amount,
        amount,
    )
    body = draw(st.lists(use, min_size=1, max_size=length // 4))
    uses = draw(st.lists(use, max_size=4)) + body * draw(st.integers(1, 4))
    uses += draw(st.lists(use, max_size=4))
    least = max(sum(nbytes[name] for name in use.segments) + use.workspace_nbytes for use in uses)
    spare = sum(nbytes.values()) * draw(st.sampled_from([0, 0.1, 0.3, 0.6, 1]))
    budget = max(1, least + spare)
    resident = tuple(draw(st.lists(st.sampled_from(names), max_size=4, unique=True)))
    bandwidth = draw(st.sampled_from([0.1, 1.0, 3.0, 10.0, 1e3]))
    return Instance(nbytes, uses, budget if real else int(budget), bandwidth, resident)


@pytest.mark.parametrize("cyclic", [False, True])
@given(instance=instances())
@settings(max_examples=150, deadline=None)
def test_plans_are_legal_and_keep_their_word(cyclic, instance):
    plan = plan_of(instance, cyclic=cyclic)
    assert_replays(plan, instance, cyclic)
    assert plan.stall_seconds == pytest.approx(
        plan.seconds - sum(use.seconds for use in instance.uses), abs=1e-6
    )


@given(instance=instances(real=True), cyclic=st.booleans())
@settings(max_examples=100, deadline=None)
def test_real_sizes_are_as_good_as_whole_ones(instance, cyclic):
    assert_replays(plan_of(instance, cyclic=cyclic), instance, cyclic)


@given(instance=instances(segments=6, length=20))
@settings(max_examples=60, deadline=None)
def test_with_more_budget_or_bandwidth_no_bound_is_above_what_was_reached_with_less(instance):
    reached = plan_of(instance).seconds * (1 + 1e-9)
    wider = instance._replace(bandwidth=2 * instance.bandwidth)
    larger = instance._replace(budget=instance.budget + 50)
    for other in (instance, wider, larger):
        assert plan_of(other).bound_seconds <= reached


@given(instance=instances(segments=8, length=16))
@settings(max_examples=60, deadline=None)
def test_nothing_is_fetched_that_no_use_needs(instance):
    plan = plan_of(instance)
    waiting = set()
    for use, step in zip(plan.uses, plan.steps, strict=True):
        assert not waiting.intersection(step.release)
        waiting.update(step.fetch)
        waiting.difference_update(use.segments)
    assert not waiting


@given(instance=instances(), cyclic=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_plan_can_be_explained(instance, cyclic):
    plan = plan_of(instance, cyclic=cyclic)
    assert f"{len(plan.uses)} uses" in plan.explain()
    assert len(plan.timeline) >= len(plan.uses)
