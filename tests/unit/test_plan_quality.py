"""How good plans and bounds are: against the optimum where it can be found, else the bound."""

import math
import statistics
import time

import pytest

from benchmarks.instances import (
    GIB,
    MIB,
    Instance,
    anything,
    cut,
    denoiser,
    flux,
    least_nbytes,
    optimum,
)
from offload_engine.plan import Use, build_plan
from offload_engine.plan.kept import kept_segments
from offload_engine.plan.problem import read_problem

from .test_plan import plan_of
from .test_plan_referee import replay

REL = 1e-9


def assert_replays(plan, instance, cyclic=False):
    played = replay(plan, instance, cyclic)
    assert plan.seconds == pytest.approx(played.seconds, rel=1e-7, abs=1e-9)
    assert plan.peak_nbytes == pytest.approx(played.peak)
    assert plan.fetched_nbytes == pytest.approx(played.fetched)
    assert plan.bound_seconds <= plan.seconds


@pytest.mark.parametrize("family", [denoiser, anything])
def test_small_plans_are_optimal_and_so_are_their_bounds(family):
    above, proven = [], []
    for seed in range(600):
        instance = family(seed)
        plan, best = plan_of(instance), optimum(instance)
        assert_replays(plan, instance)
        assert plan.bound_seconds <= best * (1 + REL) + REL, seed
        if best > 0:
            above.append(plan.seconds / best - 1)
            proven.append(plan.bound_seconds / best)
    assert max(above) <= 0.02 and statistics.mean(above) <= 0.001
    assert statistics.mean(proven) >= 0.97


def test_without_a_search_bounds_still_hold_and_are_near(monkeypatch):
    monkeypatch.setattr("offload_engine.plan.solve._beams", lambda problem: [])
    above, proven = [], []
    for seed in range(600):
        instance = denoiser(seed)
        plan, best = plan_of(instance), optimum(instance)
        assert_replays(plan, instance)
        assert plan.bound_seconds <= best * (1 + REL), seed
        above.append(plan.seconds / best - 1)
        proven.append(plan.bound_seconds / best)
    assert statistics.mean(above) <= 0.01 and statistics.mean(proven) >= 0.97


@pytest.mark.parametrize("family", [denoiser, anything])
def test_bounds_hold_for_segments_in_parts_that_are_used_together(family, monkeypatch):
    monkeypatch.setattr("offload_engine.plan.solve._beams", lambda problem: [])
    proven = []
    for seed in range(150):
        instance = cut(family(seed), 2)
        if any(nbytes <= 0 for nbytes in instance.nbytes.values()) or len(instance.nbytes) > 12:
            continue
        plan, best = plan_of(instance), optimum(instance)
        assert_replays(plan, instance)
        assert plan.bound_seconds <= best * (1 + REL), seed
        if best > 0:
            proven.append(plan.bound_seconds / best)
    assert len(proven) > 50 and statistics.mean(proven) >= 0.95


def test_small_cycles_are_as_fast_as_many_rounds_in_one_plan():
    proven = []
    for seed in range(60):
        instance = denoiser(seed)._replace(resident=())
        plan = plan_of(instance, cyclic=True)
        assert_replays(plan, instance, cyclic=True)
        few, many = (optimum(instance._replace(uses=instance.uses * n)) for n in (6, 12))
        steady = (many - few) / 6
        assert plan.seconds <= steady * 1.02, seed
        assert plan.bound_seconds <= plan.seconds
        proven.append(plan.bound_seconds / plan.seconds)
    assert statistics.mean(proven) >= 0.97


@pytest.mark.parametrize("gib", [12, 16, 20, 24])
@pytest.mark.parametrize(("bandwidth", "step_seconds"), [(23.9e9, 0.6), (52e9, 0.24)])
def test_flux_is_within_five_percent_of_its_bound_in_seconds(gib, bandwidth, step_seconds):
    instance = flux(budget=gib * GIB, bandwidth=bandwidth, step_seconds=step_seconds)
    for cyclic in (False, True):
        begun = time.process_time()
        plan = plan_of(instance, cyclic=cyclic)
        seconds = time.process_time() - begun
        assert_replays(plan, instance, cyclic)
        assert plan.seconds <= plan.bound_seconds * 1.05
        assert seconds < (3 if cyclic else 1)


@pytest.mark.parametrize("gib", [12, 16, 20, 24])
@pytest.mark.parametrize("bandwidth", [23.9e9, 12e9, 4e9])
def test_flux_in_parts_is_as_fast_as_can_be_and_copies_little_more_than_it_must(gib, bandwidth):
    whole = flux(budget=gib * GIB, bandwidth=bandwidth, step_seconds=0.6)
    instance = cut(whole, 4, lambda name: "." in name or name == "text_encoder_2")
    plan = plan_of(instance, cyclic=True)
    assert_replays(plan, instance, cyclic=True)
    assert plan.seconds <= plan.bound_seconds * 1.04
    assert plan.fetched_nbytes <= 1.1 * least_nbytes(plan)


def test_what_a_cycle_keeps_leaves_room_for_every_use():
    instance = cut(flux(budget=16 * GIB, bandwidth=24e9, step_seconds=0.6, steps=3), 3)
    problem = read_problem(
        instance.nbytes, instance.uses, instance.budget, instance.bandwidth, (), True
    )
    kept = kept_segments(problem, 1)
    always = {segment for segment, uses in kept.items() if uses == math.inf}
    for position, needed in enumerate(problem.needs):
        there = always.union(needed)
        for segment in kept.keys() - there:  # in a loop, or the long gap before the next call
            used = [at for at, use in enumerate(problem.needs) if segment in use]
            there |= {segment} if used[0] < position < used[-1] else set()
        assert sum(problem.sizes[segment] for segment in there) <= problem.room[position]
    assert kept.keys() - always, "the decoder needs the room that the loop could use"


def test_flux_at_a_budget_with_room_to_spare_moves_little_more_than_it_must():
    instance = flux(budget=16 * GIB, bandwidth=23.9e9, step_seconds=0.6)
    plan = plan_of(instance)
    blocks = sum(n for name, n in instance.nbytes.items() if name.startswith("transformer"))
    least = sum(instance.nbytes.values()) + 27 * (blocks - 15 * GIB)
    assert plan.fetched_nbytes <= 1.25 * least


def test_uses_in_one_loop_of_equal_blocks_are_planned_to_the_bound():
    for held in (5, 9, 13):
        nbytes = {f"block.{i}": 100 for i in range(20)}
        uses = [Use((name,), 1.0) for name in nbytes] * 20
        # two slots stream, the others stay: the link keeps up exactly
        bandwidth = 100 * (20 - held) / 20
        instance = Instance(nbytes, uses, 100 * (held + 3), bandwidth)
        plan = plan_of(instance)
        assert_replays(plan, instance)
        assert plan.seconds <= plan.bound_seconds * 1.03


def test_cost_grows_near_linearly():
    seconds = []
    for count in (1_000, 10_000):
        nbytes = {f"block.{i}": (100 + i % 7) * MIB for i in range(50)}
        uses = [Use((f"block.{i % 50}",), 0.002) for i in range(count)]
        begun = time.process_time()
        plan = build_plan(nbytes, uses, budget_nbytes=3 * GIB, bandwidth=40e9)
        seconds.append(time.process_time() - begun)
        assert plan.seconds <= plan.bound_seconds * 1.05
    assert seconds[1] < 25 * seconds[0] + 1
