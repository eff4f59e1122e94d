"""Each protocol rule of docs/architecture.md, kept; and broken on purpose, and caught.

The simulator raises on races, use after free and host memory that changes or goes while a copy
reads it; what it only counts is asserted on its counters.
"""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import offload_engine
from offload_engine import hooks, residency, sim, transfers
from offload_engine.guide import Move
from offload_engine.segments import View

from .miniature import make, noise


@pytest.fixture
def engine(sim_device, modules):
    return offload_engine.attach(modules, "te->unet->vae")


@torch.no_grad()
def run(modules, x, rounds=2):
    for _ in range(rounds):
        for module in modules.values():
            x = torch.tanh(module(x))
    return x.cpu()


def broken(provoke):
    """Whether the simulator objects to what ``provoke`` does."""
    try:
        provoke()
        torch.accelerator.synchronize()
    except (sim.Violation, RuntimeError) as error:
        seen = str(error)
        del error
        gc.collect()
        return seen
    return "; ".join(str(found) for found in sim.violations())


def test_kept_nothing_is_found(engine, modules, x):
    run(modules, x, rounds=3)
    engine.release()
    assert not sim.violations()


def test_a_steady_round_has_no_host_sync_no_record_stream_and_no_empty_cache(
    engine, modules, x, meter
):
    with torch.no_grad():
        for counted in (False, True, True):
            y = x
            for module in modules.values():
                y = module(y)
            moved = meter.read()
            if counted:
                assert moved.host_syncs == 0
                assert moved.record_stream_calls == 0
                assert moved.empty_cache_calls == 0
                assert moved.pageable_copies == 0
                assert moved.h2d_copies == 3


def deaf(which):
    """Link.order that ignores the waits that ``which(link, stream)`` picks."""

    def order(link, stream, event):
        if not which(link, stream):
            stream.wait_event(event)

    return order


def test_a_copy_that_does_not_wait_for_its_slot_is_caught(engine, modules, x, monkeypatch):
    only_copies = deaf(lambda link, stream: stream == link.copy_stream)
    monkeypatch.setattr(transfers.Link, "order", only_copies)
    assert broken(lambda: run(modules, x))


def test_compute_that_does_not_wait_for_the_copy_is_caught(engine, modules, x, monkeypatch):
    only_compute = deaf(lambda link, stream: stream != link.copy_stream)
    monkeypatch.setattr(transfers.Link, "order", only_compute)
    assert broken(lambda: run(modules, x))


def on_two_streams(modules, x, side):
    """The unet runs on a side stream, too; then its slot goes, and the memory is lent anew."""
    with torch.no_grad():
        for _ in range(2):
            modules["te"](x)
            modules["unet"](x)
            side.wait_stream(torch.accelerator.current_stream())
            with side:
                y = modules["unet"](x)
            modules["vae"](x)
        torch.accelerator.current_stream().wait_stream(side)
    return y.cpu()


def test_a_second_compute_stream_is_ordered_too(engine, modules, x, sim_device):
    assert on_two_streams(modules, x, torch.Stream(device=sim_device)) is not None
    assert not sim.violations()


def test_a_slot_dropped_while_another_stream_uses_it_is_caught(
    engine, modules, x, sim_device, monkeypatch
):
    monkeypatch.setattr(transfers.Link, "join", lambda link, fetch: None)
    assert broken(lambda: on_two_streams(modules, x, torch.Stream(device=sim_device)))


def test_a_stream_that_did_not_wait_is_caught(engine, modules, x, sim_device, monkeypatch):
    """The fast path tells streams apart; without that the side stream reads too early."""
    monkeypatch.setattr(engine._walker, "stream_key", lambda: None)
    side = torch.Stream(device=sim_device)

    def provoke():
        modules["unet"](x)
        with side:
            modules["unet"](x)

    assert broken(provoke)


def test_masters_freed_while_a_copy_reads_them_are_caught(engine, modules, x, monkeypatch):
    monkeypatch.setattr(residency.Unit, "finish", lambda unit, link: None)
    monkeypatch.setattr(engine, "report", lambda: None)  # it waits for copies, to time them
    monkeypatch.setattr(transfers.Link, "order", deaf(lambda link, s: s != link.copy_stream))
    monkeypatch.setattr(transfers.Link, "join", lambda link, fetch: None)

    def provoke():
        unit = engine._mounts["unet"].unit
        engine._residency.enter(unit, Move((), (unit.name,)))
        engine.detach()
        gc.collect()

    assert broken(provoke)


def test_a_master_written_while_a_copy_reads_it_is_caught(engine, modules, x, monkeypatch):
    def provoke():
        unit = engine._mounts["unet"].unit
        engine._residency.enter(unit, Move((), (unit.name,)))
        weight = next(iter(unit._weights.values()))
        weight.host.fill_(3.0)
        torch.accelerator.synchronize()

    monkeypatch.setattr(transfers.Link, "order", deaf(lambda link, s: s != link.copy_stream))
    assert broken(provoke)


def test_a_slot_that_is_collected_while_a_copy_fills_it_is_settled_and_would_be_caught(
    sim_device, monkeypatch
):
    """Kept: test_a_pipeline_may_be_dropped_while_its_next_weights_are_on_their_way."""
    monkeypatch.setattr(transfers._InFlight, "settle", lambda in_flight: None)

    def provoke():
        pipe, x = make(), noise()
        offload_engine.attach(pipe, vram="8GiB")
        sim.configure(h2d_bandwidth=1e8)
        pipe(x)  # then what the next call begins with is on its way
        del pipe
        gc.collect()
        torch.zeros(100_000, device=sim_device)

    assert broken(provoke)


def test_release_gives_the_memory_back_and_parameters_not_re_pointed_would_keep_it(
    engine, modules, x, monkeypatch
):
    base = torch.accelerator.memory_allocated()
    run(modules, x)
    engine.release()
    assert torch.accelerator.memory_allocated() == base
    point = residency._point

    def only_up(tensor, data):
        if data.device.type != "cpu":
            point(tensor, data)

    monkeypatch.setattr(residency, "_point", only_up)
    with torch.no_grad():
        modules["unet"](x)
    engine.release()
    assert torch.accelerator.memory_allocated() > base


def test_without_the_check_for_changes_a_change_is_lost(engine, modules, x, monkeypatch):
    monkeypatch.setattr(residency, "_changed", lambda *_: False)
    with torch.no_grad():
        before = modules["unet"](x).cpu()
        modules["unet"][0].weight.mul_(2)
        assert not torch.equal(modules["unet"](x).cpu(), before)
        modules["vae"](x)
        assert torch.equal(modules["unet"](x).cpu(), before)  # lost: what the check prevents


def test_inference_mode_weights_run_and_normal_tensors_in_their_place_would_not(
    sim_device, monkeypatch
):
    with torch.inference_mode():
        modules = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
        x = torch.randn(2, 8).to(sim_device)
        engine = offload_engine.attach(modules, "a->b")
        for _ in range(2):
            modules["b"](modules["a"](x))
        assert modules["b"].weight.is_inference()
        engine.release()
        assert modules["b"].weight.is_inference()
        in_place = View.on
        monkeypatch.setattr(
            View, "on", lambda view, *rest: in_place(view._replace(inference=False), *rest)
        )
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            modules["a"](x).view(-1), repr(modules["a"].weight)


def test_normal_weights_stay_trainable_when_fetched_in_inference_mode(engine, modules, x):
    with torch.inference_mode():
        modules["te"](x)
    with torch.autograd.set_multithreading_enabled(False):
        modules["te"](x).sum().backward()
    assert all(p.grad is not None for p in modules["te"].parameters())


def test_what_belongs_to_the_process_is_left_alone(engine, modules, x, monkeypatch, sim_device):
    def never(*_, **__):
        raise AssertionError("peak statistics are the user's")

    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", never)
    stream, device = torch.accelerator.current_stream(), torch.accelerator.current_device_index()
    side = torch.Stream(device=sim_device)
    with side:
        run(modules, x)
        assert torch.accelerator.current_stream() == side
    sim.inject_oom(after=1)
    run(modules, x)
    assert torch.accelerator.current_stream() == stream
    assert torch.accelerator.current_device_index() == device
    assert torch.get_default_device() == torch.device("cpu")
    engine.report()


def test_the_second_device_is_used_without_being_made_current(modules, sim_device):
    gc.collect()
    before = torch.accelerator.memory_allocated(sim_device)
    other = torch.device("sim", 1)
    x = torch.randn(4, 64).to(other)
    expected = run({n: m.to(other) for n, m in modules.items()}, x)
    for module in modules.values():
        module.to("cpu")
    engine = offload_engine.attach(modules, "te->unet->vae", gpu_id=1)
    assert torch.equal(run(modules, x), expected)
    assert engine.device == other
    assert torch.accelerator.current_device_index() == 0
    assert torch.accelerator.memory_allocated(sim_device) == before


def test_host_memory_goes_back_when_an_attached_pipeline_is_dropped(sim_device):
    gc.collect()
    before = sim.counters().pinned_nbytes
    modules = {"a": nn.Linear(300, 300), "b": nn.Linear(300, 300)}
    engine = offload_engine.attach(modules, "a->b")
    modules["a"](torch.randn(1, 300).to(sim_device))
    assert sim.counters().pinned_nbytes > before
    del modules, engine
    gc.collect()
    assert sim.counters().pinned_nbytes == before


def test_without_doors_a_submodule_called_first_is_caught(sim_device, modules, x, monkeypatch):
    expected = modules["te"][0].to(sim_device)(x)
    modules["te"].to("cpu")
    with offload_engine.attach(modules, "te->unet->vae"):
        assert torch.equal(modules["te"][0](x), expected)
        assert torch.equal(modules["te"][0](x.cpu()).to(sim_device), expected)
    monkeypatch.setattr(hooks.UnitDoors, "arm", lambda *_: None)
    offload_engine.attach(modules, "te->unet->vae")
    assert "same device" in broken(lambda: modules["te"][0](x))


def test_without_its_entry_a_method_is_caught(sim_device, monkeypatch):
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((64,), 3.0))

        def decode(self, z):
            return z * self.scale  # no submodule is called

    coder, z = Coder(), torch.ones(2, 64).to(sim_device)
    with offload_engine.attach({"vae": coder}, "vae"):
        assert (coder.decode(z) == 3).all()
    monkeypatch.setattr(hooks, "_entry_methods", lambda module: [])
    offload_engine.attach({"vae": coder}, "vae")
    assert "same device" in broken(lambda: coder.decode(z))


def test_arguments_left_on_the_host_are_moved_and_would_be_caught(engine, modules, x, monkeypatch):
    expected = modules["te"](x)
    modules["unet"](x)
    assert torch.equal(modules["te"](x.cpu()), expected)
    modules["unet"](x)
    monkeypatch.setattr(hooks, "to_device", lambda value, device: value)
    assert "same device" in broken(lambda: modules["te"](x.cpu()))


def originals(module):
    """Weak references to the memory that the weights of ``module`` are in."""
    references = []
    for parameter in module.parameters():
        array = parameter.detach().numpy().copy().view(Owned)
        parameter.data = torch.from_numpy(array)
        references.append(weakref.ref(array))
    return references


class Owned(np.ndarray):
    """An array that can be referred to weakly."""


def test_each_weight_lets_its_old_memory_go_before_the_next_moves(sim_device, modules, monkeypatch):
    for keep in (False, True):
        old = originals(modules["unet"])
        kept, alive = [], []
        copy = residency._copy

        def watched(target, source, copy=copy, keep=keep, kept=kept, alive=alive, old=old):
            alive.append(sum(ref() is not None for ref in old))
            if keep:
                kept.append(source.data)
            copy(target, source)

        monkeypatch.setattr(residency, "_copy", watched)
        offload_engine.attach(modules, "te->unet->vae").detach()
        monkeypatch.setattr(residency, "_copy", copy)
        moved = [b - a for a, b in itertools.pairwise(alive) if b != a]
        one_by_one = bool(moved) and set(moved) == {-1}
        assert one_by_one is not keep
