"""What the next call will do and cost, from what the last ones showed."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.errors import PlanError
from offload_engine.forecast import Expected, Forecast, Observed

SIZES = {"te": 30, "unet": 100, "vae": 20, "controlnet": 50}


def use(unit, seconds=1.0, workspace=0, is_exact=True, is_sampled=False, work=1, forwards=1):
    return Observed(
        unit=unit,
        seconds=seconds,
        workspace_nbytes=workspace,
        is_exact=is_exact,
        is_sampled=is_sampled,
        work=work,
        forwards=forwards,
    )


def bound(unit, workspace, **more):
    return use(unit, workspace=workspace, is_exact=False, **more)


class Predicted(NamedTuple):
    """A use in the plan for a call to come."""

    unit: str
    seconds: float
    workspace_nbytes: int
    work: int
    is_exact: bool


def predicted(forecast, steps=None):
    """The uses that a plan without any limits has."""
    expected = forecast.expect(steps)
    plan = expected.plan(SIZES, budget_nbytes=10**6, bandwidth=1e9)
    exact = [cost.least_nbytes == cost.workspace_nbytes for cost in expected.costs]
    more = zip(expected.works, exact, strict=True)
    return [
        Predicted(use.segments[-1], use.seconds, use.workspace_nbytes, *each)
        for use, each in zip(plan.uses, more, strict=True)
    ]


def seconds_of(forecast, steps=None):
    return [use.seconds for use in predicted(forecast, steps)]


def cost_of(forecast, unit):
    """The first use of ``unit``."""
    return next(use for use in predicted(forecast) if use.unit == unit)


def after(*calls, steps=None):
    """The forecast after some calls, each a list of uses."""
    forecast = Forecast.of(calls[0], steps)
    for call in calls[1:]:
        forecast = forecast.updated(call, steps)
    return forecast


def image(seconds=2.0, steps=4, unet=10):
    """A call in which one use of the unet has all steps."""
    return [
        use("te", 1.0, 5),
        use("unet", seconds * steps, unet, forwards=steps),
        use("vae", 1.0, 7),
    ]


# ---- the workspace


def test_the_uses_of_one_loop_share_a_cost():
    loop = [use("controlnet", 1.0, 5), use("unet", 2.0, 9)] * 4
    forecast = after([use("te"), *loop, use("vae")])
    assert str(forecast.pattern) == "te->4*(controlnet->unet)->vae"
    cost = cost_of(forecast, "unet")
    assert cost == ("unet", 2.0, 9, 1, True)
    assert len(forecast.expect(None).trace) == 10


def test_the_seconds_of_a_loop_are_the_median_so_that_one_stall_does_not_count():
    uses = [use("unet", seconds) for seconds in (9.0, 2.0, 2.0, 2.5)]
    uses = [part for unet in uses for part in (use("te"), unet)]
    assert cost_of(after(uses), "unet").seconds == 2.25


def test_the_last_use_in_a_loop_may_be_longer_than_the_others():
    """It runs into what follows: a preview after each step, then the image."""
    uses = [part for vae in (1.0, 1.0, 1.0, 2.0) for part in (use("unet"), use("vae", vae))]
    forecast = after([use("te"), *uses], [use("te"), *uses], steps=4)
    assert sum(seconds_of(forecast)) == 10.0
    assert sum(seconds_of(forecast, 8)) == 18.0


def test_of_exact_workspaces_the_largest_counts():
    call = [use("te"), use("unet", workspace=7), use("te"), use("unet", workspace=9)]
    cost = cost_of(after(call), "unet")
    assert (cost.workspace_nbytes, cost.is_exact) == (9, True)


def test_what_is_exact_for_one_use_is_not_so_for_the_others():
    call = [use("te"), bound("unet", 70), use("te"), use("unet", workspace=9)]
    assert cost_of(after(call), "unet").workspace_nbytes == 70
    call = [use("te"), bound("unet", 3), use("te"), use("unet", workspace=9)]
    assert cost_of(after(call), "unet").workspace_nbytes == 9


def test_of_mere_bounds_the_lowest_counts():
    call = [use("te"), bound("unet", 70), use("te"), bound("unet", 50)]
    cost = cost_of(after(call), "unet")
    assert (cost.workspace_nbytes, cost.is_exact) == (50, False)


def test_a_bound_that_is_no_better_changes_nothing():
    cost = cost_of(after([bound("unet", 50)], [bound("unet", 70)]), "unet")
    assert cost.workspace_nbytes == 50


def test_a_lower_bound_replaces_a_higher():
    assert cost_of(after([bound("unet", 70)], [bound("unet", 50)]), "unet").workspace_nbytes == 50


def test_a_bound_does_not_replace_what_is_known_to_the_byte():
    cost = cost_of(after([use("unet", workspace=40)], [bound("unet", 70)]), "unet")
    assert (cost.workspace_nbytes, cost.is_exact) == (40, True)


def test_an_exact_workspace_replaces_a_bound():
    cost = cost_of(after([bound("unet", 70)], [use("unet", workspace=40)]), "unet")
    assert (cost.workspace_nbytes, cost.is_exact) == (40, True)


def test_an_exact_workspace_that_grew_is_believed():
    cost = cost_of(after([use("unet", workspace=40)], [use("unet", workspace=60)]), "unet")
    assert (cost.workspace_nbytes, cost.is_exact) == (60, True)


def test_larger_work_begins_anew():
    calls = [use("unet", workspace=40, work=1)], [bound("unet", 90, work=4)]
    cost = cost_of(after(*calls), "unet")
    assert (cost.workspace_nbytes, cost.work, cost.is_exact) == (90, 4, False)


@pytest.mark.parametrize("make", [use, bound])
def test_a_smaller_call_does_not_lower_what_a_larger_one_needs(make):
    large, small = use("unet", workspace=90, work=4), make("unet", workspace=20, work=1)
    cost = cost_of(after([large], [small]), "unet")
    assert (cost.workspace_nbytes, cost.work) == (90, 4)
    cost = cost_of(after([small], [large], [small]), "unet")
    assert (cost.workspace_nbytes, cost.work) == (90, 4)


def test_a_unit_is_known_by_its_most_work_and_its_largest_workspace():
    """A vae that encodes has more work than one that decodes, and needs less."""
    calls = [use("vae", workspace=8, work=9), use("unet"), use("vae", workspace=30, work=2)]
    assert after(calls).known_workspaces() == {"vae": (9, 30), "unet": (1, 0)}
    longer = [bound("vae", 50, work=9), *[bound("unet", 50)] * 2, bound("te", 1)]
    forecast = after(calls, [*longer, bound("vae", 50, work=2)])
    assert [c.workspace_nbytes for c in forecast.costs if c.work == 9] == [30, 30]


def test_a_shorter_call_does_not_lower_what_a_longer_one_needs():
    """The first round of a loop has no result of the one before beside it."""
    long = [use("te"), use("unet", workspace=40), use("unet", workspace=50)]
    for short in ([use("te"), use("unet", workspace=40)], [use("unet", workspace=40)]):
        forecast = Forecast.of(long, 2).updated(short, 1)
        assert cost_of(forecast, "unet").workspace_nbytes == 50
        assert forecast.most_steps == 2


def test_another_order_keeps_what_is_known_about_each_unit():
    forecast = after(
        [use("te", workspace=3), use("unet", workspace=40, work=4)],
        [bound("unet", 60, work=4), bound("te", 2), bound("vae", 9)],
    )
    assert forecast.pattern.trace == ["unet", "te", "vae"]
    assert forecast.known_workspaces() == {"unet": (4, 40), "te": (1, 2), "vae": (1, 9)}


@given(
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.booleans(), st.integers(0, 50)), min_size=1, max_size=6
    )
)
@settings(max_examples=200, deadline=None)
def test_the_workspace_is_never_below_what_the_largest_call_takes(calls):
    """Exact measures tell it to the byte, others say more; a smaller call explains no larger."""

    def call(work, is_exact, slack):
        return [use("unet", 1.0, 10 * work + (0 if is_exact else slack), is_exact, work=work)]

    most = max(work for work, _, _ in calls)
    cost = cost_of(after(*[call(*each) for each in calls]), "unet")
    assert cost.work == most
    slacks = [0 if is_exact else slack for work, is_exact, slack in calls if work == most]
    assert cost.workspace_nbytes == 10 * most + min(slacks)


# ---- the seconds


def test_of_the_times_of_two_calls_the_shorter_counts_since_the_other_has_waited():
    assert cost_of(after([use("unet", 3.0)], [use("unet", 2.0)]), "unet").seconds == 2.0
    assert cost_of(after([use("unet", 2.0)], [use("unet", 3.0)]), "unet").seconds == 2.0


def test_a_unit_that_has_become_slower_is_believed_the_second_time():
    assert cost_of(after([use("unet", 2.0)], *[[use("unet", 3.0)]] * 2), "unet").seconds == 3.0


def test_larger_work_has_a_time_of_its_own():
    calls = [use("unet", 2.0, work=1)], [use("unet", 8.0, work=4)]
    assert cost_of(after(*calls), "unet").seconds == 8.0


# ---- steps


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
def test_a_loop_runs_once_for_each_step(steps):
    loop = [use("controlnet", 0.5), use("unet", 2.0)] * 4
    forecast = after([use("te"), *loop, use("vae")], steps=4)
    assert list(forecast.expect(steps).trace) == ["te", *["controlnet", "unet"] * steps, "vae"]
    assert sum(seconds_of(forecast, steps)) == 2.5 * steps + 2


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
def test_a_use_with_a_forward_for_each_step_takes_as_much_longer(steps):
    forecast = after(image(steps=4), steps=4)
    assert forecast.expect(steps).trace == ("te", "unet", "vae")
    assert seconds_of(forecast, steps) == [1.0, 2.0 * steps, 1.0]


def test_two_forwards_for_each_step_count_as_two():
    assert seconds_of(after([use("unet", 8.0, forwards=8)], steps=4), 10) == [20.0]


def test_what_does_not_go_with_the_steps_stays_as_it_is():
    forecast = after([use("te", forwards=3), use("unet", 8.0, forwards=4)], steps=4)
    assert seconds_of(forecast, 8) == [1.0, 16.0]


@pytest.mark.parametrize("unknown", [None, 0])
def test_a_number_of_steps_that_is_not_known_means_as_many_as_before(unknown):
    forecast = after(image(), steps=4)
    assert forecast.expect(unknown) == forecast.expect(4)
    forecast = after(image(), steps=unknown)
    assert forecast.expect(9) == forecast.expect(None)


def test_a_call_with_another_number_of_steps_is_taken_in_by_what_it_shows_per_step():
    forecast = Forecast.of(image(2.0, steps=4), 4)
    for steps in (8, 2, 1, 4):
        forecast = forecast.updated(image(2.0, steps=steps), steps)
        assert seconds_of(forecast, steps) == [1.0, 2.0 * steps, 1.0]
        assert seconds_of(forecast, 4) == [1.0, 8.0, 1.0]
        assert seconds_of(forecast, 10) == [1.0, 20.0, 1.0]


def test_forwards_that_were_not_counted_are_those_known_from_before():
    """Only a careful call counts them; a planned one lets all but the first pass unseen."""
    forecast = Forecast.of(image(2.0, steps=4), 4)
    for steps in (8, 8, 2, 4, 4):
        call = [part._replace(forwards=0) for part in image(2.0, steps=steps)]
        forecast = forecast.updated(call, steps)
        assert seconds_of(forecast, 10) == [1.0, 20.0, 1.0]


def test_a_call_with_another_number_of_rounds_is_explained_by_the_pattern():
    def call(steps):
        return [use("te"), *[use("controlnet"), use("unet", 2.0, 9)] * steps, use("vae")]

    forecast = Forecast.of(call(4), 4)
    for steps in (9, 1, 2, 4):
        forecast = forecast.updated(call(steps), steps)
        assert str(forecast.pattern) == "te->4*(controlnet->unet)->vae"
        assert len(forecast.expect(steps).trace) == 2 * steps + 2


def test_a_call_that_the_pattern_does_not_explain_makes_a_new_one():
    forecast = Forecast.of(image(), 4).updated([use("te"), use("vae")], 7)
    assert (forecast.pattern.trace, forecast.steps) == (["te", "vae"], 7)


# ---- is it as before?


def is_like(one, other, spare_nbytes=0, tolerance=0.02, room_nbytes=()):
    return one.is_like(other, spare_nbytes, tolerance, room_nbytes)


def test_a_forecast_is_like_itself_and_like_one_a_little_slower():
    forecast = after(image(2.0), steps=4)
    assert is_like(forecast, forecast)
    assert is_like(after(image(2.02), steps=4), forecast)
    assert not is_like(after(image(2.2), steps=4), forecast)
    assert is_like(after(image(2.2), steps=4), forecast, tolerance=0.2)


def test_other_steps_another_pattern_or_more_memory_are_not_alike():
    forecast = after(image(), steps=4)
    assert not is_like(after(image(), steps=5), forecast)
    assert not is_like(after(image()[:2], steps=4), forecast)
    assert not is_like(after(image(unet=11), steps=4), forecast)
    large = [part._replace(work=2) for part in image()]
    assert not is_like(after(large, steps=4), forecast)


def test_less_memory_is_alike_until_there_is_something_to_gain():
    forecast = after(image(unet=100), steps=4)
    less = after(image(unet=90), steps=4)
    assert is_like(less, forecast, 10) and is_like(less, forecast, 50)
    assert not is_like(less, forecast, 9)
    assert not is_like(forecast, less, 50)


def test_more_memory_is_alike_while_the_plan_has_room_for_it():
    forecast = after([use("te", workspace=5), *[use("unet", workspace=100)] * 3])
    nbytes = {"te": 10, "unet": 40}
    plan = forecast.expect(None).plan(nbytes, budget_nbytes=160, bandwidth=1.0, cyclic=True)
    room = forecast.room_nbytes(plan, None)
    assert room == [160 - 50 - 5, 160 - 50 - 100]
    for more, is_alike in ((10, True), (11, False)):
        now = after([use("te", workspace=5), *[use("unet", workspace=100 + more)] * 3])
        assert is_like(now, forecast, room_nbytes=room) == is_alike
        assert not is_like(now, forecast)


# ---- the plan for it


def expected_of(*uses):
    return after(list(uses)).expect(None)


def test_the_plan_has_a_use_for_each_in_the_trace():
    expected = expected_of(use("te", 1.0, 5), use("unet", 4.0, 10), use("vae", 1.0, 7))
    assert isinstance(expected, Expected) and expected.works == [1, 1, 1]
    plan = expected.plan(SIZES, budget_nbytes=130, bandwidth=10.0, cyclic=True)
    assert [u.segments for u in plan.uses] == [("te",), ("unet",), ("vae",)]
    assert [u.workspace_nbytes for u in plan.uses] == [5, 10, 7]
    assert plan.cyclic and plan.budget_nbytes == 130 and plan.peak_nbytes <= 130


def test_segments_may_have_names_of_their_own():
    expected = expected_of(use("vae"), use("unet"), use("vae"))
    names = ("vae in stage 1", "unet in stage 2", "vae in stage 3")
    plan = expected.plan(SIZES, budget_nbytes=130, bandwidth=10.0, segments=names)
    assert [u.segments for u in plan.uses] == [(name,) for name in names]
    assert plan.nbytes == {names[0]: 20, names[1]: 100, names[2]: 20}
    assert plan.fetched_nbytes == 140


def test_a_bound_too_high_for_the_budget_is_taken_to_fill_it():
    plan = expected_of(bound("unet", 90)).plan(SIZES, budget_nbytes=130, bandwidth=10.0)
    assert plan.uses[0].workspace_nbytes == 30
    plan = expected_of(bound("unet", 90)).plan(SIZES, budget_nbytes=230, bandwidth=10.0)
    assert plan.uses[0].workspace_nbytes == 90


def test_what_is_known_to_need_more_than_the_budget_is_refused():
    expected = expected_of(use("unet", workspace=40))
    with pytest.raises(PlanError, match="unet") as error:
        expected.plan(SIZES, budget_nbytes=139, bandwidth=10.0)
    assert (error.value.needed_nbytes, error.value.budget_nbytes) == (140, 139)
    expected = expected_of(bound("unet", 40))
    with pytest.raises(PlanError, match="unet"):
        expected.plan(SIZES, budget_nbytes=99, bandwidth=10.0)


def test_a_unit_without_weights_can_be_planned():
    plan = expected_of(use("te"), use("unet")).plan(
        {"te": 0, "unet": 100}, budget_nbytes=101, bandwidth=10.0, cyclic=True
    )
    assert plan.seconds == 2.0
