"""Anything may be raised anywhere: the user sees it, the next call works, no memory is lost."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import offload_engine
from offload_engine import residency, sim
from offload_engine.slots import OutOfDeviceMemory

from .conftest import total_nbytes


class Part(nn.Sequential):
    @property
    def device(self):
        return next(self.parameters()).device

    def decode(self, x):
        return self(x)


class Pipe(DiffusionPipeline):
    model_cpu_offload_seq = "te->unet->vae"

    def __init__(self, te, unet, vae):
        super().__init__()
        self.register_modules(te=te, unet=unet, vae=vae)

    @torch.no_grad()
    def __call__(self, x, steps=3, callback=None, free=True):
        x = torch.tanh(self.te(x.to(self._execution_device)))
        for step in range(steps):
            x = torch.tanh(self.unet(x))
            if callback is not None:
                callback(self, step)
        x = self.vae.decode(x)
        if free:
            self.maybe_free_model_hooks()
        return x.cpu()


@pytest.fixture
def pipe(sim_device):
    torch.manual_seed(0)
    sizes = {"te": 96, "unet": 512, "vae": 160}
    parts = {n: Part(nn.Linear(64, s), nn.Linear(s, 64)).eval() for n, s in sizes.items()}
    return Pipe(**parts)


@pytest.fixture
def latents():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def free_of_device_memory():
    gc.collect()
    return torch.accelerator.memory_allocated()


ERRORS = [ValueError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError]


@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_in_a_callback_is_the_users_own_and_costs_nothing(pipe, latents, error):
    expected = pipe(latents)
    base = free_of_device_memory()
    engine = offload_engine.attach(pipe)

    def callback(pipe, step):
        if step == 1:
            raise error("mine")

    for _ in range(3):
        with pytest.raises(error, match="mine"):
            pipe(latents, callback=callback)
        assert engine.resident == ()
        assert free_of_device_memory() == base
        assert torch.equal(pipe(latents), expected)
    assert str(engine.sequence) == "te->unet->vae"


class Interrupter:
    """Raises at the n-th line that runs in the engine's own files, those of finalizers left out:
    what is raised there Python swallows."""

    def __init__(self, at, error):
        self.at, self.error, self.seen, self.fired = at, error, 0, False

    def __call__(self, frame, event, argument):
        name, caller = frame.f_code.co_filename, frame.f_back.f_code.co_filename
        if "offload_engine" not in name or "/sim/" in name or caller == weakref.__file__:
            return None
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                self.fired = True
                sys.settrace(None)
                raise self.error("injected")
        return self.line


def interrupted_at(pipe, latents, at, error):
    """The lines that ran, and whether the interrupt at line ``at`` came through."""
    tracer = Interrupter(at, error)
    sys.settrace(tracer)
    try:
        pipe(latents, steps=1)
    except error as raised:
        assert str(raised) == "injected"
        return tracer.seen, True
    finally:
        sys.settrace(None)
    assert not tracer.fired, f"the interrupt at line {at} was swallowed"
    return tracer.seen, False


def test_an_interrupt_at_any_line_of_the_engine_leaves_a_working_engine(pipe, latents):
    expected = pipe(latents, steps=1)
    base = free_of_device_memory()
    pinned = sim.counters().pinned_nbytes
    engine = offload_engine.attach(pipe)
    held = sim.counters().pinned_nbytes
    for _ in range(3):  # the first call learns, the second one plans; later ones run fewer lines
        pipe(latents, steps=1)
    lines, _ = interrupted_at(pipe, latents, -1, KeyboardInterrupt)
    assert lines > 500
    interrupted = 0
    for at in range(1, lines, max(1, lines // 120)):
        interrupted += interrupted_at(pipe, latents, at, KeyboardInterrupt)[1]
        assert torch.equal(pipe(latents, steps=1), expected), f"after an interrupt at line {at}"
        assert engine.resident == ()
        assert free_of_device_memory() == base
        assert sim.counters().pinned_nbytes == held
    assert interrupted > 90
    engine.detach()
    assert torch.equal(pipe(latents, steps=1), expected)
    gc.collect()
    assert sim.counters().pinned_nbytes == pinned


def test_an_interrupt_while_a_component_is_released_leaves_it_usable(pipe, latents, monkeypatch):
    x = latents.to("sim")
    engine = offload_engine.attach({"unet": pipe.unet, "vae": pipe.vae}, "unet->vae")
    expected = pipe.unet(x)
    points = []

    def interrupt(tensor, data):
        points.append(tensor)
        if len(points) == 2:
            raise KeyboardInterrupt
        bare(tensor, data)

    bare = residency._point
    monkeypatch.setattr(residency, "_point", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.release()
    monkeypatch.undo()
    assert torch.equal(pipe.unet(x), expected)


def test_an_interrupt_while_attaching_leaves_nothing_attached(pipe, latents):
    expected = pipe(latents)
    gc.collect()
    pinned = sim.counters().pinned_nbytes
    for _ in range(2):  # the first one runs more lines
        counting = Interrupter(-1, KeyboardInterrupt)
        sys.settrace(counting)
        try:
            engine = offload_engine.attach(pipe)
        finally:
            sys.settrace(None)
        engine.detach()
    for at in range(1, counting.seen, max(1, counting.seen // 80)):
        sys.settrace(Interrupter(at, KeyboardInterrupt))
        try:
            with pytest.raises(KeyboardInterrupt):
                offload_engine.attach(pipe)
        finally:
            sys.settrace(None)
        assert type(pipe) is Pipe
        assert torch.equal(pipe(latents), expected)
        for module in (pipe.te, pipe.unet, pipe.vae):
            assert not module._forward_pre_hooks and "_hf_hook" not in module.__dict__
    gc.collect()
    assert sim.counters().pinned_nbytes == pinned


def test_out_of_memory_on_a_fetch_releases_the_rest_and_tries_once_more(pipe, latents, caplog):
    expected = pipe(latents)
    engine = offload_engine.attach(pipe)
    for after in range(1, 12):
        sim.inject_oom(after=after)
        try:
            out = pipe(latents)
        except torch.OutOfMemoryError:
            out = pipe(latents)  # it hit the pipeline's own allocation
        assert torch.equal(out, expected)
        assert engine.resident == ()


def test_a_component_that_cannot_fit_is_named_with_its_sizes(pipe, latents):
    engine = offload_engine.attach(pipe)
    held_by_others = free_of_device_memory()
    sim.configure(capacity_nbytes=held_by_others + total_nbytes(pipe.unet) - 1000)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemory, match=r"unet needs .* on sim:0") as error:
            pipe(latents)
        assert error.value.needed_nbytes >= total_nbytes(pipe.unet)
        assert engine.resident == ()
        del error
    sim.configure(capacity_nbytes=2**30)
    pipe(latents)


def test_pinning_that_fails_goes_on_pageable_and_warns_once_with_numbers(pipe, latents, caplog):
    expected = pipe(latents)
    sim.configure(pinned_limit_nbytes=total_nbytes(pipe.te) + 4096)
    engine = offload_engine.attach(pipe)
    assert torch.equal(pipe(latents), expected)
    warnings = [r for r in caplog.records if "pin" in r.message]
    assert len(warnings) == 1 and "KiB" in warnings[0].message
    pinned = {n: c.pinned for n, c in engine.report().components.items()}
    assert pinned == {"te": True, "unet": False, "vae": False}


def test_two_hundred_calls_leave_host_and_device_memory_as_they_were(pipe, latents):
    engine = offload_engine.attach(pipe)
    pipe(latents)
    device, pinned, log = free_of_device_memory(), sim.counters().pinned_nbytes, 0
    for _ in range(200):
        pipe(latents, steps=2)
        log = max(log, len(engine._residency.log))
    assert free_of_device_memory() == device
    assert sim.counters().pinned_nbytes == pinned
    assert log < 30


def test_casts_in_two_hundred_calls_leave_host_memory_as_it_was(pipe, latents):
    engine = offload_engine.attach(pipe)

    def cast(pipe, step):
        pipe.vae.to(torch.float64), pipe.vae.to(torch.float32)

    pipe(latents, callback=cast)
    pinned = sim.counters().pinned_nbytes
    for _ in range(200):
        pipe(latents, steps=1, callback=cast)
    gc.collect()
    assert sim.counters().pinned_nbytes == pinned
    assert len(engine._mounts["vae"].unit._blocks) == 1


def test_detach_gives_pinned_and_device_memory_back_and_the_pipeline_runs(pipe, latents):
    expected = pipe(latents)
    base, pinned = free_of_device_memory(), sim.counters().pinned_nbytes
    engine = offload_engine.attach(pipe)
    pipe(latents, free=False)
    engine.detach()
    engine.detach()
    assert free_of_device_memory() == base
    assert sim.counters().pinned_nbytes == pinned
    assert type(pipe) is Pipe and not hasattr(pipe.te, "_hf_hook")
    assert torch.equal(pipe(latents), expected)


def test_a_pipeline_that_never_frees_is_freed_at_the_end_of_its_call(pipe, latents):
    engine = offload_engine.attach(pipe)
    pipe(latents, free=False)
    assert engine.resident == ()


def test_a_call_within_a_call_leaves_both_right(pipe, latents):
    expected = pipe(latents)
    engine = offload_engine.attach(pipe)
    inner = []

    def callback(pipe, step):
        if step == 1:
            inner.append(pipe(latents))

    for _ in range(2):
        assert torch.equal(pipe(latents, callback=callback), expected)
        assert torch.equal(inner.pop(), expected)
    assert engine.resident == ()


def test_a_call_of_a_pipeline_that_shares_modules_within_a_call_leaves_both_right(pipe, latents):
    other = Pipe(te=pipe.te, unet=pipe.unet, vae=Part(nn.Linear(64, 8), nn.Linear(8, 64)).eval())
    expected, expected_other = pipe(latents), other(latents)
    engine, engine_other = offload_engine.attach(pipe), offload_engine.attach(other)
    inner = []

    def callback(_, step):
        if step == 1:
            inner.append(other(latents))

    for _ in range(2):
        assert torch.equal(pipe(latents, callback=callback), expected)
        assert torch.equal(inner.pop(), expected_other)
        fetches = [engine.report().components[n].fetches for n in ("te", "unet", "vae")]
        assert fetches == [1, 2, 1]  # the unet anew after the inner call
        assert engine_other.report().components["te"].fetches == 1
    engine_other.detach()
    assert torch.equal(pipe(latents), expected)
    engine.detach()
    assert torch.equal(other(latents), expected_other)


def test_two_pipelines_in_two_threads_do_not_disturb_each_other(pipe, latents):
    other = Pipe(**{n: Part(nn.Linear(64, 99), nn.Linear(99, 64)) for n in ("te", "unet", "vae")})
    expected = [pipe(latents), other(latents)]
    offload_engine.attach(pipe), offload_engine.attach(other)
    wrong = []

    def work(pipe, expected):
        for _ in range(10):
            if not torch.equal(pipe(latents), expected):
                wrong.append(pipe)

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in zip((pipe, other), expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forward_that_others_wrapped_is_plain_again_after_detach(pipe, latents):
    """diffusers' own hooks put themselves around whatever ``forward`` is."""
    expected = pipe(latents)
    engine = offload_engine.attach(pipe)
    inner = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert torch.equal(pipe(latents), expected)
    assert engine.report().components["unet"].fetches == 1
    engine.detach()
    assert torch.equal(pipe(latents), expected)
    assert pipe.unet[0].weight.device.type == "cpu"
    assert not engine.resident
