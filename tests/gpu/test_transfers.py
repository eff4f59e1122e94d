"""Streams, pinned masters, write-back: what only a real GPU does for real."""

import gc
import time

import pytest
import torch
from torch import nn

import offload_engine
from benchmarks import host
from offload_engine import host_store
from offload_engine.host_store import HostStore

from .conftest import MIB, WIDTH, Part, allocated, without_offload


def masters(engine):
    return [w.host for m in engine._mounts.values() for w in m.unit._weights.values()]


def blocks(engine):
    units = {id(mount.unit): mount.unit for mount in engine._mounts.values()}
    return [block for unit in units.values() for block in unit._blocks]


def test_masters_are_pinned_at_their_exact_size_and_not_after_detach(pipe, x, device, real):
    values = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    before = HostStore.pinned_nbytes
    engine = offload_engine.attach(pipe, device=device)
    weights = sum(part.nbytes for part in pipe.components.values())
    assert all(master.is_pinned() for master in masters(engine))
    assert all(p.is_pinned() for p in pipe.unet.parameters())
    held = sum(block.nbytes for block in blocks(engine))
    assert HostStore.pinned_nbytes - before == held
    assert weights <= held <= 1.001 * weights
    assert all(part.pinned for part in engine.report().components.values())
    if real:
        assert all(block.registered for block in blocks(engine))
    pipe(x)
    engine.detach()
    assert HostStore.pinned_nbytes == before
    assert not any(p.is_pinned() for p in pipe.unet.parameters())
    assert all(torch.equal(v, values[k]) for k, v in pipe.unet.state_dict().items())


def test_torchs_own_pinned_memory_which_rounds_up_is_not_used(pipe, device, real):
    if not real:
        pytest.skip("only CUDA masters are registered")

    def allocated_by_torch():
        return torch.cuda.host_memory_stats().get("allocated_bytes.current")

    before = allocated_by_torch()
    engine = offload_engine.attach(pipe, device=device)
    assert allocated_by_torch() == before
    engine.detach()


def test_a_pipeline_that_is_dropped_while_attached_gives_its_pinned_memory_back(device):
    gc.collect()
    before = HostStore.pinned_nbytes, allocated()
    modules = {"a": Part(32), "b": Part(32)}
    engine = offload_engine.attach(modules, "a->b", device=device)
    with torch.no_grad():
        modules["a"](torch.zeros(1, WIDTH, device=device))
    assert HostStore.pinned_nbytes > before[0]
    del modules, engine
    gc.collect()
    assert (HostStore.pinned_nbytes, allocated()) == before


def test_attaching_does_not_double_host_memory(device):
    modules = {"a": Part(256), "b": Part(256)}
    weights = sum(module.nbytes for module in modules.values())
    offload_engine.attach({"warm": nn.Linear(8, 8)}, "warm", device=device).detach()
    host.settle()
    before = host.rss_nbytes()
    if before is None or not host.forget_peak():
        pytest.skip("this system does not say how much memory a process has")
    engine = offload_engine.attach(modules, "a->b", device=device)
    peak = host.peak_rss_nbytes()
    host.settle()
    # The largest tensor is a quarter of the weights, and is there twice while it is moved.
    assert peak - before <= 0.27 * weights + 32 * MIB
    assert host.rss_nbytes() - before <= 0.05 * weights + 32 * MIB
    engine.detach()


def test_the_host_does_not_wait_for_a_fetch(device, real):
    if not real:
        pytest.skip("the simulated device has a clock of its own")
    modules = {"a": Part(1024), "b": Part(64)}
    x = torch.zeros(1, WIDTH, device=device)
    engine = offload_engine.attach(modules, "a->b", device=device)
    with torch.no_grad():
        for _ in range(2):
            modules["b"](x)
            torch.accelerator.synchronize()
            modules["a"](x)
            fetch = engine._mounts["a"].unit.fetch
            was_under_way = not fetch.ready.query()
            torch.accelerator.synchronize()
    assert was_under_way  # 1 GiB takes 15 ms and more; queueing it takes one


def test_a_fetch_is_timed_and_its_bandwidth_is_plausible(pipe, x, device):
    engine = offload_engine.attach(pipe, device=device)
    for _ in range(2):
        pipe(x)
    for name in ("te", "unet", "vae"):
        part = engine.report().components[name]
        assert part.fetched_nbytes >= getattr(pipe, name).nbytes
        assert 1e9 < part.fetched_nbytes / part.fetch_seconds < 1e12
        assert 0 <= part.stall_seconds < 60


def test_a_second_compute_stream_gets_the_weights_too(pipe, x, device):
    expected = without_offload(pipe, x, device)
    engine = offload_engine.attach(pipe, device=device)
    side = torch.Stream(device=device)
    for _ in range(3):
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            assert torch.equal(pipe(x), expected)
        torch.accelerator.current_stream().wait_stream(side)
        assert torch.equal(pipe(x), expected)
    assert engine.resident == ()


def test_one_component_on_two_streams_in_turn(device):
    modules = {"a": Part(64), "b": Part(64)}
    x = torch.randn(4, WIDTH, device=device)
    on_device = {name: Part(64).to(device) for name in modules}
    for name, module in modules.items():
        on_device[name].load_state_dict(module.state_dict())
    side = torch.Stream(device=device)
    offload_engine.attach(modules, "a->b", device=device)
    with torch.no_grad():
        expected = on_device["b"](on_device["a"](x))
        torch.accelerator.synchronize()
        for _ in range(5):
            y = modules["a"](x)
            side.wait_stream(torch.accelerator.current_stream())
            with side:
                z = modules["a"](x)
            torch.accelerator.current_stream().wait_stream(side)
            assert torch.equal(modules["b"](y), expected)
            assert torch.equal(modules["b"](z), expected)


def in_place(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def in_its_data(weight):
    weight.data += 0.25


def replaced(weight):
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [in_place, in_its_data, replaced])
@pytest.mark.parametrize("where", ["on the device", "on the host"])
def test_a_changed_weight_is_never_lost(pipe, x, device, change, where):
    engine = offload_engine.attach(pipe, device=device)
    x = x.to(device)
    with torch.no_grad():
        for _ in range(3):
            pipe.unet(x)
            if where == "on the host":
                engine.release()
            kind = pipe.unet[0].weight.device.type
            assert (kind == "cpu") == (where == "on the host")
            change(pipe.unet[0].weight)
            after = pipe.unet[0].weight.detach().cpu().clone()
            changed = pipe.unet(x).cpu()
            pipe.vae(x)
            assert torch.equal(pipe.unet[0].weight.cpu(), after)
            assert torch.equal(pipe.unet(x).cpu(), changed)
    engine.detach()
    assert torch.equal(pipe.unet[0].weight, after)


def test_what_did_not_change_is_not_written_back(pipe, x, device):
    engine = offload_engine.attach(pipe, device=device)
    for _ in range(2):
        pipe(x)
        parts = engine.report().components.values()
        assert sum(part.write_back_nbytes for part in parts) == 0


def test_over_the_limit_it_goes_on_pageable_and_says_so_once(pipe, x, device, caplog):
    expected = without_offload(pipe, x, device)
    engine = offload_engine.attach(pipe, device=device, pin="20MiB")
    assert [r for r in caplog.records if "pageable" in r.message] != []
    assert len([r for r in caplog.records if "pageable" in r.message]) == 1
    for _ in range(2):
        assert torch.equal(pipe(x), expected)
    assert not all(part.pinned for part in engine.report().components.values())


def test_a_registration_that_the_driver_refuses_leaves_no_error_behind(
    pipe, x, device, real, monkeypatch
):
    if not real:
        pytest.skip("only a driver keeps its last error")
    expected = without_offload(pipe, x, device)
    anonymous, undo = host_store._anonymous, []

    def registered_already(nbytes):
        flat = anonymous(nbytes)
        undo.append(host_store.register(flat, host_store.cuda_registrar(device)))
        return flat

    monkeypatch.setattr(host_store, "_anonymous", registered_already)
    engine = offload_engine.attach(pipe, device=device)
    assert torch.ones(8, device=device).sum().item() == 8
    assert not any(block.pinned for block in blocks(engine))
    assert torch.equal(pipe(x), expected)
    engine.detach()
    for each in undo:
        each()


def test_weights_that_start_on_the_gpu_leave_it(pipe, x, device):
    expected = without_offload(pipe, x, device)
    base = allocated()
    pipe.to(device)
    assert allocated() > base
    engine = offload_engine.attach(pipe, device=device)
    assert allocated() == base
    assert torch.equal(pipe(x), expected)
    engine.detach()


def test_detaching_right_after_a_fetch_was_queued_is_safe(pipe, x, device):
    expected = without_offload(pipe, x, device)
    for _ in range(5):
        engine = offload_engine.attach(pipe, device=device)
        with torch.no_grad():
            pipe.unet(x.to(device))
        engine.detach()
        noise = torch.full(
            (64 * MIB,), 1, dtype=torch.uint8
        )  # takes the memory that was given back
        del noise
    pipe.to(device)
    assert torch.equal(pipe(x), expected)
    pipe.to("cpu")


def test_another_gpu_is_used_without_being_made_current(pipe, x, device):
    if torch.accelerator.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device(device.type, 1)
    expected = without_offload(pipe, x, other)
    engine = offload_engine.attach(pipe, gpu_id=1)
    assert engine.device == other
    assert torch.equal(pipe(x), expected)
    assert torch.accelerator.current_device_index() == 0
    engine.detach()


def test_the_pipeline_is_not_slower_on_the_host_than_the_link_needs(pipe, x, device, real):
    """Not a benchmark: a second call of 104 MiB that takes a second has a wait in it."""
    if not real:
        pytest.skip("only a real link has a speed")
    engine = offload_engine.attach(pipe, device=device)
    for _ in range(3):
        pipe(x)
    torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        pipe(x)
    torch.accelerator.synchronize()
    seconds = (time.perf_counter() - began) / 5
    assert seconds < 1.0
    engine.detach()
