"""`vram=`: whole components within a budget, planned. What the plan says is what happens.

Wherever memory is short the simulated device has exactly the budget: one byte more and it is out
of memory.
"""

import pytest
import torch

import offload_engine
from benchmarks.pipelines import PIPELINES
from offload_engine import forecast, sim
from offload_engine.hooks import Walker
from offload_engine.plan import PlanError

from .budgets import NAMES, STEPS, TIGHT, between, fresh, peak_from_here, plain
from .conftest import total_nbytes
from .miniature import make, measured, noise, unoffloaded, untouched

pytestmark = pytest.mark.usefixtures("clean")


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
                assert call.seconds == pytest.approx(plan_seconds, rel=0.02)
                assert report.seconds == pytest.approx(plan_seconds, rel=0.02)
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


@pytest.mark.parametrize("fraction", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inference_mode_gives_the_same_bits_in_half_precision(sim_device, name, fraction, dtype):
    """In calls that are watched as well: under a dispatch mode, composite operators would choose
    other kernels."""
    case, pipe = PIPELINES[name], PIPELINES[name].build("tiny", dtype)
    pipe.to(sim_device)
    with torch.inference_mode():
        expected = [torch.as_tensor(case.run(pipe, STEPS)) for _ in range(3)]
    pipe.to("cpu")
    vram = None if fraction is None else between(name, fraction)
    torch.empty(2**25, device=sim_device)  # so that torch's peak tells nothing
    with offload_engine.attach(pipe, case.seq, vram=vram), torch.inference_mode():
        for output in expected:
            assert torch.equal(torch.as_tensor(case.run(pipe, STEPS)), output)


@pytest.mark.parametrize("vram", [None, TIGHT, "8GiB"])
def test_the_reports_of_calls_have_all_that_was_moved(sim_device, vram):
    """What is fetched at the end of a call for the next one included."""
    pipe, x = make(), noise()
    with offload_engine.attach(pipe, vram=vram) as engine:
        for _ in range(4):
            call = measured(lambda: pipe(x))
            parts = engine.report().components.values()
            assert sum(p.fetched_nbytes for p in parts) == call.moved.h2d_nbytes - x.nbytes


def test_a_plan_that_cannot_be_made_is_tried_once(sim_device, monkeypatch, caplog):
    tried = []

    def plan(expected, nbytes, *, budget_nbytes, **_):
        tried.append(budget_nbytes)
        raise PlanError(0, ("unet",), budget_nbytes + 1, budget_nbytes)

    monkeypatch.setattr(forecast.Expected, "plan", plan)
    pipe, x = make(), noise()
    expected = unoffloaded(pipe, x)
    with offload_engine.attach(pipe, vram=TIGHT) as engine:
        for _ in range(5):
            assert torch.equal(pipe(x), expected.output)
        assert engine.plan is None
    assert 1 <= len(tried) == len(caplog.records) <= 2  # the second time it knows more


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
            assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
            assert call.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
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


@pytest.mark.parametrize("loop", ["unet", "unet controlnet"])
def test_chain_mode_fetches_ahead_where_the_process_had_a_higher_peak_before(sim_device, loop):
    """Then the first call tells nothing: the second is watched operator by operator."""
    pipe, x = hungry(), noise(64)
    pipe.controlnet.seconds = 2e-4
    expected = unoffloaded(pipe, x, loop=loop)
    with offload_engine.attach(pipe) as engine:
        sim.configure(h2d_bandwidth=1e9)
        peak_from_here()
        first = measured(lambda: pipe(x, loop=loop))
        peak_from_here()
        alone = measured(lambda: pipe(x, loop=loop)).peak_nbytes
    with offload_engine.attach(pipe) as engine:
        torch.empty(2**24, device=sim_device)  # and its memory is free again
        for number in range(4):
            call, report = measured(lambda: pipe(x, loop=loop)), engine.report()
            assert torch.equal(call.output, expected.output)
            assert (report.predicted_seconds is None) == (number < 2)
        assert call.seconds < 0.9 * first.seconds
        assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
        peak_from_here()
        assert measured(lambda: pipe(x, loop=loop)).peak_nbytes <= max(alone, first.peak_nbytes)


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
            assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.03), steps
            assert call.seconds == pytest.approx(report.predicted_seconds, rel=0.03), steps
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
        assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
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
