"""Pipelines in miniature whose components consist of blocks, with the proportions of real ones."""

from __future__ import annotations

import functools

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

import offload_engine
from benchmarks import shapes
from benchmarks.pipelines import flux
from benchmarks.pipelines.case import finish, seeded
from benchmarks.shapes import Row, Shape
from offload_engine import sim

WIDTH = 16  # of what flows from block to block
_NBYTES = 4 * (2 * WIDTH + 1)  # of one hidden unit of a block
GB = 50_000  # bytes that stand for 1e9: seconds are real ones, sizes are not
LINK = shapes.LINK * GB  # bytes a second


class Block(nn.Module):
    """Weights of about ``nbytes``; it takes ``seconds`` and room for ``scratch`` numbers."""

    def __init__(self, nbytes, seconds=0.0, scratch=0):
        super().__init__()
        hidden = max(2, (nbytes - 2 * 4 * WIDTH) // _NBYTES)
        half = hidden // 2
        self.up, self.down = nn.Linear(WIDTH, half), nn.Linear(half, WIDTH)
        self.up_2, self.down_2 = nn.Linear(WIDTH, hidden - half), nn.Linear(hidden - half, WIDTH)
        self.seconds, self.scratch = seconds, scratch
        self.on_forward = None

    def forward(self, x):
        if self.on_forward is not None:
            self.on_forward()
        if self.seconds:
            sim.spend(self.seconds)
        scratch = x.new_zeros(self.scratch)
        x = x + self.down(self.up(x)) + self.down_2(self.up_2(x))
        return torch.tanh(x) + scratch.sum()


class Stack(nn.Module):
    """``rows``: lists of blocks, by name; what is outside of them has ``rest`` bytes."""

    def __init__(self, rows, rest=0):
        super().__init__()
        self.first = Block(rest)
        for name, blocks in rows.items():
            self.add_module(name, nn.ModuleList(blocks))
        self.names = tuple(rows)

    @property
    def device(self):
        return self.first.up.weight.device

    @property
    def dtype(self):
        return self.first.up.weight.dtype

    def forward(self, x):
        x = self.first(x.to(self.dtype))
        for name in self.names:
            for block in getattr(self, name):
                x = block(x)
        return x


class Streamed(DiffusionPipeline):
    """Encodes, runs the transformer ``passes`` times in each step, decodes."""

    model_cpu_offload_seq = "te->transformer->vae"

    def __init__(self, te, transformer, vae):
        super().__init__()
        self.register_modules(te=te, transformer=transformer, vae=vae)
        self.passes = 1

    @torch.no_grad()
    def __call__(self, x, num_inference_steps=4, on_step=None):
        x = x.to(self._execution_device)
        x = self.te(x)
        for step in range(num_inference_steps):
            for _ in range(self.passes):
                x = self.transformer(x)
            if on_step is not None:
                on_step(self, step)
        x = self.vae(x)
        self.maybe_free_model_hooks()
        return x.cpu()


def build(shape, seed=0):
    """A `Streamed` of the proportions of ``shape``."""
    torch.manual_seed(seed)
    scratch, rest = int(shape.scratch_gb * GB / 4), int(shape.rest_gb * GB)
    parts = {}
    for name in ("te", "transformer", "vae"):
        rows = {
            f"row_{i}": [Block(int(row.gb * GB), row.seconds, scratch) for _ in range(row.count)]
            for i, row in enumerate(getattr(shape, name))
        }
        parts[name] = Stack(rows, rest).eval()
    pipe = Streamed(**parts)
    pipe.passes = shape.passes
    return pipe


def noise(rows=2):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def weights_nbytes(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))


SMALL = Shape((Row(4, 0.4, 0.01),), (Row(8, 0.5, 0.02),), (Row(4, 0.1, 0.02),), scratch_gb=0.1)


def streamed(pipe, fraction=0.4, **more):
    """An engine whose budget is ``fraction`` of the weights of ``pipe``, and a device as large."""
    budget = int(fraction * weights_nbytes(pipe))
    engine = offload_engine.attach(pipe, vram=budget, **more)
    sim.configure(h2d_bandwidth=LINK, pageable_bandwidth=LINK, capacity_nbytes=budget)
    torch.accelerator.reset_peak_memory_stats()
    return engine


def check(call, expected, engine):
    """Bit-identical, within the budget, nothing written back."""
    assert torch.equal(call.output, expected.output)
    assert call.peak_nbytes <= engine.vram_nbytes
    assert call.moved.d2h_nbytes == expected.moved.d2h_nbytes


@functools.cache
def deep_flux():
    with seeded(0):
        parts = {**flux._components("tiny"), "transformer": flux._transformer(4, 8)}
        return finish(FluxPipeline(**parts), torch.float32)
