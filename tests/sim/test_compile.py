"""Compiled components: one graph, however often the weights come and go."""

import pytest
import torch
from torch import nn

import offload_engine


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_component_is_compiled_once(sim_device, how, when, fullgraph):
    torch.manual_seed(0)
    parts = {"a": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), "b": nn.Linear(8, 8)}
    x = torch.randn(2, 8)
    expected = parts["a"](x)

    def compile_it():
        if how == "wrapped":
            parts["a"] = torch.compile(parts["a"], backend="eager", fullgraph=fullgraph)
        else:
            parts["a"].compile(backend="eager", fullgraph=fullgraph)

    if when == "before":
        compile_it()
    engine = offload_engine.attach(parts, "a->b")
    if when == "after":
        compile_it()
    for _ in range(3):
        for _ in range(2):
            assert torch.equal(parts["a"](x.to(sim_device)).cpu(), expected)
        assert "a" in engine.resident or how == "wrapped"
        parts["b"](x.to(sim_device))
        assert engine.resident == ("b",)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_blocks_of_a_component_are_compiled_once(sim_device):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    parts = {"a": blocks, "b": nn.Linear(8, 8)}
    x = torch.randn(2, 8)
    expected = blocks(x)
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)
    offload_engine.attach(parts, "a->b")
    for _ in range(3):
        assert torch.equal(parts["a"](x.to(sim_device)).cpu(), expected)
        parts["b"](x.to(sim_device))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
