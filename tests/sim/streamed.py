"""Pipelines in miniature whose components consist of blocks, with the proportions of real ones."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

import offload_engine
from benchmarks.pipelines import flux
from benchmarks.pipelines.case import finish, seeded
from offload_engine import sim

WIDTH = 16  # of what flows from block to block
_NBYTES = 4 * (2 * WIDTH + 1)  # of one hidden unit of a block
GB = 50_000  # bytes that stand for 1e9: seconds are real ones, sizes are not
LINK = 23.9 * GB  # bytes a second: an RTX 4090 with PCIe 4


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


class Row(NamedTuple):
    """Blocks that are alike: how many, their GB, and their seconds."""

    count: int
    gb: float
    seconds: float

    def blocks(self, scratch):
        return [Block(int(self.gb * GB), self.seconds, scratch) for _ in range(self.count)]


class Shape(NamedTuple):
    """A pipeline's proportions. GB and seconds are those of the real model on an RTX 4090, as far
    as they are known."""

    te: tuple[Row, ...]
    transformer: tuple[Row, ...]
    vae: tuple[Row, ...]
    passes: int = 1
    steps: int = 4
    rest_gb: float = 0.1
    scratch_gb: float = 0.3

    def build(self, seed=0):
        torch.manual_seed(seed)
        scratch = int(self.scratch_gb * GB / 4)
        parts = {
            name: Stack(
                {f"row_{i}": row.blocks(scratch) for i, row in enumerate(getattr(self, name))},
                int(self.rest_gb * GB),
            ).eval()
            for name in ("te", "transformer", "vae")
        }
        pipe = Streamed(**parts)
        pipe.passes = self.passes
        return pipe


def noise(rows=2):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def weights_nbytes(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))


SHAPES = {
    # T5-XXL; 19 double and 38 single blocks: 12.9 and 10.8 GB, 0.2 and 0.4 s a step.
    "flux": Shape(
        te=(Row(24, 0.397, 0.004),),
        transformer=(Row(19, 0.679, 0.0105), Row(38, 0.283, 0.0105)),
        vae=(Row(4, 0.04, 0.075),),
        steps=6,
    ),
    # UMT5-XXL; 40 blocks, 28 GB, 13 s a pass: the copies hide.
    "wan": Shape(
        te=(Row(24, 0.473, 0.007),),
        transformer=(Row(40, 0.7, 0.325),),
        vae=(Row(4, 0.12, 1.2),),
        passes=2,
        steps=2,
    ),
    # Qwen2.5-VL 7B; 60 blocks, 40.8 GB, 1.3 s a pass.
    "qwen": Shape(
        te=(Row(28, 0.575, 0.005),),
        transformer=(Row(60, 0.68, 0.0217),),
        vae=(Row(4, 0.06, 0.1),),
        passes=2,
        steps=2,
    ),
    # Two CLIPs; a UNet: 92 % of the bytes in three places, where 69 % of the time is spent.
    "sdxl": Shape(
        te=(Row(12, 0.01, 0.001), Row(32, 0.04, 0.001)),
        transformer=(
            Row(4, 0.05, 0.005),
            Row(20, 0.078, 0.0014),
            Row(10, 0.078, 0.0014),
            Row(30, 0.078, 0.0014),
            Row(4, 0.05, 0.005),
        ),
        vae=(Row(4, 0.04, 0.075),),
        steps=3,
        rest_gb=0.05,
        scratch_gb=0.1,
    ),
}
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
