"""With accelerate and peft installed, on the simulated accelerator, in a process of its own."""

import functools
import gc

import pytest
import torch

from benchmarks.pipelines import PIPELINES, modules
from offload_engine import sim


def pytest_collection_modifyitems(items):
    for item in items:
        if "interop" in item.path.parts:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(autouse=True, scope="session")
def quick():
    """One thread, as models this small lose by a second; and collections of what is new only."""
    pytest.importorskip("accelerate", reason="the interop environment is needed")
    torch.set_num_threads(1)
    gc.freeze()


@pytest.fixture(autouse=True)
def on_the_simulator(sim_device):
    return sim_device


def build(name, **options):
    return PIPELINES[name].build(**options)


def run(pipe, name="sd15", **overrides):
    return torch.as_tensor(PIPELINES[name].run(pipe, steps=2, **overrides))


def on_device(name="sd15", **options):
    """The same pipeline, never offloaded, on the simulated device."""
    return build(name, **options).to("sim")


@functools.cache
def expected(name="sd15"):
    return run(on_device(name), name)


def places(pipe):
    """Device types that the weights of each component are on."""
    return {
        name: "+".join(sorted({t.device.type for t in module.state_dict().values()}))
        for name, module in modules(pipe).items()
    }


def is_hooked(module):
    return "_hf_hook" in module.__dict__


class Meter:
    """What moved, and the peak of device memory above what was there, within a ``with`` block."""

    def __enter__(self):
        gc.collect()
        torch.accelerator.reset_peak_memory_stats()
        self._before = sim.counters(), torch.accelerator.memory_allocated()
        return self

    def __exit__(self, *exception):
        counters, base_nbytes = self._before
        self.moved = sim.counters().since(counters)
        self.peak_nbytes = torch.accelerator.max_memory_allocated() - base_nbytes
