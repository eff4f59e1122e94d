"""Streaming on the simulated accelerator: budgets below the weights, and what else there is.

The link is set so slow beside the computing as PCIe is beside a denoiser: to copy its weights takes
longer than one step. Bytes, counts and order are exact; seconds are the simulator's.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch

from offload_engine import sim

from .pipelines import PIPELINES
from .shapes import SHARES
from .tables import table
from .ways import WAYS, Way, budgeted, modules, why_missing

CASES = ("flux", "wan_t2v", "qwen_image", "sdxl")
OTHERS = ("no offload", "group offload", "group, recording", "sequential", "accelerate")
STEPS = 4
_PAGEABLE = 0.54  # of the link, for what is not pinned: 12.9 of 23.85 GB/s on an RTX 4090
_COPY_PER_STEP = 1.6  # to copy the weights once, as FLUX.1's over PCIe 4.0 beside one step


@dataclass(frozen=True)
class Streamed:
    """One pipeline in one way: its third call."""

    pipeline: str
    way: str
    weights_nbytes: int
    peak_nbytes: int
    seconds: float  # simulated
    own_seconds: float  # of these, for copies of the pipeline itself: its prompt, its result
    bound_seconds: float | None
    h2d_nbytes: int
    d2h_nbytes: int
    host_syncs: int
    same_bits: bool

    @property
    def part_of_bound(self) -> float | None:
        """Without the pipeline's own copies, which are in no plan; None without a bound."""
        if not self.bound_seconds:
            return None
        return (self.seconds - self.own_seconds) / self.bound_seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure_all() -> list[Streamed]:
    """Every pipeline of CASES, in each way and under each budget."""
    return [result for name in CASES for result in measure(name)]


def measure(name: str) -> list[Streamed]:
    """The pipeline ``name`` in each way and under each budget."""
    sim.load()
    bandwidth, expected, peak, weights = _without_offload(name)
    own = _own_seconds(name, bandwidth)
    found = []
    for way in OTHERS:
        if why_missing(way) is None:
            try:
                found.append(_run(name, way, WAYS[way], bandwidth, expected, weights, own))
            except (RuntimeError, ValueError) as error:
                print(f"{name}, {way}: {type(error).__name__}: {str(error).splitlines()[0]}")
    for part in SHARES:
        vram = int(peak - weights + part * weights)
        place = functools.partial(budgeted, vram=lambda _, vram=vram: vram)
        way = f"this engine, {part:.0%}"
        found.append(_run(name, way, place, bandwidth, expected, weights, own))
    return found


def _without_offload(name: str) -> tuple[float, torch.Tensor, int, int]:
    """Bandwidth to use; output, peak and weights of the pipeline."""
    device, held = _fresh()
    case = PIPELINES[name]
    pipe = case.build("tiny")
    sizes = {n: sum(t.nbytes for t in m.state_dict().values()) for n, m in modules(pipe).items()}
    pipe.to(device)
    expected = torch.as_tensor(case.run(pipe, STEPS))
    peak = torch.accelerator.max_memory_allocated() - held
    began = sim.now()
    case.run(pipe, STEPS)
    torch.accelerator.synchronize()
    per_step = (sim.now() - began) / STEPS
    return max(sizes.values()) / (_COPY_PER_STEP * per_step), expected, peak, sum(sizes.values())


def _own_seconds(name: str, bandwidth: float) -> float:
    """How much longer a call takes, all on the device, on the links that `_run` sets."""
    took = []
    for slow in (False, True):
        device, _ = _fresh()
        if slow:
            _slow_down(bandwidth)
        case = PIPELINES[name]
        pipe = case.build("tiny").to(device)
        case.run(pipe, STEPS)
        torch.accelerator.synchronize()
        began = sim.now()
        case.run(pipe, STEPS)
        torch.accelerator.synchronize()
        took.append(sim.now() - began)
        del pipe
    return took[1] - took[0]


def _slow_down(bandwidth: float) -> None:
    sim.configure(h2d_bandwidth=bandwidth, pageable_bandwidth=_PAGEABLE * bandwidth)


def _fresh() -> tuple[torch.device, int]:
    """The device, and what hooks of others still hold there."""
    gc.collect()
    sim.reset()
    torch.accelerator.reset_peak_memory_stats()
    return sim.load(), torch.accelerator.memory_allocated()


def _run(
    name: str,
    way: str,
    place: Way,
    bandwidth: float,
    expected: torch.Tensor,
    weights: int,
    own_seconds: float,
) -> Streamed:
    """The third call."""
    device, held = _fresh()
    _slow_down(bandwidth)
    case = PIPELINES[name]
    pipe = case.build("tiny")
    placed = place(pipe, device, case.seq)
    try:
        for _ in range(2):
            case.run(pipe, STEPS)
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before, began = sim.counters(), sim.now()
        output = torch.as_tensor(case.run(pipe, STEPS))
        torch.accelerator.synchronize()
        seconds, moved = sim.now() - began, sim.counters().since(before)
        bound = placed.engine.report().bound_seconds if placed.engine is not None else None
    finally:
        placed.detach()
    return Streamed(
        name, way, weights, torch.accelerator.max_memory_allocated() - held, seconds, own_seconds,
        bound, moved.h2d_nbytes, moved.d2h_nbytes, moved.host_syncs, torch.equal(output, expected),
    )  # fmt: skip


def show(results: list[Streamed]) -> str:
    """The table, one line for each way of each pipeline."""
    base = {r.pipeline: r.seconds for r in results if r.way == "no offload"}
    head = (
        "pipeline", "way", "peak KiB", "up, weights", "down KiB", "host syncs", "sim ms",
        "part of no offload", "part of bound", "same bits",
    )  # fmt: skip
    return table(head, [_row(result, base[result.pipeline]) for result in results])


def _row(result: Streamed, base: float) -> tuple[Any, ...]:
    r = result
    bound = "-" if r.part_of_bound is None else f"{r.part_of_bound:.3f}"
    return (
        r.pipeline, r.way, f"{r.peak_nbytes / 1024:.0f}", f"{r.h2d_nbytes / r.weights_nbytes:.2f}",
        f"{r.d2h_nbytes / 1024:.0f}", r.host_syncs, f"{r.seconds * 1e3:.3f}",
        f"{r.seconds / base:.3f}", bound, r.same_bits,
    )  # fmt: skip
