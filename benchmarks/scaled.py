"""Pipelines with the proportions of real models, scaled down, streamed on the simulator.

Sizes are scaled, seconds are those of the real model. A call in the steady state is held against
the bound of its plan, and its bytes against the fewest that any call can copy which is as fast.
"""

from __future__ import annotations

import gc
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import offload_engine
from offload_engine import sim
from offload_engine.plan import Plan

from . import shapes
from .instances import Instance, least_nbytes
from .least import HAS_SCIPY, fewest_nbytes
from .shapes import SHAPES, SHARES
from .tables import table

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


def in_whole_blocks(plan: Plan) -> Instance:
    """The question that ``plan`` answers, with the parts of each block in one."""
    nbytes: dict[str, int] = {}
    for name, size in plan.nbytes.items():
        nbytes[_block(name)] = nbytes.get(_block(name), 0) + size
    uses = [
        use._replace(segments=tuple(dict.fromkeys(map(_block, use.segments)))) for use in plan.uses
    ]
    return Instance(nbytes, uses, plan.budget_nbytes, plan.bandwidth)


def _block(name: str) -> str:
    return re.sub(r"/\d+$", "", name)


def measure(name: str, share: float) -> dict[str, Any]:
    """The third call of a model under ``share`` of its weights, on a device as large as that."""
    device = sim.load()
    gc.collect()
    sim.reset()
    shape, x = SHAPES[name], noise()
    pipe = build(shape)
    pipe.to(device)
    expected = pipe(x, num_inference_steps=shape.steps)
    pipe.to("cpu")
    gc.collect()
    budget, held = int(share * weights_nbytes(pipe)), torch.accelerator.memory_allocated()
    with offload_engine.attach(pipe, vram=budget) as engine:
        sim.configure(h2d_bandwidth=LINK, pageable_bandwidth=LINK, capacity_nbytes=held + budget)
        for _ in range(2):
            pipe(x, num_inference_steps=shape.steps)
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        counters, began = sim.counters(), sim.now()
        output = pipe(x, num_inference_steps=shape.steps)
        torch.accelerator.synchronize()
        seconds, moved = sim.now() - began, sim.counters().since(counters)
        peak = torch.accelerator.max_memory_allocated() - held
        bound, plan = engine.report().bound_seconds or 0.0, engine.plan
    assert plan is not None
    copied = moved.h2d_nbytes - x.nbytes
    as_fast = fewest_nbytes(in_whole_blocks(plan), seconds) if HAS_SCIPY else None
    return {
        "model": name,
        "budget %": round(100 * share),
        "seconds": round(seconds, 3),
        "part of bound": round(seconds / bound, 4),
        "copied KiB": round(copied / 1024),
        "of the least": round(copied / least_nbytes(plan), 4),
        "of any as fast": round(copied / as_fast, 4) if as_fast else None,
        "within budget": peak <= budget,
        "same bits": torch.equal(output, expected),
    }


def measure_all() -> list[dict[str, Any]]:
    """Every model under every share."""
    return [measure(name, share) for name in SHAPES for share in SHARES]


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    return table(list(rows[0]), [list(row.values()) for row in rows])
