"""Each rule: a program that breaks it and is told, and its correct twin that is not."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import pytest
import torch

from offload_engine import sim

N = 1024


def pinned(value: float = 1.0) -> torch.Tensor:
    return torch.full((N,), value).pin_memory()


def current() -> torch.Stream:
    return torch.accelerator.current_stream()


def fetch(source: torch.Tensor, stream: torch.Stream) -> tuple[torch.Tensor, torch.Event]:
    """Queue a copy of pinned memory on a side stream, correctly."""
    target = torch.empty_like(source, device="sim")
    stream.wait_event(current().record_event())
    with stream:
        target.copy_(source, non_blocking=True)
    return target, stream.record_event()


@pytest.fixture
def side(device):
    return torch.Stream(device=device)


# ---- order on the device -------------------------------------------------------------------------


def test_reading_a_copy_without_waiting_for_its_event_is_caught(side):
    target, _ready = fetch(pinned(), side)
    with pytest.raises(sim.Violation, match="not ordered after the write by the copy") as error:
        target + 1
    assert error.value.check == "unordered-read"
    side.synchronize()


def test_reading_a_copy_after_waiting_for_its_event_sees_its_bytes(side):
    target, ready = fetch(pinned(3.0), side)
    current().wait_event(ready)
    assert torch.equal((target + 1).cpu(), torch.full((N,), 4.0))


def test_a_copy_that_nobody_waits_for_has_not_landed(side):
    source = pinned(3.0)
    target, ready = fetch(source, side)
    with sim.allow("unordered-read") as found:
        early = target.clone()
    current().wait_event(ready)
    assert early.isnan().all()
    assert (target == 3).all()
    assert [f.check for f in found] == ["unordered-read"]


def test_a_copy_that_is_not_ordered_after_the_allocation_is_caught(side):
    target = torch.empty(N, device="sim")
    source = pinned()
    with side, pytest.raises(sim.Violation, match="its allocation") as error:
        target.copy_(source, non_blocking=True)
    assert error.value.check == "unordered-write"
    side.synchronize()


def test_a_copy_that_waits_for_the_allocation_is_not_caught(side):
    target, ready = fetch(pinned(), side)
    current().wait_event(ready)
    del target


def test_overwriting_bytes_that_another_stream_still_reads_is_caught(side):
    target, ready = fetch(pinned(), side)
    current().wait_event(ready)
    _used = target * 2
    source = pinned(2.0)
    with side, pytest.raises(sim.Violation, match="the read by aten::mul") as error:
        target.copy_(source, non_blocking=True)
    assert error.value.check == "unordered-write"
    side.synchronize()


def test_overwriting_bytes_after_waiting_for_the_reader_is_not_caught(side):
    target, ready = fetch(pinned(), side)
    current().wait_event(ready)
    used = target * 2
    side.wait_event(current().record_event())
    with side:
        target.copy_(pinned(2.0), non_blocking=True)
    current().wait_event(side.record_event())
    assert torch.equal((target + used).cpu(), torch.full((N,), 4.0))


def test_order_is_kept_for_byte_ranges_not_for_whole_blocks(side):
    """Two halves of one slot: one is used while the other is fetched."""
    slot = torch.empty(2 * N, device="sim")
    slot[:N].fill_(1.0)
    side.wait_event(current().record_event())
    with side:
        slot[N:].copy_(pinned(2.0), non_blocking=True)
    assert (slot[:N] + 1 == 2).all()
    with pytest.raises(sim.Violation, match=rf"bytes {4 * N}\.\.{8 * N}"):
        slot[N:] + 1
    side.synchronize()


def test_order_is_inherited_through_a_third_stream(device, side):
    target, ready = fetch(pinned(), side)
    relay = torch.Stream(device=device)
    relay.wait_event(ready)
    current().wait_event(relay.record_event())
    assert (target == 1).all()


def test_a_host_that_synchronised_orders_what_it_queues_next(side):
    target, ready = fetch(pinned(), side)
    ready.synchronize()
    assert (target == 1).all()


def run_layers(device, leave_out: str = "") -> torch.Tensor:
    """Four layers through two slots, with all waits but one kind of them."""
    copies = torch.Stream(device=device)
    masters = [torch.full((N,), float(i)).pin_memory() for i in range(4)]
    slots = [torch.empty(N, device=device) for _ in range(2)]
    events = {f"granted {i}": current().record_event() for i in range(2)}

    def wait(stream, name):
        if name.split()[0] != leave_out:
            stream.wait_event(events[name])

    total = torch.zeros(N, device=device)
    for i, master in enumerate(masters):
        wait(copies, f"granted {i}" if i < 2 else f"released {i - 2}")
        with copies:
            slots[i % 2].copy_(master, non_blocking=True)
        events[f"ready {i}"] = copies.record_event()
        wait(current(), f"ready {i}")
        total += slots[i % 2]
        events[f"released {i}"] = current().record_event()
    return total


def test_the_whole_protocol_of_two_slots_runs_clean(device):
    assert torch.equal(run_layers(device).cpu(), torch.full((N,), 6.0))


@pytest.mark.parametrize("leave_out", ["granted", "ready", "released"])
def test_each_wait_of_the_protocol_is_missed_when_it_is_left_out(device, leave_out):
    with sim.allow() as found:
        run_layers(device, leave_out)
        gc.collect()
        torch.accelerator.synchronize()
    assert found


# ---- giving memory back --------------------------------------------------------------------------


def test_freeing_what_another_stream_uses_without_record_stream_is_caught(side):
    with side:
        owned_by_side = torch.ones(N, device="sim")
    current().wait_event(side.record_event())
    _used = owned_by_side + 1
    del owned_by_side
    with pytest.raises(sim.Violation, match="is freed while the read by aten::add") as error:
        torch.ones(1, device="sim")
    assert error.value.check == "unordered-free"


def test_freeing_what_another_stream_used_after_record_stream_is_not_caught(side):
    with side:
        owned_by_side = torch.ones(N, device="sim")
    current().wait_event(side.record_event())
    _used = owned_by_side + 1
    owned_by_side.record_stream(current())
    del owned_by_side
    torch.ones(1, device="sim")


def test_freeing_after_the_owner_waited_for_the_user_is_not_caught(side):
    with side:
        owned_by_side = torch.ones(N, device="sim")
    current().wait_event(side.record_event())
    _used = owned_by_side + 1
    side.wait_event(current().record_event())
    del owned_by_side


def test_freeing_after_the_host_waited_for_the_user_is_not_caught(side):
    with side:
        owned_by_side = torch.ones(N, device="sim")
    current().wait_event(side.record_event())
    _used = owned_by_side + 1
    current().synchronize()
    del owned_by_side


def test_freeing_the_target_of_a_copy_in_flight_is_caught(side):
    target, _ready = fetch(pinned(), side)
    del target
    with pytest.raises(sim.Violation, match="the write by the copy to the device") as error:
        torch.ones(1, device="sim")
    assert error.value.check == "unordered-free"


def test_freeing_the_target_of_a_copy_that_the_owner_waited_for_is_not_caught(side):
    target, ready = fetch(pinned(), side)
    current().wait_event(ready)
    del target
    torch.ones(1, device="sim")


def test_a_violation_found_in_a_destructor_is_raised_by_a_synchronisation_too(side):
    target, _ready = fetch(pinned(), side)
    del target
    with pytest.raises(sim.Violation, match="unordered-free"):
        torch.accelerator.synchronize()


# ---- use after free ------------------------------------------------------------------------------


def test_using_a_view_of_a_storage_that_was_given_back_is_caught():
    slot = torch.ones(N, device="sim")
    weight = slot[: N // 2]
    slot.untyped_storage().resize_(0)
    with pytest.raises(sim.Violation, match="shrunk to 0 bytes") as error:
        weight + 1
    assert error.value.check == "use-after-free"


def test_using_an_address_after_its_block_was_freed_is_caught():
    slot = torch.ones(N, device="sim")
    stale = torch._C._construct_storage_from_data_pointer(
        slot.data_ptr(), slot.device, slot.untyped_storage().nbytes()
    )
    weight = torch.empty(0, device="sim").set_(stale, 0, (N,))
    assert (weight == 1).all()
    del slot
    with sim.allow("use-after-free") as found:
        assert (weight + 1).isnan().all()  # poison
    assert {f.check for f in found} == {"use-after-free"}
    assert "freed" in found[0].text


def test_using_a_view_that_keeps_its_block_alive_is_not_caught():
    slot = torch.ones(N, device="sim")
    weight = slot[: N // 2]
    del slot
    assert (weight == 1).all()


# ---- the host's side of a copy -------------------------------------------------------------------


def test_changing_a_pinned_source_before_its_copy_is_over_is_caught(side):
    source = pinned()
    target, ready = fetch(source, side)
    source[7] = 5.0
    current().wait_event(ready)
    with pytest.raises(sim.Violation, match="changed before the host knew") as error:
        target + 1
    assert error.value.check == "source-changed"


def test_changing_a_pinned_source_after_its_event_was_waited_for_is_not_caught(side):
    source = pinned()
    target, ready = fetch(source, side)
    ready.synchronize()
    source[7] = 5.0
    assert (target == 1).all()


def test_an_operator_that_was_queued_behind_the_copy_does_not_tell_the_host_that_it_is_over(side):
    source = pinned()
    target, ready = fetch(source, side)
    current().wait_event(ready)
    _used = target + 1
    source.zero_()
    with pytest.raises(sim.Violation, match="source-changed"):
        torch.accelerator.synchronize()


def test_fetching_one_source_again_and_again_without_a_host_wait_is_not_caught(side):
    source = pinned()
    for _ in range(5):
        target, ready = fetch(source, side)
        current().wait_event(ready)
        _used = target + 1
    del target


def test_a_source_that_changes_between_two_fetches_is_caught_by_the_second(side):
    source = pinned()
    target, ready = fetch(source, side)
    current().wait_event(ready)
    _used = target + 1
    source.zero_()
    side.wait_event(current().record_event())
    with side, pytest.raises(sim.Violation, match="source-changed"):
        target.copy_(source, non_blocking=True)
    side.synchronize()


def test_unregistering_memory_with_a_copy_in_flight_is_caught(side):
    memory = torch.ones(N)
    sim.register_host(memory)
    target, ready = fetch(memory, side)
    current().wait_event(ready)
    with pytest.raises(sim.Violation, match="unregistered 4096 bytes") as error:
        sim.unregister_host(memory)
    assert error.value.check == "pinned-free"
    del target


def test_unregistering_memory_after_its_last_copy_is_not_caught(side):
    memory = torch.ones(N)
    sim.register_host(memory)
    assert memory.is_pinned()
    target, ready = fetch(memory, side)
    ready.synchronize()
    sim.unregister_host(memory)
    assert not memory.is_pinned()
    assert (target == 1).all()


def test_freeing_memory_that_torch_pinned_waits_for_its_copy_by_itself(side):
    """As with CUDA: the allocator of pinned memory knows of the copies of its own tensors."""
    target, ready = fetch(pinned(3.0), side)
    gc.collect()
    assert sim.counters().pinned_nbytes == 4 * N
    current().wait_event(ready)
    assert (target == 3).all()
    assert sim.counters().pinned_nbytes == 0


def test_freeing_pinned_memory_behind_a_foreign_view_of_it_is_caught(side):
    """As with CUDA: the allocator does not know of copies of views that came through numpy."""
    source = pinned()
    memory = (ctypes.c_char * source.nbytes).from_address(source.data_ptr())
    foreign = torch.frombuffer(memory, dtype=torch.float32)
    assert foreign.is_pinned()
    _target, ready = fetch(foreign, side)
    del source
    with pytest.raises(sim.Violation, match="freed 4096 bytes") as error:
        ready.synchronize()
    assert error.value.check == "pinned-free"


def test_a_copy_to_the_host_lands_when_the_host_waits_for_it(device):
    target = torch.zeros(N).pin_memory()
    target.copy_(torch.ones(N, device=device), non_blocking=True)
    assert target.isnan().all()
    current().synchronize()
    assert (target == 1).all()


def test_copies_through_one_pinned_buffer_keep_their_order(device, side):
    """A write-back and the next fetch of the same master, ordered on the device only."""
    master = pinned(1.0)
    weight = torch.full((N,), 2.0, device=device)
    master.copy_(weight, non_blocking=True)
    again, ready = fetch(master, side)
    current().wait_event(ready)
    assert (again == 2).all()
    torch.accelerator.synchronize()
    assert (master == 2).all()


def test_two_copies_through_one_pinned_buffer_without_order_are_caught(device, side):
    master = pinned(1.0)
    target = torch.empty(N, device=device)
    side.wait_event(current().record_event())
    master.copy_(torch.full((N,), 2.0, device=device), non_blocking=True)
    with side, pytest.raises(sim.Violation, match="uses 4096 bytes of pinned memory"):
        target.copy_(master, non_blocking=True)
    with sim.allow("source-changed"):  # which follows from it
        torch.accelerator.synchronize()


# ---- what is an error on every device ------------------------------------------------------------


def test_a_weight_left_on_the_host_is_an_error_as_on_any_device(device):
    layer = torch.nn.Linear(4, 4).to(device)
    layer.bias.data = layer.bias.data.cpu()
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        layer(torch.ones(1, 4, device=device))
    assert not sim.violations()


def test_a_scalar_on_the_host_may_meet_a_tensor_on_the_device(device):
    assert (torch.ones(2, device=device) * torch.tensor(3.0)).tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones((), device=device) + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.tensor(1.0).add_(torch.ones((), device=device))


def test_indices_may_be_on_the_host(device):
    rows = torch.arange(6.0, device=device).view(3, 2)
    assert rows[torch.tensor([2, 0])].tolist() == [[4, 5], [0, 1]]


# ---- being told ----------------------------------------------------------------------------------


def test_allow_collects_only_what_it_names(side):
    target, ready = fetch(pinned(), side)
    with sim.allow("source-changed") as found, pytest.raises(sim.Violation):
        target + 1
    assert found == []
    current().wait_event(ready)


def test_allow_does_not_know_other_checks():
    with pytest.raises(ValueError, match="unknown checks"), sim.allow("unordered-raed"):
        pass


def test_violations_lists_what_was_raised_and_what_was_allowed(side):
    target, ready = fetch(pinned(), side)
    with contextlib.suppress(sim.Violation):
        target + 1
    with sim.allow():
        target + 1
    assert [(f.check, f.state) for f in sim.violations()] == [
        ("unordered-read", "raised"),
        ("unordered-read", "allowed"),
    ]
    current().wait_event(ready)


def test_violations_pass_through_autograd(device, side):
    target, ready = fetch(pinned(), side)
    weight = torch.ones(N, device=device, requires_grad=True)

    class Uses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * target

    with pytest.raises(sim.Violation, match="unordered-read"):
        Uses.apply(weight).sum().backward()
    current().wait_event(ready)
