"""What is released and what is fetched at each switch, by each guide; and that it always fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.guide import Careful, Chain, Planned
from offload_engine.plan import Use, build_plan
from offload_engine.sequence import Cursor, parse, stages_of

SIZES = {"te": 30, "te2": 40, "controlnet": 50, "unet": 100, "vae": 20}


class Device:
    """What a guide sees, and what it leaves behind."""

    def __init__(self, sizes=SIZES, here=()):
        self.sizes = dict(sizes)
        self.here = {name: self.sizes[name] for name in here}

    def enter(self, guide, name, work=1):
        """Carries a move out, having looked at whether it can be; what was (released, fetched)."""
        move = guide.enter(name, work, dict(self.here))
        release, fetch = list(move.release), list(move.fetch)
        assert len(set(release)) == len(release) and len(set(fetch)) == len(fetch)
        assert name not in release or name in fetch
        for other in release:
            del self.here[other]  # it was there
        for other in fetch:
            assert other not in self.here, f"{other} is there already"
            self.here[other] = self.sizes[other]
        assert name in self.here
        return release, fetch

    @property
    def nbytes(self):
        return sum(self.here.values())


# ---- chain mode, the first call


def table(workspaces):
    return lambda name: workspaces.get(name, (-1, 0))


def test_chain_keeps_one_stage_at_a_time():
    guide, device = Chain(Cursor(parse("te->controlnet+unet->vae"))), Device()
    moves = [device.enter(guide, name) for name in ("te", "controlnet", "unet", "controlnet")]
    assert moves == [([], ["te"]), (["te"], ["controlnet"]), ([], ["unet"]), ([], [])]
    release, fetch = device.enter(guide, "vae")
    assert (sorted(release), fetch) == (["controlnet", "unet"], ["vae"])
    assert not guide.is_still and not guide.watches_forwards


# ---- careful


def careful(budget, **workspaces):
    return Careful(SIZES, budget, table(workspaces))


def test_a_unit_that_was_not_measured_runs_alone():
    guide, device = careful(1000), Device(here=["te", "te2"])
    assert device.enter(guide, "unet") == (["te", "te2"], ["unet"])
    assert device.enter(guide, "unet") == ([], [])


def test_beside_a_unit_that_was_measured_others_stay_while_there_is_room():
    guide, device = careful(150, unet=(1, 10)), Device(here=["te", "vae"])
    assert device.enter(guide, "unet") == (["te"], ["unet"])
    guide, device = careful(160, unet=(1, 10)), Device(here=["te", "vae"])
    assert device.enter(guide, "unet") == ([], ["unet"])


def test_more_to_do_than_was_measured_is_not_measured():
    guide, device = careful(1000, unet=(5, 10)), Device(here=["te", "unet"])
    assert device.enter(guide, "unet", work=6) == (["te"], [])
    device = Device(here=["te", "unet"])
    assert device.enter(guide, "unet", work=5) == ([], [])


def test_what_is_measured_during_the_call_counts_from_then_on():
    workspaces = {}
    guide, device = Careful(SIZES, 1000, table(workspaces)), Device()
    for name in ("controlnet", "unet"):
        device.enter(guide, name)
        workspaces[name] = (1, 10)
    device.enter(guide, "controlnet")
    for name in ("controlnet", "unet") * 3:
        assert device.enter(guide, name) == ([], [])


def test_what_another_pipeline_left_goes_first():
    guide = careful(190, unet=(1, 10), te=(1, 0))
    device = Device({**SIZES, "theirs": 45})
    device.enter(guide, "te")
    device.here["theirs"] = 45
    assert device.enter(guide, "unet") == ([], ["unet"])
    del device.here["unet"]
    guide = careful(184, unet=(1, 10), te=(1, 0))
    device.enter(guide, "te")
    assert device.enter(guide, "unet") == (["theirs"], ["unet"])


def test_in_a_loop_what_has_just_run_goes_first():
    guide = careful(170, te=(1, 0), te2=(1, 0), unet=(1, 0))
    device = Device()
    for name in ("te", "te2"):
        device.enter(guide, name)
    assert device.enter(guide, "unet")[0] == []
    device.here["vae"] = 20  # never run in this call
    assert device.enter(guide, "unet")[0] == ["vae"]
    guide = careful(140, te=(1, 0), te2=(1, 0), unet=(1, 0))
    device = Device()
    for name in ("te", "te2"):
        device.enter(guide, name)
    assert device.enter(guide, "unet")[0] == ["te2"]


# ---- planned


def plan_for(trace, budget, workspaces=None, bandwidth=10.0, **options):
    uses = [Use((name,), 1.0, (workspaces or {}).get(name, 0)) for name in trace]
    sizes = {name: SIZES[name] for name in trace}
    return build_plan(sizes, uses, budget_nbytes=budget, bandwidth=bandwidth, **options)


def planned(plan, trace, works=None, otherwise=None):
    works = works or [1] * len(trace)
    otherwise = otherwise or Careful(SIZES, plan.budget_nbytes, table({}))
    return Planned(plan, trace, works, otherwise)


USUAL = ["te", "te2", "unet", "vae"]


def test_a_call_as_it_was_planned_gets_the_steps_of_the_plan():
    plan = plan_for(USUAL, 140, cyclic=True)
    assert plan.fetched_nbytes > 0
    guide, device = planned(plan, USUAL), Device(here=plan.resident)
    for name, step in zip(USUAL, plan.steps, strict=True):
        release, fetch = device.enter(guide, name)
        assert (sorted(release), fetch) == (sorted(step.release), list(step.fetch))
    assert set(device.here) == set(plan.resident)
    assert not guide.surprised and not guide.is_still


def test_a_plan_that_moves_nothing_is_still_until_it_is_surprised():
    plan = plan_for(USUAL, 200, cyclic=True)
    guide, device = planned(plan, USUAL), Device(here=plan.resident)
    assert guide.is_still
    for name in ("te", "unet", "te", "vae"):
        assert device.enter(guide, name) == ([], [])
    assert guide.is_still
    device.enter(guide, "controlnet")
    assert guide.surprised and not guide.is_still


def test_as_much_is_queued_as_the_link_copies_during_the_use():
    plan = plan_for(USUAL, 140, cyclic=True, bandwidth=25.0)
    move = planned(plan, USUAL).enter("te", 1, {name: SIZES[name] for name in plan.resident})
    assert move.copy_nbytes == 25.0


def test_what_is_missing_at_its_use_is_fetched_first():
    plan = plan_for(USUAL, 200, cyclic=True)
    guide, device = planned(plan, USUAL), Device()
    for name in USUAL:
        assert device.enter(guide, name)[1][0] == name


def test_what_is_there_already_is_not_fetched_again():
    plan = plan_for(USUAL, 140)
    guide, device = planned(plan, USUAL), Device(here=["te", "te2"])
    _, fetch = device.enter(guide, "te")
    assert "te" not in fetch and "te2" not in fetch


def test_room_is_made_from_foreign_units_before_what_the_plan_has_here():
    plan = plan_for(USUAL, 190, cyclic=True)  # all of it
    guide = planned(plan, USUAL)
    device = Device({**SIZES, "theirs": 30}, here=["te", "theirs", "te2"])
    assert device.enter(guide, "te") == ([], [])
    assert device.enter(guide, "te2") == ([], [])
    assert device.enter(guide, "unet") == (["theirs"], ["unet"])
    assert device.enter(guide, "vae") == ([], ["vae"])


def test_a_unit_that_runs_where_it_was_not_expected_takes_the_place_of_what_is_used_last():
    plan = plan_for(["te", "unet", "vae"], 150, cyclic=True)  # all of it
    guide, device = planned(plan, ["te", "unet", "vae"]), Device(here=["te", "unet"])
    for name in ("vae", "te", "unet"):
        device.enter(guide, name)
        assert device.nbytes <= 150
    assert set(device.here) == {"te", "unet", "vae"}
    assert not guide.surprised


def test_larger_work_and_unknown_units_are_left_to_the_other_guide():
    plan = plan_for(USUAL, 190, cyclic=True)
    for name, work in (("unet", 2), ("controlnet", 1)):
        guide, device = planned(plan, USUAL), Device(here=plan.resident)
        release, fetch = device.enter(guide, name, work)
        assert set(release) == set(plan.resident) - {name}
        assert fetch == ([] if name == "unet" else [name])
        assert guide.surprised and not guide.is_still


def test_an_unknown_unit_makes_everything_leave_only_until_it_is_measured():
    workspaces = dict.fromkeys(USUAL, (1, 0))
    plan = plan_for(USUAL, 300, cyclic=True)
    guide = planned(plan, USUAL, otherwise=Careful(SIZES, 300, table(workspaces)))
    device = Device(here=plan.resident)
    for step in range(4):
        device.enter(guide, "controlnet")
        workspaces["controlnet"] = (1, 10)
        release, fetch = device.enter(guide, "unet")
        assert step == 0 or (release, fetch) == ([], [])


def test_after_a_deviation_the_plan_is_found_again():
    trace = ["te", *["controlnet", "unet"] * 4, "vae"]
    plan = plan_for(trace, 170, cyclic=True)
    guide, device = planned(plan, trace), Device(here=plan.resident)
    for name in ("te", "te", "controlnet", "unet", "vae", "controlnet", "unet", "unet", "vae"):
        device.enter(guide, name)
        assert device.nbytes <= 170
    assert guide.follower.at == len(trace) - 1
    assert set(plan.resident) <= set(device.here)


# ---- random walks

names = st.sampled_from(sorted(SIZES))
FOREIGN = {"theirs": 35, "others": 60}
ALL = {**SIZES, **FOREIGN}


def workspace(name, work):
    """More work never takes less."""
    return (len(name) % 3 + 1) * work


@st.composite
def walks(draw):
    """A budget, who is there at the start, and who enters with how much to do."""
    entries = draw(st.lists(st.tuples(names, st.integers(1, 6)), min_size=1, max_size=25))
    least = max(SIZES[name] + workspace(name, work) for name, work in entries)
    budget = least + draw(st.integers(0, 200))
    here, held = [], 0
    for name in draw(st.lists(st.sampled_from(sorted(ALL)), unique=True)):
        if held + ALL[name] <= budget:
            here.append(name)
            held += ALL[name]
    return budget, here, entries


def follow(guide, device, entries, budget, workspaces):
    for name, work in entries:
        device.enter(guide, name, work)
        assert device.nbytes + workspace(name, work) <= budget, (name, work)
        measured = (work, workspace(name, work))
        workspaces[name] = max(workspaces.get(name, measured), measured)


@given(walk=walks(), known=st.dictionaries(names, st.integers(1, 6)))
@settings(max_examples=150, deadline=None)
def test_a_careful_walk_never_needs_more_than_the_budget(walk, known):
    budget, here, entries = walk
    workspaces = {name: (work, workspace(name, work)) for name, work in known.items()}
    guide = Careful(SIZES, budget, table(workspaces))
    follow(guide, Device(ALL, here), entries, budget, workspaces)


@st.composite
def planned_walks(draw):
    """A walk, and a plan that was made for another one."""
    budget, here, entries = draw(walks())
    works = draw(st.dictionaries(names, st.integers(1, 4), min_size=1))
    works = {n: w for n, w in works.items() if SIZES[n] + workspace(n, w) <= budget}
    known = sorted(works) or None
    if known is None:
        return None
    trace = draw(st.lists(st.sampled_from(known), min_size=1, max_size=6))
    trace = trace[:2] + trace[2:] * draw(st.integers(1, 3)) if len(trace) > 2 else trace
    if draw(st.booleans()):  # mostly as it was planned
        place = draw(st.integers(0, len(trace)))
        planned = [(name, works[name]) for name in trace]
        entries = planned[:place] + entries[:2] + planned[place:]
        if any(SIZES[n] + workspace(n, w) > budget for n, w in entries):
            entries = planned
    return budget, here, entries, trace, works


@pytest.mark.parametrize("start", ["anything", "residents"])
@given(walk=planned_walks(), bandwidth=st.sampled_from([1.0, 30.0, 1e4]))
@settings(max_examples=150, deadline=None)
def test_a_planned_walk_never_needs_more_than_the_budget_whoever_enters(start, walk, bandwidth):
    if walk is None:
        return
    budget, here, entries, trace, works = walk
    uses = [Use((name,), 1.0, workspace(name, works[name])) for name in trace]
    sizes = {name: SIZES[name] for name in trace}
    plan = build_plan(sizes, uses, budget_nbytes=budget, bandwidth=bandwidth, cyclic=True)
    workspaces = {name: (works[name], workspace(name, works[name])) for name in trace}
    guide = Planned(
        plan, trace, [works[n] for n in trace], Careful(SIZES, budget, table(workspaces))
    )
    device = Device(ALL, here if start == "anything" else plan.resident)
    follow(guide, device, entries, budget, workspaces)


@given(
    trace=st.lists(names, min_size=1, max_size=8),
    rounds=st.integers(1, 4),
    room=st.integers(0, 150),
    bandwidth=st.sampled_from([5.0, 100.0]),
    entries=st.lists(names, max_size=12) | st.none(),
)
@settings(max_examples=150, deadline=None)
def test_in_chain_mode_a_plan_stays_within_the_first_peak_and_keeps_nothing_for_later(
    trace, rounds, room, bandwidth, entries
):
    trace = [n for i, n in enumerate(trace * rounds) if i == 0 or n != (trace * rounds)[i - 1]]
    stages = stages_of(trace, SIZES)
    segments = [f"{name} in stage {stage}" for name, stage in zip(trace, stages, strict=True)]
    unit_of = dict(zip(segments, trace, strict=True))
    sizes = {segment: SIZES[unit] for segment, unit in unit_of.items()}
    uses = [Use((segment,), 1.0, workspace(unit_of[segment], 1)) for segment in segments]
    budget = max(SIZES[name] + workspace(name, 1) for name in trace) + room
    plan = build_plan(sizes, uses, budget_nbytes=budget, bandwidth=bandwidth)
    otherwise = Chain(Cursor(parse(list(dict.fromkeys(trace)))))
    guide = Planned(plan, trace, [1] * len(trace), otherwise, unit_of)
    device = Device()
    for name in trace if entries is None else entries:
        device.enter(guide, name)
        if name in trace:
            assert device.nbytes + workspace(name, 1) <= budget
    if entries is None:
        last = {name for name, stage in zip(trace, stages, strict=True) if stage == stages[-1]}
        assert set(device.here) <= last
