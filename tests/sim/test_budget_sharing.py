"""Several pipelines on one device: one budget, one residency where they share modules.

Wherever memory is short the simulated device has exactly the budget.
"""

import contextlib
import gc
import threading

import pytest
import torch
from torch import nn

import offload_engine
from offload_engine import sim

from .budgets import TIGHT, peak_from_here
from .conftest import total_nbytes
from .miniature import Miniature, make, measured, noise, unoffloaded

pytestmark = pytest.mark.usefixtures("clean")


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


def test_what_goes_first_is_what_the_other_pipeline_needs_last(sim_device):
    first, second, x = make(), make(seed=1), noise()
    weights = sum(total_nbytes(part) for part in first.components.values())
    with (
        offload_engine.attach(first, vram=weights + 100_000),
        offload_engine.attach(second, vram=weights + 100_000) as other,
    ):
        for _ in range(2):
            for pipe in (first, second):
                for _ in range(3):
                    pipe(x)
        units = {unit.name: name for name, mount in other._mounts.items() for unit in mount.units}
        assert {"te", "te2", "unet", "vae"} <= set(other.resident)
        first(x)
        gone = [e.unit for e in other._residency.log if e.kind == "release" and e.unit in units]
        order = [units[name] for name in gone]
        assert order == ["vae", "unet"]


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


@pytest.mark.parametrize("vram", [None, TIGHT])
def test_a_pipeline_that_shares_modules_with_two_joins_them(sim_device, vram):
    pipes, x = [make(seed=seed) for seed in range(3)], noise()
    pipes[2].te, pipes[2].vae = pipes[0].te, pipes[1].vae
    expected = [unoffloaded(pipe, x).output for pipe in pipes]
    engines = [offload_engine.attach(pipe, vram=vram) for pipe in pipes]
    units = {unit for engine in engines for unit in engine._units}
    residency = engines[2]._residency
    assert units == set(residency.units.values())
    assert all(residency.units[unit.name] is unit for unit in units)
    for _ in range(3):
        for pipe, engine, output in zip(pipes, engines, expected, strict=True):
            peak_from_here()
            assert torch.equal(pipe(x), output)
            assert torch.accelerator.max_memory_allocated() <= TIGHT
            assert len(engine._meter.marks) == 4
            assert vram is not None or torch.accelerator.memory_allocated() == 0
    for engine in engines:
        engine.release()
    assert torch.accelerator.memory_allocated() == 0


def test_one_budget_is_kept_by_whoever_joins_it_later(sim_device):
    pipes, x = [make(seed=seed) for seed in range(2)], noise()
    expected = [unoffloaded(pipe, x).output for pipe in pipes]
    offload_engine.attach(pipes[0], vram=TIGHT)
    offload_engine.attach(pipes[1])
    engines = [pipes[0]._offload_engine, offload_engine.attach(pipes[1], vram=TIGHT)]
    sim.configure(capacity_nbytes=TIGHT)
    for number in range(3):
        for pipe, engine, output in zip(pipes, engines, expected, strict=True):
            assert torch.equal(pipe(x), output)
            assert number == 0 or engine.plan is not None
    for engine in engines:
        engine.release()
    assert torch.accelerator.memory_allocated() == 0


def test_casts_keep_to_the_tightest_budget_on_the_device(sim_device):
    pipes = [make(seed=seed) for seed in range(2)]
    loose = offload_engine.attach(pipes[0], vram="8GiB")
    tight = offload_engine.attach(pipes[1], vram=TIGHT)
    assert loose._walker is tight._walker
    assert loose._walker.vram_nbytes == TIGHT
    tight.detach()
    assert loose._walker.vram_nbytes == 2**33
    loose.detach()


def plain_parts(*names):
    """Parts that read their weights themselves: no submodule's hook would notice an absence."""
    return {name: nn.Linear(64, 64).eval() for name in names}


def test_what_a_surprise_releases_is_fetched_again_when_it_runs(sim_device):
    """Where all fits, units run unasked, until the call does something new."""

    class Pipe:
        def __init__(self):
            self.components = plain_parts("te", "unet", "controlnet", "vae")

        @torch.no_grad()
        def __call__(self, x, loop):
            x = x.to(sim_device)
            for name in ("te", *loop * 3, "vae"):
                x = torch.tanh(self.components[name](x))
            return x.cpu()

    pipe, x = Pipe(), noise()
    with offload_engine.attach(pipe, "te->unet->controlnet->vae", vram="8GiB") as engine:
        for _ in range(3):
            pipe(x, ["unet"])
        assert engine.plan.fetched_nbytes == 0
        assert pipe(x, ["unet", "controlnet"]).isfinite().all()


def test_what_another_pipeline_pushes_out_is_fetched_again_when_it_runs(sim_device):
    mine, theirs, x = plain_parts("vae", "other"), {"large": nn.Linear(500, 500)}, noise()
    with (
        torch.no_grad(),
        offload_engine.attach(mine, "vae->other") as engine,
        offload_engine.attach(theirs, "large"),
    ):
        x = x.to(sim_device)
        expected = mine["vae"](x)
        held = torch.accelerator.memory_allocated()
        sim.configure(capacity_nbytes=held + 500 * 500 * 4)  # not for its bias
        theirs["large"](torch.zeros(1, 500))
        sim.configure(capacity_nbytes=2**33)
        assert engine.resident == ()
        assert torch.equal(mine["vae"](x), expected)


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
        assert report.seconds == pytest.approx(report.predicted_seconds, rel=0.02)
    assert not caplog.records
