"""Calls that do not do what was planned: the bits are right, and the budget holds all the same."""

import contextlib
import functools
import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offload_engine
from offload_engine import sim

from .conftest import total_nbytes
from .miniature import make, measured, noise

PARTS = ("te", "te2", "controlnet", "unet", "vae")
quickly = functools.partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


names = st.sampled_from(PARTS)
few = st.lists(names, max_size=3).map(" ".join)
traces = st.fixed_dictionaries(
    {
        "first": few,
        "loop": st.lists(names, min_size=1, max_size=3).map(" ".join),
        "last": few,
        "num_inference_steps": st.integers(1, 5),
    }
)
widths = st.fixed_dictionaries({name: st.sampled_from((16, 48, 96, 200, 400)) for name in PARTS})


@st.composite
def deviations(draw, trace):
    """``trace``, in some way not quite so."""
    kind = draw(st.sampled_from(["same", "steps", "skip", "decode", "swap", "unknown", "other"]))
    changed = dict(trace)
    if kind == "steps":
        changed["num_inference_steps"] = draw(st.integers(1, 7))
    elif kind == "skip":
        gone = draw(names)
        for place in ("first", "loop", "last"):
            changed[place] = " ".join(n for n in trace[place].split() if n != gone)
    elif kind == "decode":
        changed["loop"] += " vae"
    elif kind == "swap":
        changed["first"], changed["last"] = trace["last"], trace["first"]
        changed["loop"] = " ".join(reversed(trace["loop"].split()))
    elif kind == "unknown":
        place = draw(st.sampled_from(["first", "loop", "last"]))
        changed[place] = f"{changed[place]} {draw(names)}".strip()
    elif kind == "other":
        changed = draw(traces)
    return changed


@st.composite
def stories(draw):
    """Widths of the parts, and calls: some alike, then some that are not."""
    trace = draw(traces)
    calls = [trace] * draw(st.integers(1, 3))
    calls += draw(st.lists(deviations(trace), min_size=1, max_size=4))
    return draw(widths), calls, draw(st.sampled_from([4, 32]))


@contextlib.contextmanager
def no_memory_left_over():
    yield
    gc.collect()
    assert torch.accelerator.memory_allocated() == 0
    assert not sim.violations()


def activations_nbytes(rows, widest):
    """What one part takes beside its weights, and what else the call holds: never more."""
    return 4 * rows * (widest + 64 * 4) + 1024


@quickly(max_examples=40)
@given(story=stories(), share=st.floats(0, 1), bandwidth=st.sampled_from([2e8, 2e9, 2e10]))
def test_within_a_budget_every_deviation_ends_in_the_right_bits(
    sim_device, story, share, bandwidth
):
    sizes, calls, rows = story
    x, twin, pipe = noise(rows), make(sizes), make(sizes)
    weights = [total_nbytes(part) + 512 for part in pipe.components.values()]
    least = max(weights) + activations_nbytes(rows, max(sizes.values()))
    budget = int(least + share * (sum(weights) - max(weights)))
    with no_memory_left_over(), offload_engine.attach(pipe, vram=budget):
        sim.configure(capacity_nbytes=budget, h2d_bandwidth=bandwidth)
        for call in calls:
            assert torch.equal(pipe(x, **call), twin(x, **call))
        sim.configure(capacity_nbytes=2**40)  # and where nothing enforces it
        for call in calls:
            torch.accelerator.reset_peak_memory_stats()
            assert torch.equal(pipe(x, **call), twin(x, **call))
            assert torch.accelerator.max_memory_allocated() <= budget


@quickly(max_examples=20)
@given(story=stories(), bandwidth=st.sampled_from([2e8, 2e10]))
def test_chain_mode_stays_below_its_first_peaks_whatever_runs(sim_device, story, bandwidth):
    sizes, calls, rows = story
    x, twin, pipe = noise(rows), make(sizes), make(sizes)
    first_peaks = {}
    with no_memory_left_over(), offload_engine.attach(pipe) as engine:
        sim.configure(h2d_bandwidth=bandwidth)
        for call in [*calls, *calls]:
            torch.accelerator.reset_peak_memory_stats()
            assert torch.equal(pipe(x, **call), twin(x, **call))
            peak_nbytes = torch.accelerator.max_memory_allocated()
            key = tuple(call.items())
            if key not in first_peaks:
                first_peaks[key] = first_peak_nbytes(sizes, x, call)
            assert peak_nbytes <= max(first_peaks.values())
            assert engine.resident == ()


def first_peak_nbytes(sizes, x, call):
    """Of a fresh engine's first call in this order, with rounds enough to see that it is a loop:
    from then on all its members are there together."""
    assert torch.accelerator.memory_allocated() == 0
    pipe = make(sizes)
    with offload_engine.attach(pipe):
        torch.accelerator.reset_peak_memory_stats()
        pipe(x, **{**call, "num_inference_steps": call["num_inference_steps"] + 4})
        return torch.accelerator.max_memory_allocated()


# ---- another number of steps is no deviation


def slow():
    return make(seconds={"te": 1e-4, "te2": 1e-4, "controlnet": 5e-5, "unet": 2e-4, "vae": 1e-4})


LOOPS = ["unet", "controlnet unet", "unet unet", "controlnet unet te2"]


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("loop", LOOPS)
def test_another_number_of_steps_is_planned_for_without_a_call_to_learn_it(sim_device, loop, share):
    pipe, twin, x = slow(), make(), noise()
    weights = [total_nbytes(part) for part in pipe.components.values()]
    needed = max(weights) + 30_000
    budget = int(needed + share * (sum(weights) - max(weights)))
    with no_memory_left_over(), offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget, h2d_bandwidth=1e9)
        pipe(x, loop=loop, num_inference_steps=4)
        for steps in (7, 7, 4, 4, 12, 2, 2):
            call = measured(lambda steps=steps: pipe(x, loop=loop, num_inference_steps=steps))
            report, plan = engine.report(), engine._planner.plan_of_last_call
            assert torch.equal(call.output, twin(x, loop=loop, num_inference_steps=steps))
            assert report.predicted_seconds is not None, steps
            stalled = sum(c.stall_seconds for c in report.components.values())
            assert stalled <= plan.stall_seconds + 0.02 * plan.seconds
            assert abs(report.seconds - report.predicted_seconds) <= 0.02 * report.seconds, steps


def test_a_preview_after_each_step_and_the_image_after_the_last_are_predicted(sim_device):
    """The last round of the loop and what follows it are one use, longer than the others."""
    pipe, x = slow(), noise()
    with no_memory_left_over(), offload_engine.attach(pipe, vram="8GiB") as engine:
        sim.configure(h2d_bandwidth=1e9)
        for number in range(4):
            pipe(x, loop="unet vae", num_inference_steps=6)
            report = engine.report()
            if number:
                assert abs(report.seconds - report.predicted_seconds) <= 0.02 * report.seconds


def test_chain_mode_plans_for_another_number_of_steps_too(sim_device):
    pipe, twin, x = slow(), make(), noise(64)
    with no_memory_left_over(), offload_engine.attach(pipe) as engine:
        sim.configure(h2d_bandwidth=1e9)
        pipe(x, num_inference_steps=4)
        for steps in (7, 4, 4, 12):
            call = measured(lambda steps=steps: pipe(x, num_inference_steps=steps))
            report = engine.report()
            assert torch.equal(call.output, twin(x, num_inference_steps=steps))
            assert report.predicted_seconds is not None
            assert abs(report.seconds - report.predicted_seconds) <= 0.02 * report.seconds, steps
            assert all(c.fetches <= 1 for c in report.components.values())


def test_after_a_call_that_was_not_as_planned_the_steps_still_count(sim_device):
    pipe, twin, x = slow(), make(), noise()
    with no_memory_left_over(), offload_engine.attach(pipe, vram=340_000) as engine:
        sim.configure(h2d_bandwidth=1e9)
        pipe(x, num_inference_steps=4)
        for call in ({"first": "te"}, {"first": "te te2 controlnet"}, {"last": "vae te"}):
            for steps in (4, 4, 9, 6):
                output = pipe(x, num_inference_steps=steps, **call)
                assert torch.equal(output, twin(x, num_inference_steps=steps, **call))
            report = engine.report()
            assert abs(report.seconds - report.predicted_seconds) <= 0.02 * report.seconds
