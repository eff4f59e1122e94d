"""Compiled components: one graph, however often the weights come and go."""

import pytest
import torch
from torch import nn

import offload_engine

from .miniature import make, noise

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x))


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


@pytest.mark.parametrize("vram", [None, 340_000])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["as it is", "compiled"])
def test_every_forward_of_a_first_call_is_counted(sim_device, is_compiled, vram):
    """Or another number of steps would not be planned for."""
    pipe, x = make(), noise(64)
    if is_compiled:
        pipe.unet.compile(backend="eager")
    with offload_engine.attach(pipe, vram=vram) as engine:
        pipe(x, num_inference_steps=6)
        forwards = {mark.unit: mark.forwards for mark in engine._meter.marks}
        assert forwards == {"te": 1, "te2": 1, "unet": 6, "vae": 1}
