"""Streaming: components that are larger than the budget run block by block, as planned.

Wherever memory is short the simulated device has exactly the budget: one byte more and it is out
of memory.
"""

import copy
import functools
import gc
import math
from typing import NamedTuple

import pytest
import torch

import offload_engine
from benchmarks import streaming
from benchmarks.instances import least_nbytes
from benchmarks.pipelines import PIPELINES
from benchmarks.scaled import LINK, build, noise, weights_nbytes
from benchmarks.shapes import SHAPES, SHARES
from offload_engine import sim
from offload_engine.forecast import Expected
from offload_engine.residency import Residency

from .miniature import measured, unoffloaded
from .streamed import SMALL, check, deep_flux, streamed

pytestmark = pytest.mark.usefixtures("clean")
# Where no cycle that is as fast copies less than 1.31, 1.19 and 1.36 of the least
# (benchmarks/least.py): of the least.
HIDDEN = {("flux", 0.7): 1.38, ("qwen", 0.5): 1.25, ("qwen", 0.7): 1.43}


# ---- a real architecture on a third of its weights


def test_flux_runs_on_a_third_of_its_weights_bit_identical(sim_device):
    case, pipe = PIPELINES["flux"], copy.deepcopy(deep_flux())
    nbytes = weights_nbytes(pipe)
    pipe.to(sim_device)
    torch.accelerator.reset_peak_memory_stats()
    expected = measured(lambda: case.run(pipe, 3))
    activations = expected.peak_nbytes - nbytes
    pipe.to("cpu")
    budget = nbytes // 3 + activations
    engine = offload_engine.attach(pipe, vram=budget)
    sim.configure(capacity_nbytes=budget, h2d_bandwidth=2e9, pageable_bandwidth=2e9)
    for number in range(4):
        torch.accelerator.reset_peak_memory_stats()
        call, report = measured(lambda: case.run(pipe, 3)), engine.report()
        check(call, expected, engine)
        if number:
            assert call.seconds <= 1.05 * report.bound_seconds
            assert call.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
            copied = call.moved.h2d_nbytes - expected.moved.h2d_nbytes
            assert abs(copied - engine.plan.fetched_nbytes) <= 16  # split at whole bytes
    assert any(use.segments[-1].startswith("transformer.") for use in engine.plan.uses)


@pytest.fixture
def plans_made(monkeypatch):
    """One entry for each plan that was asked for."""
    asked, plan = [], Expected.plan
    monkeypatch.setattr(
        Expected, "plan", lambda *args, **more: asked.append(1) or plan(*args, **more)
    )
    return asked


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_the_few_bytes_that_schedulers_leave_ask_for_no_new_plan(sim_device, plans_made, name):
    bandwidth, expected, peak, weights = streaming._without_offload(name)
    case, pipe = PIPELINES[name], PIPELINES[name].build("tiny")
    with offload_engine.attach(pipe, case.seq, vram=peak - weights // 2) as engine:
        sim.configure(h2d_bandwidth=bandwidth)
        for number in range(6):
            if number in (0, 2):  # from here on a larger peak tells a workspace to the byte
                torch.accelerator.reset_peak_memory_stats()
            call, report = measured(lambda: case.run(pipe, streaming.STEPS)), engine.report()
            assert torch.equal(call.output, expected)
            if number:
                assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
    assert len(plans_made) == 1


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_new_plan_is_prepared_at_the_end_of_the_call_that_asks_for_it(sim_device, name):
    """The first call warms up, so the second tells other seconds: the third has another plan, and
    finds on the device what that begins with."""
    shape, x = SHAPES[name], noise()
    pipe = build(shape)
    with streamed(pipe, 0.5) as engine:
        pipe(x, num_inference_steps=shape.steps, on_step=lambda pipe, step: sim.spend(0.3))
        first = engine.plan
        for _ in range(2):
            call = measured(lambda: pipe(x, num_inference_steps=shape.steps))
        assert engine._planner.plan_of_last_call is not first
        assert call.seconds == pytest.approx(engine.report().predicted_seconds, rel=0.01)


def test_what_a_first_call_caches_on_the_device_is_counted_once(sim_device, plans_made):
    """It is measured as workspace there, and later on the device before the call begins."""

    def cache(pipe, step):
        if "cached" not in vars(pipe):
            pipe.cached = torch.zeros(cached_nbytes, dtype=torch.uint8, device=sim_device)

    x, plans = noise(), []
    for is_early in (False, True):
        pipe = build(SMALL)
        cached_nbytes, budget = weights_nbytes(pipe) // 8, weights_nbytes(pipe) * 9 // 16
        if is_early:
            cache(pipe, 0)
        vram = budget - cached_nbytes if is_early else budget
        with offload_engine.attach(pipe, vram=vram) as engine:
            sim.configure(h2d_bandwidth=LINK, pageable_bandwidth=LINK)
            pipe(x, on_step=cache)
            pipe(x, on_step=cache)
            plans.append(engine.plan)
            plans_made.clear()
            for _ in range(3):
                pipe(x, on_step=cache)
                report = engine.report()
                assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
            assert not plans_made
        del pipe
    late, early = plans
    assert late.budget_nbytes == early.budget_nbytes
    workspaces = [[use.workspace_nbytes for use in plan.uses] for plan in plans]
    assert workspaces[0] == workspaces[1]
    assert late.seconds == pytest.approx(early.seconds, rel=0.001)


def test_copies_that_are_all_queued_at_once_delay_the_pipelines_own(sim_device, monkeypatch):
    """[Note: pacing] broken on purpose: the call takes longer than its plan."""
    queue = Residency._queue
    case, seconds = PIPELINES["flux"], {}
    for paced in (True, False):
        if not paced:
            monkeypatch.setattr(Residency, "_queue", lambda self, nbytes: queue(self, math.inf))
        pipe = copy.deepcopy(deep_flux())
        with offload_engine.attach(pipe, vram=weights_nbytes(pipe) * 3 // 5) as engine:
            sim.configure(h2d_bandwidth=4e8, pageable_bandwidth=4e8)
            for _ in range(3):
                call = measured(lambda pipe=pipe: case.run(pipe, 3))
            seconds[paced] = call.seconds / engine.report().predicted_seconds
    assert seconds[True] == pytest.approx(1, rel=0.02)
    assert seconds[False] > seconds[True] + 0.005


# ---- the numbers, at the proportions of real models


class Steady(NamedTuple):
    """A streamed call in the steady state."""

    seconds: float
    predicted_seconds: float
    bound_seconds: float
    copied_nbytes: int  # host to device, without the call's own
    least_nbytes: float


@functools.cache
def steady(name, fraction):
    shape, x = SHAPES[name], noise()
    pipe = build(shape)
    expected = unoffloaded(pipe, x, num_inference_steps=shape.steps)
    with streamed(pipe, fraction) as engine:
        for number in range(3):
            torch.accelerator.reset_peak_memory_stats()
            call = measured(lambda: pipe(x, num_inference_steps=shape.steps))
            check(call, expected, engine)
            plan = engine._planner.plan_of_last_call
            if number:
                report, copied = engine.report(), call.moved.h2d_nbytes - x.nbytes
                assert abs(copied - plan.fetched_nbytes) <= 16
                assert report.bound_seconds == plan.bound_seconds
        return Steady(
            call.seconds,
            plan.seconds,
            plan.bound_seconds,
            copied,
            least_nbytes(plan),
        )


@pytest.mark.parametrize("fraction", SHARES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_streamed_call_is_as_fast_as_the_budget_allows(sim_device, name, fraction):
    call = steady(name, fraction)
    assert call.seconds <= 1.05 * call.bound_seconds
    assert call.seconds == pytest.approx(call.predicted_seconds, rel=0.02)


@pytest.mark.parametrize("fraction", SHARES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_streamed_call_copies_little_more_than_it_must(sim_device, name, fraction):
    call = steady(name, fraction)
    assert call.copied_nbytes <= HIDDEN.get((name, fraction), 1.13) * call.least_nbytes


@pytest.mark.parametrize("name", SHAPES)
def test_with_a_larger_budget_no_more_is_copied(sim_device, name):
    copied = [steady(name, fraction).copied_nbytes for fraction in SHARES]
    assert copied == sorted(copied, reverse=True)


@pytest.mark.parametrize("name", SHAPES)
def test_where_everything_fits_nothing_is_copied(sim_device, name):
    shape, x = SHAPES[name], noise()
    pipe = build(shape)
    expected = unoffloaded(pipe, x, num_inference_steps=2)
    with offload_engine.attach(pipe, vram=expected.peak_nbytes) as engine:
        sim.configure(capacity_nbytes=expected.peak_nbytes)
        for number in range(3):
            call = measured(lambda: pipe(x, num_inference_steps=2))
            assert torch.equal(call.output, expected.output)
            assert number == 0 or call.moved.h2d_nbytes == x.nbytes
        assert engine.plan.fetched_nbytes == 0


def test_where_everything_surely_fits_nothing_is_cut(sim_device):
    with offload_engine.attach(build(SMALL), vram="8GiB") as engine:
        assert set(engine._residency.units) == {"te", "transformer", "vae"}


def test_a_streamed_call_waits_for_the_device_as_often_as_one_without_offload(sim_device):
    pipe, x, extra = build(SMALL), noise(), set()
    expected = {steps: unoffloaded(pipe, x, num_inference_steps=steps) for steps in (4, 12)}
    with streamed(pipe):
        for steps in (4, 12):
            for _ in range(2):
                pipe(x, num_inference_steps=steps)
            for _ in range(2):
                call = measured(lambda steps=steps: pipe(x, num_inference_steps=steps))
                extra.add(call.moved.host_syncs - expected[steps].moved.host_syncs)
    assert extra == {0}


def live(kind):
    return sum(isinstance(each, kind) for each in gc.get_objects())


def test_nothing_grows_over_a_hundred_calls(sim_device):
    pipe, x = build(SMALL), noise()
    seen = []
    with streamed(pipe) as engine:
        for number in range(106):
            pipe(x, num_inference_steps=2)
            if number in (5, 105):
                gc.collect()
                seen.append(
                    {
                        "allocated": torch.accelerator.memory_allocated(),
                        "peak": torch.accelerator.max_memory_allocated(),
                        "pinned": sim.counters().pinned_nbytes,
                        "events": live(torch.Event),
                        "tensors": live(torch.Tensor),
                        "streams": live(torch.Stream),
                        "log": len(engine._log),
                        "marks": len(engine._meter.marks),
                        "started": len(engine._residency._started),
                    }
                )
    assert seen[0] == seen[1]


# ---- what the plan's timeline shows


def copies(plan, prefix):
    spans = [span for span in plan.timeline if span.kind == "copy"]
    return [span for span in spans if span.segments[0].startswith(prefix)]


def uses(plan, prefix):
    spans = [span for span in plan.timeline if span.kind == "use"]
    return [span for span in spans if span.segments[-1].startswith(prefix)]


@functools.cache
def small_plan(fraction):
    pipe, x = build(SMALL), noise()
    with streamed(pipe, fraction) as engine:
        for _ in range(3):
            pipe(x)
        return engine.plan


def test_the_first_blocks_of_the_denoiser_are_fetched_while_the_prompt_is_encoded(sim_device):
    plan = small_plan(0.4)
    encoding = uses(plan, "te")
    early = [
        span.segments[0]
        for span in copies(plan, "transformer.")
        if encoding[0].start_seconds <= span.start_seconds < encoding[-1].stop_seconds
    ]
    kept = {name for name in plan.resident if name.startswith("transformer.")}
    blocks = {name for name in plan.nbytes if name.startswith("transformer.")}
    assert early, "nothing is fetched ahead"
    assert set(early) | kept < blocks, "all of it fits: nothing is streamed"
    first = [span.segments[-1] for span in uses(plan, "transformer.")][: len(set(early) | kept)]
    assert first[0] in kept | set(early)


def test_in_the_last_step_what_comes_after_is_fetched_in_the_place_of_the_denoiser(sim_device):
    plan = small_plan(0.4)
    steps = uses(plan, "transformer.")
    last = steps[-8:]  # its blocks
    began = last[0].start_seconds
    drained = [span for span in copies(plan, "") if span.start_seconds >= began]
    later = {name for span in last for name in span.segments}
    for span in copies(plan, "transformer."):
        if began <= span.start_seconds < last[-1].stop_seconds:
            assert any(
                use.start_seconds >= span.stop_seconds - 1e-9
                for use in last
                if span.segments[0] in use.segments
            ), f"{span.segments[0]} is fetched in the last step and not used in it"
    during = {s.segments[0] for s in drained if s.start_seconds < last[-1].stop_seconds} - later
    assert any(name.startswith(("vae", "te")) for name in during)


def test_at_the_end_of_a_request_the_next_one_is_begun(sim_device):
    plan = small_plan(0.4)
    assert plan.cyclic
    decoding, last_of_te = uses(plan, "vae"), uses(plan, "te")[-1]
    wrapped = [
        span.segments[0]
        for span in copies(plan, "te")
        if span.start_seconds > last_of_te.stop_seconds
    ]
    assert wrapped
    assert set(wrapped) <= set(plan.resident), "it begins with what was fetched for it"
    assert decoding[-1].stop_seconds <= plan.seconds * 1.0001


def test_some_blocks_stay_and_others_are_streamed_between_them(sim_device):
    plan = small_plan(0.55)
    blocks = [name for name in plan.nbytes if name.startswith("transformer.row")]
    fetched = {name: len(copies(plan, name)) for name in blocks}
    stay = [name for name in blocks if fetched[name] <= 1]
    stream = [name for name in blocks if fetched[name] > 1]
    assert stay and stream
    order = "".join("s" if name in stream else "r" for name in blocks)
    assert order.count("sr") + order.count("rs") >= 2, order
