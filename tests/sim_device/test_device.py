"""``sim`` is a torch device like any other: what programs for accelerators expect of one."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn

from offload_engine import sim

acc = torch.accelerator


# ---- identity ------------------------------------------------------------------------------------


def test_it_is_the_accelerator_and_there_are_two(device):
    assert acc.current_accelerator() == torch.device("sim")
    assert acc.is_available() and acc.device_count() == 2
    assert sim.load() == device == torch.device("sim:0")
    assert torch.get_device_module("sim") is torch.sim


def test_a_third_one_does_not_exist(device):
    with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
        torch.empty(1, device="sim:2")


def test_the_current_device_is_chosen_as_on_cuda(device):
    assert torch.empty(1, device="sim").device == torch.device("sim:0")
    with torch.sim.device(1):
        assert torch.empty(1, device="sim").device == torch.device("sim:1")
    acc.set_device_index(1)
    assert acc.current_device_index() == 1
    acc.set_device_index(0)


def test_tensors_move_between_the_two(device):
    x = torch.arange(6.0, device=device).view(2, 3).t()
    y = x.to("sim:1")
    assert y.device.index == 1 and torch.equal(y.cpu(), x.cpu())
    assert torch.equal(y.half().to(device).cpu(), x.half().cpu())
    with pytest.raises(RuntimeError, match="sim:0 and sim:1"):
        x + y


# ---- streams and events --------------------------------------------------------------------------


def test_a_stream_is_current_inside_its_with_block(device):
    side = torch.Stream(device=device)
    default = acc.current_stream()
    with side:
        assert acc.current_stream() == side
        with torch.sim.stream(default):
            assert acc.current_stream() == default
    assert acc.current_stream() == default != side
    acc.set_stream(side)
    assert torch.sim.current_stream() == side
    acc.set_stream(default)


def test_each_thread_has_a_current_stream_of_its_own(device):
    side = torch.Stream(device=device)
    seen = []
    with side:
        thread = threading.Thread(target=lambda: seen.append(acc.current_stream()))
        thread.start()
        thread.join()
    assert seen == [torch.sim.current_stream()] != [side]


def test_events_record_wait_and_measure(device):
    sim.configure(launch_seconds=0, memory_bandwidth=float("inf"))
    start, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    start.record()
    sim.spend(2e-3)
    end.record()
    side = torch.Stream(device=device)
    end.wait(side)
    side.synchronize()
    assert start.elapsed_time(end) == 2.0
    assert side.query() and acc.current_stream().query()


def test_an_event_that_was_never_recorded_is_over(device):
    event = torch.Event(device=device)
    assert event.query()
    event.synchronize()


# ---- `.data =` -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_a_parameter_is_pointed_to_the_device_and_back(device, inference):
    layer = nn.Linear(4, 4)
    weight, master = layer.weight, layer.weight.data
    x = torch.ones(1, 4)
    expected = layer(x).detach()
    with torch.inference_mode(inference), torch.inference_mode(False):
        for p in layer.parameters():
            p.data = p.data.to(device)
    with torch.inference_mode(inference):
        assert torch.equal(layer(x.to(device)).cpu(), expected)
    with torch.inference_mode(False):
        weight.data = master
        layer.bias.data = layer.bias.data.cpu()
    assert layer.weight is weight and weight.device.type == "cpu"
    assert weight.data_ptr() == master.data_ptr()
    assert torch.equal(layer(x).detach(), expected)


def test_an_inference_parameter_is_pointed_to_the_device_in_inference_mode(device):
    with torch.inference_mode():
        layer = nn.Linear(4, 4)
        x = torch.ones(1, 4)
        expected = layer(x)
        flat = torch.empty(80, dtype=torch.uint8, device=device)
        start = 0
        for p in layer.parameters():
            view = flat[start : start + p.nbytes].view(p.dtype).view(p.shape)
            view.copy_(p)
            p.data, start = view, start + p.nbytes
        assert torch.equal(layer(x.to(device)).cpu(), expected)


def test_strides_survive_in_a_flat_buffer(device):
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 8, 8)
    expected = conv(x)
    flat = torch.empty(conv.weight.numel(), device=device)
    view = flat.as_strided(conv.weight.shape, conv.weight.stride())
    with torch.no_grad():
        view.copy_(conv.weight)
    conv.weight.data, conv.bias.data = view, conv.bias.data.to(device)
    assert torch.equal(conv(x.to(device)).cpu(), expected)


def test_module_to_keeps_parameters_and_ties(device):
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    weight = tied[0].weight
    tied.to(device)
    assert tied[0].weight is tied[1].weight is weight
    assert weight.device == device


# ---- saving and copying --------------------------------------------------------------------------


def test_tensors_are_saved_and_loaded(device):
    x = {"w": torch.randn(3, 4, device=device).t(), "n": nn.Parameter(torch.ones(2, device=device))}
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    again = torch.load(file)
    assert again["w"].device == device and torch.equal(again["w"], x["w"])
    file.seek(0)
    assert torch.load(file, map_location="cpu")["n"].device.type == "cpu"


def test_deepcopy_makes_new_memory_on_the_device(device):
    layer = nn.Linear(4, 4).to(device)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert twin.weight.device == device


def test_values_are_shown(device):
    x = torch.tensor([1.5, 2.0], device=device)
    assert repr(x) == "tensor([1.5000, 2.0000], device='sim:0')"
    assert x[0].item() == 1.5 and x.tolist() == [1.5, 2.0] and bool(x[0] > 1)


# ---- random numbers ------------------------------------------------------------------------------


def test_a_generator_draws_the_numbers_of_the_cpu(device):
    ours = torch.Generator(device=device).manual_seed(3)
    theirs = torch.Generator().manual_seed(3)
    assert ours.device == device
    for draw in (torch.randn, torch.rand):
        there = draw(100, generator=ours, device=device)
        assert torch.equal(there.cpu(), draw(100, generator=theirs))
    state = ours.get_state()
    a = torch.randn(4, generator=ours, device=device)
    ours.set_state(state)
    assert torch.equal(a, torch.randn(4, generator=ours, device=device))


def test_manual_seed_seeds_the_device_too(device):
    torch.manual_seed(7)
    there = torch.randn(100, device=device), torch.randperm(10, device=device)
    torch.manual_seed(7)
    here = torch.randn(100), torch.randperm(10)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))


def test_a_generator_of_the_wrong_device_is_refused(device):
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(4, generator=torch.Generator(), device=device).normal_()
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator"):
        torch.empty(4, device=device).normal_(generator=torch.Generator())


def test_the_state_is_restored_by_fork_rng(device):
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[0], device_type="sim"):
        torch.randn(4, device=device)
    a = torch.randn(4, device=device)
    torch.manual_seed(1)
    assert torch.equal(a, torch.randn(4, device=device))


# ---- the rest ------------------------------------------------------------------------------------


def test_autocast_casts(device):
    x = torch.randn(4, 4, device=device)
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert torch.softmax(x @ x, -1).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_a_module_compiled_with_the_eager_backend_runs(device):
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU()).to(device)
    x = torch.randn(2, 4, device=device)
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(compiled(x), module(x))


def test_tensors_are_made_by_threads_at_once(device):
    def work():
        for _ in range(200):
            torch.randn(32, 32, device=device).softmax(-1).sum().item()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not sim.violations()
