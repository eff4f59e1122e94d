"""What is on the GPU and when, by torch's own count; and that none of it stays."""

import pytest
import torch

import offload_engine
from offload_engine.slots import OutOfDeviceMemory

from .conftest import MIB, Peak, allocated, clean, limited, reserved, without_offload

SLACK = 3 * MIB  # activations, and what the allocator does not split off


def test_one_component_at_a_time_is_there(pipe, x, device):
    expected = without_offload(pipe, x, device)
    base = allocated()
    engine = offload_engine.attach(pipe, device=device)
    seen = []

    def look(name):
        seen.append((name, engine.resident, allocated() - base))

    for _ in range(2):
        with Peak() as peak:
            assert torch.equal(pipe(x, callback=look), expected)
        assert peak.nbytes <= pipe.unet.nbytes + SLACK
        assert allocated() == base
    for name, resident, nbytes in seen:
        assert resident == (name,)
        assert 0 <= nbytes - getattr(pipe, name).nbytes <= SLACK


def test_a_loop_of_two_is_kept_and_gone_before_the_vae(pipe, x, device):
    order = "te " + "unet unet_2 " * 5 + "vae"
    expected = without_offload(pipe, x, device, order=order)
    engine = offload_engine.attach(pipe, device=device)
    for _ in range(3):
        seen = []
        out = pipe(x, order, callback=lambda name, seen=seen: seen.append(engine.resident))
        assert torch.equal(out, expected)
    fetches = {name: part.fetches for name, part in engine.report().components.items()}
    assert fetches == {"te": 1, "unet": 1, "unet_2": 1, "vae": 1}
    assert seen[-1] == ("vae",)


def test_fifty_calls_leave_nothing_behind(pipe, x, device):
    engine = offload_engine.attach(pipe, device=device)
    for _ in range(5):
        pipe(x)
    before = allocated(), reserved()
    for _ in range(50):
        pipe(x)
    assert (allocated(), reserved()) == before
    engine.detach()


def test_release_and_detach_give_the_memory_back(pipe, x, device):
    pipe(x)  # on the host
    clean()
    base = allocated(), reserved()
    engine = offload_engine.attach(pipe, device=device)
    pipe(x)
    with torch.no_grad():
        pipe.unet(x.to(device))  # by hand: it stays until something else runs
    assert engine.resident == ("unet",)
    engine.release()
    assert (allocated(), reserved()) == base
    with torch.no_grad():
        pipe.unet(x.to(device))
    engine.detach()
    engine.detach()
    clean()
    assert (allocated(), reserved()) == base
    assert {p.device.type for part in pipe.components.values() for p in part.parameters()} == {
        "cpu"
    }
    assert pipe(x).shape == x.shape


def test_attaching_again_replaces(pipe, x, device):
    expected = without_offload(pipe, x, device)
    base = allocated()
    first = offload_engine.attach(pipe, device=device)
    assert torch.equal(pipe(x), expected)
    second = offload_engine.attach(pipe, "te->unet->vae", device=device)
    assert torch.equal(pipe(x), expected)
    first.detach()
    assert torch.equal(pipe(x), expected)
    assert second.resident == ()
    second.detach()
    assert allocated() == base


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_is_the_users_and_costs_nothing(pipe, x, device, error):
    expected = without_offload(pipe, x, device)
    base = allocated()
    engine = offload_engine.attach(pipe, device=device)

    def interrupt(name):
        if name == "unet":
            raise error("mine")

    for _ in range(3):
        with pytest.raises(error, match="mine"):
            pipe(x, callback=interrupt)
        assert engine.resident == ()
        assert allocated() == base
        assert torch.equal(pipe(x), expected)


def test_a_component_that_does_not_fit_says_so_and_the_next_call_works(pipe, x, device):
    expected = without_offload(pipe, x, device)
    engine = offload_engine.attach(pipe, device=device)
    with limited(device, 48 * MIB):
        with pytest.raises(OutOfDeviceMemory, match="unet needs 64") as caught:
            pipe(x)
        assert caught.value.needed_nbytes >= pipe.unet.nbytes
    del caught
    assert engine.resident == ()
    assert torch.equal(pipe(x), expected)


def test_a_loop_that_does_not_fit_together_runs_one_at_a_time(pipe, x, device):
    order = "te " + "unet unet_2 " * 3 + "vae"
    expected = without_offload(pipe, x, device, order=order)
    offload_engine.attach(pipe, device=device)
    with limited(device, 100 * MIB):
        for _ in range(2):
            with Peak() as peak:
                assert torch.equal(pipe(x, order), expected)
            assert peak.nbytes <= 100 * MIB


def test_memory_for_activations_is_there_for_others_after_a_call(pipe, x, device):
    offload_engine.attach(pipe, device=device)
    with limited(device, 80 * MIB):
        for _ in range(3):
            pipe(x)
            free = torch.empty(60 * MIB, dtype=torch.uint8, device=device)
            del free
