"""`vram=`: whole components within a budget, planned. What the plan says is what happens.

Wherever memory is short the simulated device has exactly the budget: one byte more and it is out
of memory.
"""

import contextlib
import copy
import functools
import gc
import threading

import pytest
import torch
from torch import nn

import offload_engine
from benchmarks.pipelines import PIPELINES
from offload_engine import sim
from offload_engine.engine import _budgeted
from offload_engine.hooks import Walker
from offload_engine.plan import PlanError
from offload_engine.residency import State

from .conftest import total_nbytes
from .miniature import Miniature, Part, make, measured, noise, unoffloaded

ALLOWED = set()  # violations that a test has reasons for
TIGHT = 340_000  # a budget that holds the denoiser of `make` and one encoder
NAMES = ("sdxl", "flux", "wan_t2v")
STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread, as models this small lose by a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def clean(sim_device):
    yield
    for engine in list(_budgeted):  # of a test that failed: it would share its budget
        engine.detach()
    gc.collect()
    assert not [found for found in sim.violations() if found.check not in ALLOWED]
    ALLOWED.clear()


def peak_from_here():
    """Torch's peak begins anew: the test's right, never the engine's."""
    torch.accelerator.reset_peak_memory_stats()


@functools.cache
def built(name):
    return PIPELINES[name].build("tiny")


def fresh(name):
    return copy.deepcopy(built(name))


@functools.cache
def plain(name):
    """The call without offload; its peak is what everything takes."""
    return alone(fresh(name).to("sim:0"), name)


@functools.cache
def chained(name):
    """The first call in chain mode; no budget is smaller than its peak."""
    pipe = fresh(name)
    with offload_engine.attach(pipe, PIPELINES[name].seq):
        return alone(pipe, name)


def alone(pipe, name):
    gc.collect()
    peak_from_here()
    return measured(lambda: PIPELINES[name].run(pipe, STEPS))


def between(name, fraction):
    """A budget between the peak of chain mode and that of everything."""
    least, most = chained(name).peak_nbytes, plain(name).peak_nbytes
    gc.collect()
    return int(least + fraction * (most - least))


def close(one, other, part=0.02):
    return abs(one - other) <= part * other


# ---- the promise: what is predicted is what happens


@pytest.mark.parametrize("bandwidth", [1e9, 8e9])
@pytest.mark.parametrize("fraction", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_planned_call_takes_the_time_and_the_bytes_of_its_plan(
    sim_device, caplog, name, fraction, bandwidth
):
    case, expected, budget = PIPELINES[name], plain(name), between(name, fraction)
    pipe = fresh(name)
    engine = offload_engine.attach(pipe, case.seq, vram=budget)
    sim.configure(capacity_nbytes=budget, h2d_bandwidth=bandwidth)
    peak_from_here()
    for number in range(3):
        call, report = measured(lambda: case.run(pipe, STEPS)), engine.report()
        assert torch.equal(call.output, expected.output)
        assert call.peak_nbytes <= budget
        if number:
            for plan_seconds in (report.predicted_seconds, engine.plan.seconds):
                assert close(call.seconds, plan_seconds)
                assert close(report.seconds, plan_seconds)
            # The bound was made from the times of the call before.
            assert report.bound_seconds <= report.seconds * 1.02
            assert report.efficiency == report.bound_seconds / report.seconds
            assert 0.5 < report.efficiency <= 1.02
            weights_nbytes = call.moved.h2d_nbytes - expected.moved.h2d_nbytes
            assert abs(weights_nbytes - engine.plan.fetched_nbytes) <= 16  # split at whole bytes
            assert call.moved.d2h_nbytes == expected.moved.d2h_nbytes
    # What a scheduler leaves on the device, some bytes, is not the engine's to use.
    assert budget - 1000 <= engine.plan.budget_nbytes <= budget
    assert not caplog.records  # nobody ran out of memory and was helped
    engine.detach()


@pytest.mark.parametrize("fraction", [0.0, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_the_peak_stays_within_the_budget_where_nothing_enforces_it(sim_device, name, fraction):
    case, budget, pipe = PIPELINES[name], between(name, fraction), fresh(name)
    with offload_engine.attach(pipe, case.seq, vram=budget):
        sim.configure(h2d_bandwidth=2e9)
        for _ in range(3):
            peak_from_here()
            call = measured(lambda: case.run(pipe, STEPS))
            assert torch.equal(call.output, plain(name).output)
            assert call.peak_nbytes <= budget


@pytest.mark.parametrize("name", [*NAMES, "sdxl_controlnet"])
def test_where_everything_fits_nothing_moves_and_each_component_is_looked_at_once(
    sim_device, monkeypatch, name
):
    case, expected, pipe = PIPELINES[name], plain(name), fresh(name)
    entered = []
    enter = Walker.enter

    def counted(self, unit, *args, **kwargs):
        entered.append(unit.name)
        return enter(self, unit, *args, **kwargs)

    monkeypatch.setattr(Walker, "enter", counted)
    with offload_engine.attach(pipe, case.seq, vram=expected.peak_nbytes) as engine:
        held = torch.accelerator.memory_allocated()  # by earlier tests
        sim.configure(capacity_nbytes=expected.peak_nbytes + held)
        case.run(pipe, STEPS)
        for _ in range(2):
            entered.clear()
            call = measured(lambda: case.run(pipe, STEPS))
            assert torch.equal(call.output, expected.output)
            assert call.moved.h2d_nbytes == expected.moved.h2d_nbytes
            assert engine.plan.fetched_nbytes == 0
            assert len(entered) == len(set(entered)) <= len(engine._mounts)
            assert set(engine.resident) >= set(entered)
        assert set(engine.resident) == set(engine._mounts)


def test_a_component_that_runs_for_the_first_time_stays_from_then_on(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    other = unoffloaded(pipe, x, loop="controlnet unet")
    with offload_engine.attach(pipe, vram="8GiB") as engine:
        for _ in range(3):
            assert torch.equal(pipe(x), expected.output)
        assert set(engine.resident) == {"te", "te2", "unet", "vae"}
        for number in range(3):
            call = measured(lambda: pipe(x, loop="controlnet unet"))
            assert torch.equal(call.output, other.output)
            assert number == 0 or call.moved.h2d_nbytes == x.nbytes
        assert set(engine.resident) == {"te", "te2", "controlnet", "unet", "vae"}


def test_a_call_with_a_component_that_is_new_moves_no_more_than_a_first_call(sim_device):
    """Not the whole loop anew at each step, because the plan does not know one of its parts."""
    pipe, x = make(), noise()
    new = {"loop": "controlnet unet", "num_inference_steps": 8}
    with offload_engine.attach(pipe, vram="8GiB"):
        careful = measured(lambda: pipe(x, **new))
    with offload_engine.attach(pipe, vram="8GiB"):
        for _ in range(2):
            pipe(x, num_inference_steps=8)
        planned = measured(lambda: pipe(x, **new))
    assert torch.equal(planned.output, careful.output)
    assert planned.moved.h2d_nbytes <= careful.moved.h2d_nbytes


# ---- chain mode


def counts(engine):
    return {name: c.fetches for name, c in engine.report().components.items()}


@pytest.mark.parametrize("reset", [True, False], ids=["peaks reset", "peaks kept"])
@pytest.mark.parametrize("name", NAMES)
def test_chain_mode_never_goes_above_the_peak_of_its_first_call(sim_device, name, reset):
    case, expected, pipe = PIPELINES[name], plain(name), fresh(name)
    with offload_engine.attach(pipe, case.seq) as engine:
        sim.configure(h2d_bandwidth=2e9)
        peak_from_here()
        first = measured(lambda: case.run(pipe, STEPS))
        learned = None
        for _ in range(2):
            if reset:
                peak_from_here()
            call = measured(lambda: case.run(pipe, STEPS))
            assert torch.equal(call.output, expected.output)
            assert call.peak_nbytes <= first.peak_nbytes
            learned = learned or (counts(engine), call.moved.h2d_nbytes)
            assert (counts(engine), call.moved.h2d_nbytes) == learned
            assert all(count == 1 for count in counts(engine).values())
            assert call.seconds <= first.seconds * 1.001
            assert call.moved.h2d_nbytes <= first.moved.h2d_nbytes
            assert engine.resident == ()


def hungry():
    """Small parts at the start, large activations in the denoiser: room under the peak."""
    return make(
        {"te": 100, "te2": 110, "unet": 512, "vae": 120},
        scratch={"unet": 4000},
        seconds={"te": 2e-4, "te2": 2e-4, "unet": 3e-4, "vae": 2e-4},
    )


@pytest.mark.parametrize("reset", [True, False], ids=["peaks reset", "peaks kept"])
def test_chain_mode_fetches_ahead_into_room_that_the_peak_has_needed(sim_device, reset):
    pipe, x = hungry(), noise(64)
    expected = unoffloaded(pipe, x)
    peak_from_here()
    with offload_engine.attach(pipe) as engine:
        sim.configure(h2d_bandwidth=1e9)
        first = measured(lambda: pipe(x))
        for _ in range(3):
            if reset:
                peak_from_here()
            call, report = measured(lambda: pipe(x)), engine.report()
            assert torch.equal(call.output, expected.output)
            assert call.peak_nbytes <= first.peak_nbytes
            assert call.seconds < 0.9 * first.seconds
            assert close(report.seconds, report.predicted_seconds)
            assert close(call.seconds, report.predicted_seconds)
            assert call.moved.h2d_nbytes == first.moved.h2d_nbytes
            assert counts(engine) == {"te": 1, "te2": 1, "controlnet": 0, "unet": 1, "vae": 1}


def test_the_peaks_of_the_process_are_never_reset(sim_device, monkeypatch):
    calls = []
    own_name = torch.accelerator.current_accelerator().type
    for module in (torch.accelerator, torch.accelerator.memory, getattr(torch, own_name)):
        for name in dir(module):
            if name.startswith("reset_"):
                monkeypatch.setattr(module, name, lambda *a, name=name, **k: calls.append(name))
    for name in dir(torch._C):
        if "reset" in name.lower() and ("eak" in name or "ccumulated" in name):
            monkeypatch.setattr(torch._C, name, lambda *a, name=name, **k: calls.append(name))
    pipe, x = make(), noise()
    for vram in (None, "8GiB", TIGHT):
        with offload_engine.attach(pipe, vram=vram) as engine:
            for _ in range(3):
                pipe(x)
                engine.report()
            engine.release()
    assert calls == []
    torch.accelerator.reset_peak_memory_stats()
    assert calls, "the spy does not see what it should see"


# ---- what `vram` may be


FORMS = {"bytes": 2**20, "text": "1MiB", "decimal text": "1.048576 MB", "float": 1048576.0}


@pytest.mark.parametrize("vram", FORMS.values(), ids=FORMS)
def test_vram_is_given_as_bytes_or_as_text(sim_device, vram):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe, vram=vram) as engine:
        assert engine.vram_nbytes == 2**20
        assert torch.equal(pipe(x), expected.output)


def test_vram_auto_is_what_is_free_now(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    mine = torch.zeros(10_000, device=sim_device)
    sim.configure(capacity_nbytes=400_000)
    with offload_engine.attach(pipe, vram="auto") as engine:
        assert engine.vram_nbytes == 400_000 - mine.nbytes
        for _ in range(4):
            assert torch.equal(pipe(x), expected.output)
            assert engine.plan.budget_nbytes == 400_000 - mine.nbytes
    assert not mine.any()


def test_what_the_user_had_on_the_device_before_is_not_counted(sim_device, caplog):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    mine = torch.zeros(100_000, device=sim_device)
    sim.configure(capacity_nbytes=TIGHT + mine.nbytes)
    with offload_engine.attach(pipe, vram=TIGHT) as engine:
        for _ in range(3):
            assert torch.equal(pipe(x), expected.output)
            assert engine.plan.budget_nbytes == TIGHT
    assert not caplog.records


def untouched(pipe):
    """Whether ``pipe`` is as if nobody had ever tried to attach to it."""
    parts = [part for part in pipe.components.values() if part is not None]
    return (
        not any("_hf_hook" in part.__dict__ or "forward" in part.__dict__ for part in parts)
        and not any(m._forward_pre_hooks or m._forward_hooks for p in parts for m in p.modules())
        and not any(t.is_pinned() for part in parts for t in part.parameters())
        and all(t.device.type == "cpu" for part in parts for t in part.parameters())
        and "_offload_engine" not in pipe.__dict__
        and type(pipe).__dict__.get("_offload_original") is None
    )


@pytest.mark.parametrize("vram", [0, -1, "lots", "", "-8GiB", "0", True, False, [1], 0.5, b"8GiB"])
def test_what_is_no_size_is_refused_before_anything_moves(sim_device, vram):
    pipe = make()
    before = sim.counters()
    with pytest.raises(offload_engine.OffloadError, match="vram"):
        offload_engine.attach(pipe, vram=vram)
    moved = sim.counters().since(before)
    assert (moved.h2d_nbytes, moved.allocations, sim.counters().pinned_nbytes) == (0, 0, 0)
    assert untouched(pipe)


def test_a_budget_below_the_largest_component_names_it_and_moves_nothing(sim_device):
    pipe = make()
    unet_nbytes = total_nbytes(pipe.unet)
    before = sim.counters()
    with pytest.raises(PlanError, match="unet") as error:
        offload_engine.attach(pipe, vram=unet_nbytes - 1)
    assert error.value.segments == ("unet",)
    assert error.value.needed_nbytes == unet_nbytes
    assert error.value.budget_nbytes == unet_nbytes - 1
    assert str(unet_nbytes) in str(error.value) and str(unet_nbytes - 1) in str(error.value)
    moved = sim.counters().since(before)
    assert (moved.h2d_nbytes, moved.allocations, sim.counters().pinned_nbytes) == (0, 0, 0)
    assert untouched(pipe)


def test_who_is_refused_keeps_the_engine_that_was_there(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe, vram="1MiB") as engine:
        for _ in range(2):
            pipe(x)
        resident = engine.resident
        for vram in (1000, "lots"):
            with pytest.raises(offload_engine.OffloadError):
                offload_engine.attach(pipe, vram=vram)
        assert pipe._offload_engine is engine and engine.resident == resident
        assert torch.equal(pipe(x), expected.output)


def test_attaching_again_with_another_budget_replaces(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    for vram in (None, TIGHT, "8GiB", 400_000, None):
        engine = offload_engine.attach(pipe, vram=vram)
        if isinstance(vram, int):
            assert torch.accelerator.memory_allocated() <= vram
        sim.configure(capacity_nbytes=vram if isinstance(vram, int) else 2**33)
        for _ in range(2):
            assert torch.equal(pipe(x), expected.output)
        assert (engine.resident == ()) == (vram is None)
    engine.detach()
    assert untouched(pipe)


# ---- several pipelines, one budget


@pytest.mark.parametrize("count", [2, 3])
def test_pipelines_on_one_device_share_one_budget(sim_device, caplog, count):
    pipes, x = [make(seed=seed) for seed in range(count)], noise()
    expected = [unoffloaded(pipe, x).output for pipe in pipes]
    budget = total_nbytes(pipes[0].unet) + 200_000
    engines = [offload_engine.attach(pipe, vram=budget) for pipe in pipes]
    sim.configure(capacity_nbytes=budget, h2d_bandwidth=1e9)
    for _ in range(3):
        for pipe, output in zip(pipes, expected, strict=True):
            peak_from_here()
            assert torch.equal(pipe(x), output)
            assert torch.accelerator.max_memory_allocated() <= budget
    assert not caplog.records
    for pipe, output in zip(pipes, expected, strict=True):  # and twice in a row
        for _ in range(2):
            assert torch.equal(pipe(x), output)
    while engines:
        engines.pop(0).detach()
        pipes.pop(0), expected.pop(0)
        for pipe, output in zip(pipes, expected, strict=True):
            for _ in range(2):
                assert torch.equal(pipe(x), output)
    assert torch.accelerator.memory_allocated() == 0
    assert not caplog.records


def test_what_one_pipeline_keeps_goes_as_far_as_the_next_needs_the_room(sim_device):
    first, second, x = make(), make(seed=1), noise()
    expected = [unoffloaded(pipe, x).output for pipe in (first, second)]
    everything = sum(total_nbytes(part) for part in first.components.values())
    budget = everything + 100_000
    with (
        offload_engine.attach(first, vram=budget) as one,
        offload_engine.attach(second, vram=budget) as other,
    ):
        sim.configure(capacity_nbytes=budget)
        for _ in range(2):
            assert torch.equal(first(x), expected[0])
        assert {"te", "te2", "unet", "vae"} <= set(one.resident)
        for _ in range(2):
            assert torch.equal(second(x), expected[1])
        assert {"te", "te2", "unet", "vae"} <= set(other.resident)
        assert "unet" not in one.resident
        for _ in range(2):
            assert torch.equal(first(x), expected[0])
        call = measured(lambda: first(x))
        assert call.moved.h2d_nbytes == x.nbytes


def test_steady_alternation_of_two_pipelines_takes_what_each_alone_has_to_fetch(sim_device):
    """Each call finds the other's weights on the device, and nothing else goes wrong."""
    first, second, x = make(), make(seed=1), noise()
    expected = [unoffloaded(pipe, x).output for pipe in (first, second)]
    weights = sum(total_nbytes(part) for part in first.components.values())
    budget = 2 * weights + 100_000  # both fit
    with (
        offload_engine.attach(first, vram=budget),
        offload_engine.attach(second, vram=budget),
    ):
        sim.configure(capacity_nbytes=budget)
        for number in range(5):
            for pipe, output in zip((first, second), expected, strict=True):
                call = measured(lambda pipe=pipe: pipe(x))
                assert torch.equal(call.output, output)
                if number > 1:
                    assert call.moved.h2d_nbytes == x.nbytes


def test_a_chain_mode_pipeline_gets_its_room_from_what_a_budget_kept(sim_device):
    kept, chain, x = make(), make(seed=1), noise()
    expected = [unoffloaded(pipe, x).output for pipe in (kept, chain)]
    budget = sum(total_nbytes(part) for part in kept.components.values()) + 20_000
    with (
        offload_engine.attach(kept, vram=budget) as engine,
        offload_engine.attach(chain) as other,
    ):
        sim.configure(capacity_nbytes=budget)
        for _ in range(2):
            for _ in range(2):
                assert torch.equal(kept(x), expected[0])
            assert engine.resident
            for _ in range(2):
                assert torch.equal(chain(x), expected[1])
                assert other.resident == ()
        assert torch.equal(kept(x), expected[0])


def test_pipelines_that_share_a_module_share_a_budget_too(sim_device, caplog):
    first, x = make(), noise()
    second = make(seed=1)
    second.unet = first.unet
    expected = [unoffloaded(pipe, x).output for pipe in (first, second)]
    budget = total_nbytes(first.unet) + 150_000
    engines = [offload_engine.attach(pipe, vram=budget) for pipe in (first, second)]
    sim.configure(capacity_nbytes=budget)
    for _ in range(3):
        for pipe, output in zip((first, second), expected, strict=True):
            assert torch.equal(pipe(x), output)
    engines[0].detach()
    for _ in range(2):
        assert torch.equal(second(x), expected[1])
    engines[1].detach()
    assert not caplog.records
    assert torch.accelerator.memory_allocated() == 0


# ---- giving everything back


def free_by_hand(pipe, engine):
    pipe.maybe_free_model_hooks()


def release(pipe, engine):
    engine.release()


@pytest.mark.parametrize("vram", [TIGHT, "8GiB"])
@pytest.mark.parametrize("give_back", [free_by_hand, release])
def test_what_was_kept_is_given_back_on_demand_and_the_next_call_works(sim_device, give_back, vram):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    engine = offload_engine.attach(pipe, vram=vram)
    for number in range(4):
        for _ in range(number):
            assert torch.equal(pipe(x), expected.output)
        assert number == 0 or engine.resident
        give_back(pipe, engine)
        assert engine.resident == () and torch.accelerator.memory_allocated() == 0
        weights = [t for part in pipe.components.values() for t in part.parameters()]
        assert all(t.device.type == "cpu" for t in weights)
    assert torch.equal(pipe(x), expected.output)
    engine.detach()
    assert untouched(pipe) and torch.accelerator.memory_allocated() == 0
    assert sim.counters().pinned_nbytes == 0


def test_the_end_of_a_with_block_gives_everything_back(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe, vram=TIGHT) as engine:
        for _ in range(3):
            pipe(x)
        assert torch.accelerator.memory_allocated() > 0
    assert engine.resident == () and untouched(pipe)
    assert (torch.accelerator.memory_allocated(), sim.counters().pinned_nbytes) == (0, 0)
    assert engine.report().predicted_seconds is not None
    assert torch.equal(unoffloaded(pipe, x).output, expected.output)


def test_parts_run_by_hand_within_a_budget(sim_device, caplog):
    """Outside of calls: nothing is planned, nothing is learned, and the budget holds."""
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    budget = total_nbytes(pipe.unet) + 60_000
    with offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget)
        for number in range(4):
            with torch.no_grad():
                y = pipe.te2(pipe.te(x.to(sim_device)))
                for _ in range(4):
                    y = pipe.unet(y)
                assert torch.equal(pipe.vae(y).cpu(), expected.output)
                del y
            if number % 2:
                assert torch.equal(pipe(x), expected.output)
        assert engine.plan is not None
    assert not caplog.records


# ---- larger work, kept results


@pytest.mark.parametrize("reset", [True, False], ids=["peaks reset", "peaks kept"])
def test_a_larger_image_than_the_first_still_runs_and_is_planned_for_from_then_on(
    sim_device, caplog, reset
):
    """The budget holds the larger workspace only if everything but the denoiser leaves."""
    pipe, small, large = make(scratch={"unet": 600}), noise(4), noise(64)
    expected = {x: unoffloaded(pipe, x).output for x in (small, large)}
    with offload_engine.attach(pipe):
        peak_from_here()
        pipe(large)
        budget = torch.accelerator.max_memory_allocated() + 1000
    engine = offload_engine.attach(pipe, vram=budget)
    sim.configure(capacity_nbytes=budget, h2d_bandwidth=1e9)
    for _ in range(3):
        assert torch.equal(pipe(small), expected[small])
    small_plan = engine.plan
    assert len(small_plan.resident) > 1
    for number in range(4):
        call, report = measured(lambda: pipe(large)), engine.report()
        assert torch.equal(call.output, expected[large])
        if number:
            assert close(report.seconds, report.predicted_seconds)
    unet = next(use for use in engine.plan.uses if "unet" in use.segments)
    assert total_nbytes(pipe.unet) + unet.workspace_nbytes > 0.8 * budget
    for x in (small, small, small, large, small, large, large):
        if reset:
            peak_from_here()  # each use of this call may then raise it, so it is known exactly
        assert torch.equal(pipe(x), expected[x])
    assert not caplog.records
    engine.detach()


@pytest.mark.parametrize("name", ["sdxl"])
def test_a_real_pipeline_is_given_a_larger_image(sim_device, caplog, name):
    case, size, usual = PIPELINES[name], {"height": 48, "width": 48}, plain(name)
    pipe = fresh(name).to(sim_device)
    expected = case.run(pipe, STEPS, **size)
    del pipe
    pipe = fresh(name)
    with offload_engine.attach(pipe, case.seq):
        gc.collect()
        peak_from_here()
        case.run(pipe, STEPS, **size)
        budget = torch.accelerator.max_memory_allocated() + 50_000
    pipe = fresh(name)
    with offload_engine.attach(pipe, case.seq, vram=budget) as engine:
        gc.collect()
        sim.configure(capacity_nbytes=budget, h2d_bandwidth=2e9)
        for _ in range(2):
            assert torch.equal(torch.as_tensor(case.run(pipe, STEPS)), usual.output)
        for number in range(3):
            call = measured(lambda: case.run(pipe, STEPS, **size))
            assert torch.equal(call.output, torch.as_tensor(expected))
            if number:
                report = engine.report()
                assert close(report.seconds, report.predicted_seconds)
    assert not caplog.records


@pytest.mark.parametrize("headroom", [0.05, 0.5])
def test_results_that_the_user_keeps_on_the_device_take_from_the_budget(sim_device, headroom):
    pipe, x = make(), noise(64)
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe):
        peak_from_here()
        pipe(x)
        least = torch.accelerator.max_memory_allocated()
    calls = 12
    kept_nbytes = calls * expected.output.nbytes
    budget = least + kept_nbytes + int(headroom * total_nbytes(pipe.te2))
    with offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget)
        kept = []
        for _ in range(calls):
            kept.append(pipe(x, output_type="device"))
            assert kept[-1].device == sim_device
        assert all(torch.equal(result.cpu(), expected.output) for result in kept)
        assert engine.plan.budget_nbytes <= budget - (calls - 1) * expected.output.nbytes
        kept.clear()
        for _ in range(2):
            assert torch.equal(pipe(x), expected.output)
        assert engine.plan.budget_nbytes == budget


def test_what_the_user_puts_on_the_device_between_calls_takes_from_the_budget(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    weights = sum(total_nbytes(part) for part in pipe.components.values())
    budget = weights + 50_000
    with offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget)
        for _ in range(3):
            pipe(x)
        engine.release()
        mine = torch.zeros(50_000, device=sim_device)
        for _ in range(3):
            assert torch.equal(pipe(x), expected.output)
        assert engine.plan.budget_nbytes <= budget - mine.nbytes
        assert not mine.any()
        del mine
        for _ in range(2):
            assert torch.equal(pipe(x), expected.output)
        assert engine.plan.budget_nbytes == budget


# ---- out of memory in the middle of a call


@pytest.mark.parametrize("vram", [TIGHT, "8GiB", None])
def test_out_of_memory_anywhere_is_the_users_own_error_and_the_next_call_works(sim_device, vram):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    engine = offload_engine.attach(pipe, vram=vram)
    for _ in range(2):
        pipe(x)
    before = sim.counters()
    pipe(x)
    allocations = sim.counters().since(before).allocations
    raised = 0
    for after in range(1, allocations + 1):
        sim.inject_oom(after)
        try:
            assert torch.equal(pipe(x), expected.output)
        except torch.OutOfMemoryError:
            raised += 1
        assert torch.equal(pipe(x), expected.output)
    assert raised >= allocations // 2
    engine.release()
    gc.collect()  # the errors' frames
    assert torch.accelerator.memory_allocated() == 0
    for _ in range(2):
        assert torch.equal(pipe(x), expected.output)
    assert engine.plan is not None or vram is None
    engine.detach()
    assert (torch.accelerator.memory_allocated(), sim.counters().pinned_nbytes) == (0, 0)


def test_after_an_exception_of_the_users_the_plan_goes_on(sim_device):
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    budget = TIGHT

    def fail(pipe, step):
        if step == 2:
            raise KeyboardInterrupt

    with offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget, h2d_bandwidth=1e9)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                pipe(x, on_step=fail)
            for _ in range(2):
                assert torch.equal(pipe(x), expected.output)
            report = engine.report()
            assert close(report.seconds, report.predicted_seconds)


# ---- weights that change


def in_place(pipe):
    with torch.no_grad():
        for part in parts(pipe):
            part.up.weight.add_(0.01)


def data_increment(pipe):
    for part in parts(pipe):
        part.down.weight.data += 0.01


def loaded(pipe):
    for part in parts(pipe):
        part.load_state_dict({key: value * 1.1 for key, value in part.state_dict().items()})


def assigned(pipe):
    for part in parts(pipe):
        state = {key: value * 1.1 for key, value in part.state_dict().items()}
        part.load_state_dict(state, assign=True)


def cast_one(pipe):
    pipe.unet.to(torch.float64 if pipe.unet.dtype == torch.float32 else torch.float32)


def cast_all(pipe):
    for part in parts(pipe):
        part.to(torch.float64 if part.dtype == torch.float32 else torch.float32)


def halved(pipe):
    pipe.vae.half()


def replaced(pipe):
    old = pipe.te
    pipe.te = Part(old.up.out_features + 8).eval()
    pipe.te.load_state_dict(
        {
            name: torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape)
            for name, tensor in pipe.te.state_dict().items()
        }
    )
    pipe.te.to(old.device)


class Lora(nn.Module):
    """A linear layer and what an adapter adds to it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, 4).to(base.weight.device)
        self.b = nn.Linear(4, base.out_features).to(base.weight.device)
        for module in (self.a, self.b):
            nn.init.constant_(module.weight, 0.02), nn.init.zeros_(module.bias)

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x.to(self.a.weight.dtype)))


def adapted(pipe):
    for part in {pipe.unet, pipe.te2}:
        if isinstance(part.up, Lora):
            part.up = part.up.base
        else:
            part.up = Lora(part.up)


CHANGES = [
    in_place, data_increment, loaded, assigned, cast_one, cast_all, halved, replaced, adapted
]  # fmt: skip


class Only:
    """A pipeline of one part, for what changes every part."""

    def __init__(self, part):
        self.components = {"part": part}
        self.unet = self.te2 = part


def parts(pipe):
    return [part for part in pipe.components.values() if part is not None]


def room_for(change, is_tight):
    if not is_tight:
        return "8GiB"
    return 600_000 if change in (cast_one, cast_all) else TIGHT  # float64 takes twice the room


@pytest.mark.parametrize("is_tight", [False, True], ids=["kept", "fetched ahead"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_calls_is_seen_by_the_next(sim_device, change, is_tight):
    pipe, twin, x = make(), make(), noise()  # a twin on the host is no less exact
    with offload_engine.attach(pipe, vram=room_for(change, is_tight)) as engine:
        for number in range(4):
            assert torch.equal(pipe(x), twin(x))
            if number:
                assert torch.equal(pipe(x), twin(x))
            torch.accelerator.synchronize()  # else see the next test
            change(pipe), change(twin)
        assert torch.equal(pipe(x), twin(x))
        torch.accelerator.synchronize()
        change(pipe), change(twin)
        engine.release()
        assert torch.equal(pipe(x), twin(x))
    for name, value in twin.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], value.cpu())


@pytest.mark.parametrize("is_tight", [False, True], ids=["kept", "fetched ahead"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_while_a_fetch_ahead_is_under_way_is_seen_by_the_next_call(
    sim_device, change, is_tight
):
    """The copy that reads what is written meanwhile is thrown away: the simulator, which cannot
    know that, may object to the write, and to nothing else."""
    pipe, twin, x = make(), make(), noise()  # a twin on the host is no less exact
    ALLOWED.add("source-changed")
    vram = room_for(change, is_tight)
    with offload_engine.attach(pipe, vram=vram) as engine, sim.allow("source-changed"):
        sim.configure(h2d_bandwidth=1e8)
        on_their_way = set()
        for _ in range(4):
            assert torch.equal(pipe(x), twin(x))
            units = engine._residency.units.values()
            on_their_way |= {unit.name for unit in units if unit.state is State.LOADING}
            change(pipe), change(twin)
        assert torch.equal(pipe(x), twin(x))
        assert on_their_way


@pytest.mark.parametrize("vram", ["8GiB", TIGHT, None])
def test_what_a_call_has_released_may_be_written_once_it_returns(sim_device, vram):
    """Its result is still on the device, so the host has waited for nothing yet."""
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe, vram=vram) as engine:
        sim.configure(h2d_bandwidth=1e8)
        for _ in range(3):
            result = pipe(x, output_type="device")
            for unit in engine._residency.units.values():
                if unit.state is State.HOST:
                    with torch.no_grad():
                        unit.modules[0].up.weight.mul_(2).mul_(0.5)
            assert torch.equal(result.cpu(), expected.output)


@pytest.mark.parametrize("change", [in_place, data_increment, loaded, assigned, adapted])
@pytest.mark.parametrize("vram", ["8GiB", TIGHT, None])
def test_a_change_of_the_denoiser_between_two_steps_is_seen(sim_device, change, vram):
    pipe, twin, x = make(), make(), noise()  # a twin on the host is no less exact

    def on_step(pipe, step):
        if step == 1:
            change(Only(pipe.unet))

    with offload_engine.attach(pipe, vram=vram):
        sim.configure(h2d_bandwidth=1e8)
        for _ in range(4):
            assert torch.equal(pipe(x, on_step=on_step), twin(x, on_step=on_step))


@pytest.mark.sim(capacity="1MB")
def test_a_component_that_outgrows_its_slot_is_planned_with_its_new_size(sim_device, caplog):
    pipe, x = make(), noise()
    budget = 400_000
    with offload_engine.attach(pipe, vram=budget) as engine:
        for _ in range(2):
            pipe(x)
        engine.release()
        pipe.te.to(torch.float64), pipe.te2.to(torch.float64)
        for _ in range(3):
            peak_from_here()
            pipe(x)
            assert torch.accelerator.max_memory_allocated() <= budget
        assert engine.plan.nbytes["te2"] >= 2 * total_nbytes(make().te2)
        report = engine.report()
        assert close(report.seconds, report.predicted_seconds)
    assert not caplog.records


# ---- beside others


@pytest.mark.parametrize("vram", [TIGHT, "8GiB"])
def test_a_pipeline_may_be_called_in_the_middle_of_a_call_of_another(sim_device, vram):
    outer, inner, x = make(), make(seed=1), noise()
    expected = [unoffloaded(pipe, x).output for pipe in (outer, inner)]
    results = []

    def on_step(pipe, step):
        if step % 2:
            results.append(inner(x))

    with offload_engine.attach(outer, vram=vram) as one, offload_engine.attach(inner, vram=vram):
        sim.configure(capacity_nbytes=TIGHT if vram == TIGHT else 2**30)
        for _ in range(3):
            assert torch.equal(outer(x, on_step=on_step), expected[0])
            assert torch.equal(inner(x), expected[1])
        assert len(results) == 6 and all(torch.equal(each, expected[1]) for each in results)
        for _ in range(3):
            assert torch.equal(outer(x), expected[0])
        assert one.report().predicted_seconds is not None


def test_a_call_in_another_thread_between_two_steps_disturbs_nobody(sim_device):
    one, other, x = make(), make(seed=1), noise()
    expected = [unoffloaded(pipe, x).output for pipe in (one, other)]

    def on_step(pipe, step):
        if step == 1:
            found = []
            thread = threading.Thread(target=lambda: found.append(other(x)))
            thread.start(), thread.join()
            assert torch.equal(found[0], expected[1])

    with offload_engine.attach(one, vram=TIGHT), offload_engine.attach(other, vram=TIGHT):
        for _ in range(3):
            assert torch.equal(one(x, on_step=on_step), expected[0])
            assert torch.equal(one(x), expected[0])


def test_after_running_out_of_memory_beside_what_a_budget_keeps_the_next_try_has_the_room(
    sim_device,
):
    """Weights get their room at once; activations are not the engine's to allocate."""
    kept, chain, x = make(), make(scratch={"vae": 1000}, seed=1), noise(64)
    expected = [unoffloaded(pipe, x).output for pipe in (kept, chain)]
    budget = sum(total_nbytes(part) for part in kept.components.values())
    with offload_engine.attach(kept, vram=budget) as engine, offload_engine.attach(chain):
        sim.configure(capacity_nbytes=budget)
        for _ in range(2):
            assert torch.equal(kept(x), expected[0])
        assert engine.resident
        try:
            output = chain(x)
        except torch.OutOfMemoryError:
            gc.collect()
            output = chain(x)
        assert torch.equal(output, expected[1])
        assert torch.equal(kept(x), expected[0])


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
def test_a_pipeline_that_is_dropped_takes_its_weights_along(sim_device, alone):
    """Also where another one shares the budget."""
    kept, dropped, x = make(), make(seed=1), noise()
    expected = unoffloaded(kept, x)
    with contextlib.nullcontext() if alone else offload_engine.attach(kept, vram="8GiB"):
        engines = [] if alone else [kept._offload_engine]
        kept(x)
        pinned_nbytes = sim.counters().pinned_nbytes
        offload_engine.attach(dropped, vram="8GiB")
        dropped(x)
        torch.accelerator.synchronize()
        del dropped
        gc.collect()
        for engine in engines:
            engine.release()
        assert torch.accelerator.memory_allocated() == 0
        assert sim.counters().pinned_nbytes == pinned_nbytes
        assert torch.equal(kept(x), expected.output)


@pytest.mark.parametrize("vram", [TIGHT, "8GiB"])
def test_a_pipeline_may_be_dropped_while_its_next_weights_are_on_their_way(sim_device, vram):
    """Their slots must not be lent anew while the copy stream still writes to them."""
    pipe, x = make(), noise()
    offload_engine.attach(pipe, vram=vram)
    sim.configure(h2d_bandwidth=1e8)
    pipe(x)
    del pipe
    gc.collect()
    torch.zeros(100_000, device=sim_device)
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated() == 0


def test_each_device_has_a_budget_of_its_own(sim_device):
    pipes, x = [make(), make(seed=1)], noise()
    expected = [unoffloaded(pipe, x).output for pipe in pipes]
    engines = [
        offload_engine.attach(pipe, vram=TIGHT, gpu_id=index) for index, pipe in enumerate(pipes)
    ]
    for _ in range(3):
        for pipe, output in zip(pipes, expected, strict=True):
            assert torch.equal(pipe(x), output)
    kept = [engine.resident for engine in engines]
    assert all(kept)
    engines[0].detach()
    assert engines[1].resident == kept[1]
    assert torch.equal(pipes[1](x), expected[1])
    engines[1].detach()


def test_on_the_cpu_a_budget_is_legal_and_nothing_moves(sim_device):
    pipe, x = make(), noise()
    expected = pipe(x)
    before = sim.counters()
    for vram in ("8GiB", TIGHT, "auto"):
        with offload_engine.attach(pipe, device="cpu", vram=vram) as engine:
            for _ in range(3):
                assert torch.equal(pipe(x), expected)
            engine.report(), engine.release()
    assert sim.counters().since(before).h2d_nbytes == 0


def test_what_is_excluded_from_offload_stays_and_counts(sim_device, caplog, monkeypatch):
    monkeypatch.setattr(Miniature, "_exclude_from_cpu_offload", ["te2"])
    monkeypatch.setattr(Miniature, "model_cpu_offload_seq", "te->controlnet->unet->vae")
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    budget = total_nbytes(pipe.te2) + TIGHT
    with offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget)
        for _ in range(4):
            assert torch.equal(pipe(x), expected.output)
            assert "te2" in engine.resident
        report = engine.report()
        assert close(report.seconds, report.predicted_seconds)
    assert not caplog.records


# ---- another number of steps


@pytest.mark.parametrize("name", ["flux"])
def test_a_real_pipeline_with_another_number_of_steps_is_planned_for_at_once(sim_device, name):
    case, budget = PIPELINES[name], between(name, 0.45)
    pipe = fresh(name)
    with offload_engine.attach(pipe, case.seq, vram=budget) as engine:
        sim.configure(capacity_nbytes=budget, h2d_bandwidth=1e9)
        case.run(pipe, 3)
        for steps in (5, 2, 3, 3, 8):
            call, report = measured(lambda steps=steps: case.run(pipe, steps)), engine.report()
            assert report.predicted_seconds is not None
            assert close(report.seconds, report.predicted_seconds, 0.03), steps
            assert close(call.seconds, report.predicted_seconds, 0.03), steps
            if steps == 2:
                assert torch.equal(call.output, plain(name).output)


@pytest.mark.parametrize("vram", [None, TIGHT, "8GiB"])
def test_a_first_call_that_has_to_warm_up_is_not_what_is_predicted(sim_device, vram):
    """Kernels are loaded, tuned or compiled in it. Where everything fits nothing moves any more:
    all the same that must be seen once."""
    pipe, x = make(seconds={"te": 1e-4, "te2": 1e-4, "unet": 1e-4, "vae": 1e-4}), noise()
    with offload_engine.attach(pipe, vram=vram) as engine:
        pipe(x, on_step=lambda pipe, step: sim.spend(1e-2))
        for _ in range(3):
            pipe(x)
        report = engine.report()
        assert close(report.seconds, report.predicted_seconds)
        assert report.efficiency <= 1.005


def test_chain_mode_too_sees_that_a_component_has_grown(sim_device):
    pipe, x = hungry(), noise(64)
    with offload_engine.attach(pipe):
        peak_from_here()
        pipe(x)
        pipe.te.to(torch.float64), pipe.te2.to(torch.float64), pipe.vae.to(torch.float64)
        pipe(x)
        first_peak_nbytes = torch.accelerator.max_memory_allocated()
    pipe = hungry()
    with offload_engine.attach(pipe):
        for _ in range(3):
            pipe(x)
        pipe.te.to(torch.float64), pipe.te2.to(torch.float64), pipe.vae.to(torch.float64)
        for _ in range(2):
            peak_from_here()
            pipe(x)
            assert torch.accelerator.max_memory_allocated() <= first_peak_nbytes
