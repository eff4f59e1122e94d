"""``vram=`` on a real GPU: the bits, the budget, what moves, and what the allocator makes of it."""

import pytest
import torch
from torch import nn

import offload_engine
from benchmarks.pipelines import PIPELINES

from .conftest import (
    MIB,
    WIDTH,
    Part,
    Peak,
    Pipe,
    Placed,
    allocated,
    clean,
    limited,
    reserved,
    without_offload,
)

SLACK = 4 * MIB  # torch rounds what it allocates up
SPARE = 24 * MIB  # what the process may take beside the budget: libraries, rounding, caches


class Deep(Placed):
    """A dozen blocks in a row."""

    def __init__(self, blocks=12, mib=8):
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList([Part(mib)]) for _ in range(blocks))
        self.eval()

    def forward(self, x):
        x = self.enter(x)
        for (block,) in self.blocks:
            x = torch.tanh(x + block(x))
        return x


@pytest.fixture
def deep(device):
    torch.manual_seed(0)
    return Pipe(Part(16), Deep(), Part(8), Part(24))


def weights(pipe):
    return sum(part.nbytes for part in pipe.components.values())


@pytest.mark.parametrize("part", [0.35, 0.6])
def test_a_streamed_pipeline_keeps_its_budget_and_its_bits(deep, x, device, part):
    """In a process that can take little more than the budget."""
    expected = without_offload(deep, x, device)
    budget = int(part * weights(deep))
    with limited(device, budget + SPARE):
        engine = offload_engine.attach(deep, device=device, vram=budget)
        before = allocated()
        for number in range(4):
            torch.accelerator.reset_peak_memory_stats()
            assert torch.equal(deep(x), expected)
            report = engine.report()
            assert torch.accelerator.max_memory_allocated() - before <= budget + SLACK
            if number:
                assert report.predicted_seconds > 0
                assert 0 < report.bound_seconds <= 1.001 * report.predicted_seconds
        assert engine.plan.peak_nbytes <= budget
        assert any("blocks" in use.segments[-1] for use in engine.plan.uses)
        assert any("unet" in name for name in engine.resident), "some of it stays between calls"
        engine.detach()


def test_where_everything_fits_nothing_moves(deep, x, device):
    expected = without_offload(deep, x, device)
    engine = offload_engine.attach(deep, device=device, vram=2 * weights(deep))
    for number in range(3):
        assert torch.equal(deep(x), expected)
        fetched = sum(part.fetched_nbytes for part in engine.report().components.values())
        assert number == 0 or fetched == 0
    engine.detach()


def test_what_moves_is_what_the_plan_says(deep, x, device):
    engine = offload_engine.attach(deep, device=device, vram=int(0.5 * weights(deep)))
    for number in range(4):
        deep(x)
        if number > 1:
            fetched = sum(part.fetched_nbytes for part in engine.report().components.values())
            assert fetched == engine.plan.fetched_nbytes
    engine.detach()


def test_streaming_does_not_split_the_memory_up(deep, x, device):
    """A slot for each block, taken and given back in every step, for fifty calls."""
    budget = int(0.4 * weights(deep))
    with limited(device, budget + SPARE):
        engine = offload_engine.attach(deep, device=device, vram=budget)
        for _ in range(5):
            deep(x)
        clean()
        before = allocated(), reserved()
        for _ in range(50):
            deep(x)
        clean()
        assert allocated() == before[0]
        assert reserved() <= before[1] + SPARE
        engine.detach()


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan_t2v"])
def test_real_classes_make_the_same_image_within_a_budget(device, name):
    case = PIPELINES[name]
    pipe = case.build().to(device)
    with Peak() as resident:
        expected = torch.as_tensor(case.run(pipe, 2))
    nbytes = sum(t.nbytes for m in pipe.components.values() if isinstance(m, nn.Module)
                 for t in m.state_dict().values())  # fmt: skip
    pipe.to("cpu")
    clean()
    for part in (1.0, 0.6):
        engine = offload_engine.attach(
            pipe, case.seq, device=device, vram=int(part * nbytes) + 2 * resident.nbytes
        )
        for _ in range(3):
            assert torch.equal(torch.as_tensor(case.run(pipe, 2)), expected)
    engine.detach()


def test_auto_takes_what_is_free(pipe, x, device):
    expected = without_offload(pipe, x, device)
    engine = offload_engine.attach(pipe, device=device, vram="auto")
    for _ in range(2):
        assert torch.equal(pipe(x), expected)
    assert set(engine.resident) >= {"te", "unet", "vae"}
    engine.detach()
