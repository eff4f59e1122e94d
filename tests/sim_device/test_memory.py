"""Device and pinned memory: exact bytes, capacity, poison, and failures on request."""

from __future__ import annotations

import pytest
import torch

from offload_engine import sim

acc = torch.accelerator
MiB = 2**20


def allocated(device: int | None = None) -> int:
    return acc.memory_allocated(device)


def bytes_on(device, nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def test_memory_is_counted_to_the_byte(device):
    before = allocated()
    odd = bytes_on(device, 1001)
    assert allocated() - before == 1001
    result = odd + odd
    assert allocated() - before == 2002
    del odd, result
    assert allocated() == before


def test_views_share_and_empty_tensors_take_nothing(device):
    before = allocated()
    x = bytes_on(device, 1000)
    _views = x[10:], x.view(10, 100).t(), x.view(torch.int16), torch.empty(0, device=device)
    assert allocated() - before == 1000


def test_live_blocks_are_counted(device):
    before = acc.memory_stats()["allocation.all.current"]
    blocks = [bytes_on(device, 1) for _ in range(5)]
    assert acc.memory_stats()["allocation.all.current"] - before == 5
    blocks.clear()
    assert acc.memory_stats()["allocation.all.current"] == before


def test_the_peak_is_kept_until_it_is_reset(device):
    before = allocated()
    x = bytes_on(device, 3 * MiB)
    del x
    _y = bytes_on(device, MiB)
    assert acc.max_memory_allocated() - before == 3 * MiB
    acc.reset_peak_memory_stats()
    assert acc.max_memory_allocated() - before == MiB


@pytest.mark.sim(capacity="8MiB")
def test_more_than_the_capacity_is_out_of_memory_with_the_numbers(device):
    held = bytes_on(device, 5 * MiB)
    assert torch.sim.mem_get_info() == (8 * MiB - allocated(), 8 * MiB)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 4\.00 MiB .* 8\.00 MiB"):
        bytes_on(device, 4 * MiB)
    assert acc.memory_stats()["num_ooms"] == 1
    del held
    bytes_on(device, 4 * MiB)


@pytest.mark.sim(capacity="8MiB")
def test_the_result_of_an_operator_must_fit_too(device):
    x = torch.zeros(3 * MiB, dtype=torch.uint8, device=device)
    y = x + 1
    with pytest.raises(torch.OutOfMemoryError):
        x + y
    del y
    assert (x + 1).sum() == 3 * MiB


@pytest.mark.sim(capacity="8MiB")
def test_memory_under_record_stream_is_not_free_before_its_stream_is_done(device):
    """What record_stream costs: the budget must hold the block until the other stream is done."""
    side = torch.Stream(device=device)
    x = bytes_on(device, 5 * MiB)
    side.wait_event(acc.current_stream().record_event())
    with side:
        sim.spend(1.0)
        x.fill_(0)
    x.record_stream(side)
    del x
    assert allocated() == 0
    assert torch.sim.mem_get_info()[0] == 3 * MiB
    waits = sim.counters().host_syncs
    bytes_on(device, 5 * MiB)  # waits, rather than fail
    assert sim.counters().host_syncs == waits + 1
    assert sim.now() >= 1.0


def test_new_memory_and_freed_memory_are_poison(device):
    x = torch.empty(64, device=device)
    assert x.isnan().all()
    assert (torch.empty(4, dtype=torch.int32, device=device) == -1).all()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.empty(4, dtype=dtype, device=device).isnan().all()


def test_each_device_has_memory_of_its_own(device):
    sim.configure(capacity_nbytes=MiB, device=torch.device("sim:1"))
    before = allocated(0), allocated(1)
    _x = bytes_on("sim:1", MiB // 2)
    assert (allocated(0), allocated(1)) == (before[0], before[1] + MiB // 2)
    assert torch.sim.mem_get_info(1)[1] == MiB
    assert torch.sim.mem_get_info(0)[1] > MiB
    with pytest.raises(torch.OutOfMemoryError, match="sim:1"):
        bytes_on("sim:1", MiB)


def test_the_chosen_allocation_fails_once(device):
    sim.inject_oom(after=2)
    bytes_on(device, 1)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        bytes_on(device, 1)
    bytes_on(device, 1)


def test_a_storage_grows_shrinks_and_keeps_its_bytes(device):
    before = allocated()
    x = torch.arange(4.0, device=device)
    x.untyped_storage().resize_(64)
    assert allocated() - before == 64
    assert x.tolist() == [0, 1, 2, 3]
    x.untyped_storage().resize_(0)
    assert allocated() == before


def test_out_arguments_grow_to_their_result(device):
    before = allocated()
    out = torch.empty(0, device=device)
    x = torch.ones(4, 4, device=device)
    torch.mm(x, x, out=out)
    assert out.tolist() == [[4.0] * 4] * 4
    assert allocated() - before == 2 * 64
    out.resize_(8, 4)
    assert out.shape == (8, 4)
    assert allocated() - before == 64 + 128


# ---- pinned --------------------------------------------------------------------------------------


def test_pinned_memory_is_known_by_its_address(device):
    x = torch.ones(1000).pin_memory()
    assert x.is_pinned() and x[10:].is_pinned()
    assert torch.from_numpy(x.numpy()[3:]).is_pinned()
    assert torch.empty(5, pin_memory=True).is_pinned()
    assert not torch.ones(1000).is_pinned()
    assert x.pin_memory() is x


def test_pinned_memory_is_counted_to_the_byte(device):
    before = sim.counters().pinned_nbytes
    x = torch.empty(1001, dtype=torch.uint8, pin_memory=True)
    y = torch.empty(1, dtype=torch.uint8, pin_memory=True)
    assert sim.counters().pinned_nbytes - before == 1002
    del x, y
    assert sim.counters().pinned_nbytes == before
    assert sim.counters().peak_pinned_nbytes - before == 1002


@pytest.mark.sim(pinned_limit="1MiB")
def test_more_than_the_pinned_limit_is_an_error(device):
    with pytest.raises(RuntimeError, match="cannot pin 1048577 bytes"):
        torch.empty(MiB + 1, dtype=torch.uint8, pin_memory=True)
    assert torch.empty(MiB, dtype=torch.uint8, pin_memory=True).is_pinned()


def test_the_chosen_pinning_fails_once(device):
    sim.inject_pin_failure()
    with pytest.raises(RuntimeError, match="injected"):
        torch.ones(4).pin_memory()
    assert torch.ones(4).pin_memory().is_pinned()


def test_memory_is_registered_once_and_unregistered_once(device):
    x = torch.ones(1000)
    sim.register_host(x)
    with pytest.raises(RuntimeError, match="already pinned"):
        sim.register_host(x[10:])
    sim.unregister_host(x)
    with pytest.raises(RuntimeError, match="was not registered"):
        sim.unregister_host(x)
