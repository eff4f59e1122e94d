"""Within a budget: larger work, kept results, changed weights, memory that runs out.

Wherever memory is short the simulated device has exactly the budget.
"""

import gc

import pytest
import torch
from torch import nn

import offload_engine
from benchmarks.pipelines import PIPELINES
from offload_engine import sim
from offload_engine.residency import State

from .budgets import STEPS, TIGHT, fresh, peak_from_here, plain
from .conftest import total_nbytes
from .miniature import Part, make, measured, noise, unoffloaded

pytestmark = pytest.mark.usefixtures("clean")


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
            assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
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
                assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
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
            assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)


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
    sim_device, allowed, change, is_tight
):
    """The copy that reads what is written meanwhile is thrown away: the simulator, which cannot
    know that, may object to the write, and to nothing else."""
    pipe, twin, x = make(), make(), noise()  # a twin on the host is no less exact
    allowed.add("source-changed")
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
        assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
    assert not caplog.records
