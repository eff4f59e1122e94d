"""Real pipelines and budgets for them, between what chain mode takes and what everything takes."""

import copy
import functools
import gc

import torch

import offload_engine
from benchmarks.pipelines import PIPELINES

from .miniature import measured

TIGHT = 340_000  # a budget that holds the denoiser of `make` and one encoder
NAMES = ("sdxl", "flux", "wan_t2v")
STEPS = 2


def peak_from_here():
    """Torch's peak begins anew: the test's right, never the engine's."""
    torch.accelerator.reset_peak_memory_stats()


@functools.cache
def built(name):
    return PIPELINES[name].build("tiny")


def fresh(name):
    return copy.deepcopy(built(name))


@functools.cache
def plain(name):
    """The call without offload; its peak is what everything takes."""
    return alone(fresh(name).to("sim:0"), name)


@functools.cache
def chained(name):
    """The first call in chain mode; no budget is smaller than its peak."""
    pipe = fresh(name)
    with offload_engine.attach(pipe, PIPELINES[name].seq):
        return alone(pipe, name)


def alone(pipe, name):
    gc.collect()
    peak_from_here()
    return measured(lambda: PIPELINES[name].run(pipe, STEPS))


def between(name, fraction):
    """A budget between the peak of chain mode and that of everything."""
    least, most = chained(name).peak_nbytes, plain(name).peak_nbytes
    gc.collect()
    return int(least + fraction * (most - least))
