"""Everything here runs on the simulated accelerator, in a process of its own."""

import gc

import pytest
import torch
from torch import nn

from offload_engine import sim
from offload_engine.engine import _budgeted


@pytest.fixture(autouse=True, scope="session")
def quick():
    """One thread, as models this small lose by a second."""
    torch.set_num_threads(1)


@pytest.fixture
def allowed():
    """The names of violations that a test has reasons for."""
    return set()


@pytest.fixture
def clean(sim_device, allowed):
    """After the test nothing was violated, and no engine holds on to a budget."""
    yield
    for engine in list(_budgeted):  # of a test that failed: it would share its budget
        engine.detach()
    gc.collect()
    assert not [found for found in sim.violations() if found.check not in allowed]


@pytest.fixture
def fresh_dynamo():
    """Dynamo's counters; nothing is compiled before, and nothing after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def total_nbytes(module):
    return sum(
        t.nbytes for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    )


@pytest.fixture
def modules():
    """Three small components whose weights are a few hundred KiB each."""
    torch.manual_seed(0)
    made = {
        "te": nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)),
        "unet": nn.Sequential(nn.Linear(64, 512), nn.LayerNorm(512), nn.Linear(512, 64)),
        "vae": nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 64)),
    }
    return {name: module.eval() for name, module in made.items()}


@pytest.fixture
def x(sim_device):
    torch.manual_seed(1)
    return torch.randn(4, 64).to(sim_device)


class Meter:
    """Counts what the simulator counted since it was made or last read."""

    def __init__(self):
        self.read()

    def read(self):
        now = sim.counters()
        change = now.since(self.before) if hasattr(self, "before") else None
        self.before = now
        return change


@pytest.fixture
def meter(sim_device):
    return Meter()
