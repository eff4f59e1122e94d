"""What is counted, and when."""

from __future__ import annotations

import pytest
import torch

from offload_engine import sim


@pytest.fixture
def count(device):
    """Runs something and returns what it added to the counters."""

    def run(action):
        before = sim.counters()
        kept = action()
        del kept
        return sim.counters().since(before)

    return run


def test_copies_are_counted_by_direction_and_bytes(device, count):
    host = torch.zeros(100, dtype=torch.uint8).pin_memory()
    there = torch.zeros(100, dtype=torch.uint8, device=device)
    up = count(lambda: there.copy_(host, non_blocking=True))
    assert (up.h2d_nbytes, up.h2d_copies, up.d2h_copies, up.pageable_copies) == (100, 1, 0, 0)
    down = count(lambda: host.copy_(there, non_blocking=True))
    assert (down.d2h_nbytes, down.d2h_copies, down.h2d_copies) == (100, 1, 0)
    across = count(lambda: there.clone())
    assert (across.d2d_nbytes, across.h2d_nbytes, across.d2h_nbytes) == (100, 0, 0)
    away = count(lambda: there.to("sim:1"))
    assert away.d2d_nbytes == 100
    torch.accelerator.synchronize()


def test_a_copy_from_or_to_ordinary_memory_is_pageable(device, count):
    there = torch.zeros(8, device=device)
    assert count(lambda: torch.zeros(8).to(device)).pageable_copies == 1
    assert count(lambda: there.cpu()).pageable_copies == 1


def test_a_copy_that_must_convert_on_the_way_is_pageable(device, count):
    """As with CUDA: the CPU converts into a temporary, which is not pinned."""
    host = torch.zeros(8).pin_memory()
    there = torch.zeros(8, dtype=torch.bfloat16, device=device)
    assert count(lambda: there.copy_(host, non_blocking=True)).pageable_copies == 1


def test_only_a_host_that_waits_is_counted_as_waiting(device, count):
    def nothing_to_wait_for():
        torch.accelerator.synchronize()
        torch.accelerator.synchronize()

    def one_wait():
        sim.spend(1e-3)
        torch.accelerator.synchronize()
        torch.accelerator.synchronize()

    torch.accelerator.synchronize()
    assert count(nothing_to_wait_for).host_syncs == 0
    assert count(one_wait).host_syncs == 1


def test_an_answer_for_the_host_is_a_wait(device, count):
    x = torch.ones(4, device=device)
    assert count(lambda: x.sum().item()).host_syncs == 1
    assert count(lambda: torch.equal(x, x)).host_syncs == 1
    assert count(lambda: x.nonzero()).host_syncs == 1
    assert count(lambda: x[x > 0]).host_syncs == 1
    assert count(lambda: x.cpu()).host_syncs == 1
    assert count(lambda: torch.relu(x) + 1).host_syncs == 0


def test_asynchronous_copies_do_not_wait(device, count):
    host = torch.zeros(8).pin_memory()
    there = torch.zeros(8, device=device)
    assert count(lambda: there.copy_(host, non_blocking=True)).host_syncs == 0
    assert count(lambda: host.copy_(there, non_blocking=True)).host_syncs == 0
    assert count(lambda: there.copy_(host)).host_syncs == 1
    torch.accelerator.synchronize()


def test_the_calls_that_a_steady_path_avoids_are_counted(device, count):
    x = torch.ones(4, device=device)
    side = torch.Stream(device=device)
    assert count(lambda: x.record_stream(side)).record_stream_calls == 1
    assert count(torch.accelerator.empty_cache).empty_cache_calls == 1
    assert count(lambda: x + 1).allocations == 1
    assert count(lambda: x.add_(1)).allocations == 0


def test_since_keeps_the_pinned_numbers_as_they_are(device):
    _pinned = torch.zeros(100, dtype=torch.uint8).pin_memory()
    before = sim.counters()
    difference = sim.counters().since(before)
    assert difference.pinned_nbytes == before.pinned_nbytes >= 100
    assert difference.allocations == 0


def test_reset_starts_counting_anew(device):
    torch.ones(4, device=device).cpu()
    sim.reset()
    counters = sim.counters()
    assert (counters.d2h_nbytes, counters.host_syncs, counters.allocations) == (0, 0, 0)
    assert sim.now() == 0
