"""Pipelines whose components consist of blocks, under budgets."""

from __future__ import annotations

import functools

import torch
from diffusers import FluxPipeline

import offload_engine
from benchmarks.pipelines import flux
from benchmarks.pipelines.case import finish, seeded
from benchmarks.scaled import LINK, weights_nbytes
from benchmarks.shapes import Row, Shape
from offload_engine import sim

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
