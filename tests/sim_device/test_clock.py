"""Virtual time: exact, the same on every run, and only as long as the work that was queued."""

from __future__ import annotations

import pytest
import torch

from offload_engine import sim

MILLISECOND = 24_000_000  # bytes that the default link moves in one


@pytest.fixture(autouse=True)
def free_launches(device):
    sim.configure(launch_seconds=0, memory_bandwidth=float("inf"))


def timed() -> torch.Event:
    return torch.Event(device="sim", enable_timing=True)


def current() -> torch.Stream:
    return torch.accelerator.current_stream()


def test_the_double_buffered_example_takes_exactly_as_long_as_on_paper(device):
    copies, waits = torch.Stream(device=device), []
    masters = [torch.zeros(MILLISECOND, dtype=torch.uint8).pin_memory() for _ in range(4)]
    slots = [torch.empty(MILLISECOND, dtype=torch.uint8, device=device) for _ in range(2)]
    start, end = timed(), timed()
    start.record()
    released = [current().record_event() for _ in slots]
    for layer, master in enumerate(masters):
        copies.wait_event(released[layer % 2])
        with copies:
            slots[layer % 2].copy_(master, non_blocking=True)
        asked, ready = timed(), timed()
        asked.record()
        current().wait_event(copies.record_event())
        ready.record()
        sim.spend(0.6e-3)
        released[layer % 2] = current().record_event()
        waits.append((asked, ready))
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) == 4.6
    stalls = [asked.elapsed_time(ready) for asked, ready in waits]
    assert stalls == [1.0, 0.4, 0.4, 0.4]
    assert sum(stalls) == pytest.approx(2.2)
    assert sim.now() == 4.6e-3


def test_a_copy_takes_its_bytes_over_the_bandwidth(device):
    sim.configure(h2d_bandwidth=10e9, d2h_bandwidth=5e9)
    host = torch.zeros(10_000_000, dtype=torch.uint8).pin_memory()
    there = host.to(device)
    assert sim.now() == 1e-3
    host.copy_(there)
    assert sim.now() == 3e-3


def test_a_pageable_copy_is_slower_and_holds_the_host(device):
    pageable = torch.zeros(12_000_000, dtype=torch.uint8)
    pageable.to(device, non_blocking=True)
    assert sim.now() == 1e-3


def test_the_host_goes_on_while_a_pinned_copy_runs(device):
    host = torch.zeros(MILLISECOND, dtype=torch.uint8).pin_memory()
    _there = host.to(device, non_blocking=True)
    assert sim.now() == 0
    torch.accelerator.synchronize()
    assert sim.now() == 1e-3


def test_the_two_directions_run_at_once_and_one_direction_takes_turns(device):
    up, down = torch.Stream(device=device), torch.Stream(device=device)
    host = torch.zeros(2, MILLISECOND, dtype=torch.uint8).pin_memory()
    there = torch.zeros(2, MILLISECOND, dtype=torch.uint8, device=device)
    torch.accelerator.synchronize()
    with up:
        there[0].copy_(host[0], non_blocking=True)
    with down:
        host[1].copy_(there[1], non_blocking=True)
    torch.accelerator.synchronize()
    assert sim.now() == 1e-3
    for stream, slot in ((up, there[0]), (down, there[1])):
        with stream:
            slot.copy_(host[0], non_blocking=True)
    torch.accelerator.synchronize()
    assert sim.now() == 3e-3


def test_work_that_waits_does_not_hold_up_work_that_is_ready(device):
    """A small upload on another stream passes a fetch that waits for its slot."""
    copies, other = torch.Stream(device=device), torch.Stream(device=device)
    slot = torch.empty(MILLISECOND, dtype=torch.uint8, device=device)
    host = torch.zeros(MILLISECOND, dtype=torch.uint8).pin_memory()
    sim.spend(5e-3)
    copies.wait_event(current().record_event())
    with copies:
        slot.copy_(host, non_blocking=True)
    with other:
        _there = host.to(device, non_blocking=True)
    other.synchronize()
    assert sim.now() == 1e-3
    copies.synchronize()
    assert sim.now() == 6e-3


def test_an_operator_takes_its_launch_and_the_bytes_that_it_touches(device):
    sim.configure(launch_seconds=1e-3, memory_bandwidth=1e9)
    x = torch.empty(1_000_000, dtype=torch.uint8, device=device)
    x + x  # launch, two operands that are one tensor read twice, one result
    torch.accelerator.synchronize()
    assert sim.now() == pytest.approx(4e-3)


def test_a_view_takes_no_time(device):
    sim.configure(launch_seconds=1e-3)
    torch.empty(4, 4, device=device).view(16)[2:].unflatten(0, (2, 7)).t()
    torch.accelerator.synchronize()
    assert sim.now() == 0


def test_an_event_is_over_when_its_time_has_come(device):
    done = torch.Event(device=device)
    sim.spend(3e-6)
    done.record()
    assert not done.query()
    done.synchronize()
    assert done.query()
    assert sim.now() == 3e-6


def test_a_loop_that_polls_an_event_comes_to_an_end(device):
    done = torch.Event(device=device)
    sim.spend(5e-6)
    done.record()
    polls = 0
    while not done.query():
        polls += 1
    assert polls == 5


def test_streams_share_one_compute_engine(device):
    side = torch.Stream(device=device)
    sim.spend(1e-3)
    with side:
        sim.spend(1e-3)
    torch.accelerator.synchronize()
    assert sim.now() == 2e-3


def test_each_device_has_engines_of_its_own(device):
    sim.spend(1e-3)
    with torch.sim.device(1):
        sim.spend(1e-3)
        torch.accelerator.synchronize()
    torch.accelerator.synchronize()
    assert sim.now() == 1e-3


def test_every_run_takes_the_same_time(device):
    sim.configure(launch_seconds=5e-6, memory_bandwidth=1e12)

    def seconds():
        started = sim.now()
        x = torch.randn(64, 64, device=device)
        for _ in range(10):
            x = torch.softmax(x @ x, -1) + 1
        x.cpu()
        return round((sim.now() - started) * 1e12)

    assert len({seconds() for _ in range(3)}) == 1
