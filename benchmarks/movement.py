"""What moves, and how much is on the device, for each way to run each pipeline.

On the simulated accelerator, with the smallest weights: bytes, counts and order are exact. Its
seconds come from its model of a device and say nothing about a real one's speed.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from offload_engine import sim

from .pipelines import PIPELINES
from .tables import table
from .ways import WAYS

CASES = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux": "flux",
    "wan_t2v": "wan_t2v",
    "audio": "stable_audio",
    "img2img": "sdxl_img2img",
    "controlnet": "sdxl_controlnet",
}
COMPARED = ("no offload", "accelerate", "this engine")


@dataclass(frozen=True)
class Movement:
    """One pipeline run in one way: its second call, but for the two peaks."""

    pipeline: str
    way: str
    weights_nbytes: int
    first_peak_nbytes: int  # allocated on the device, in the first call
    peak_nbytes: int  # in the second
    h2d_nbytes: int
    d2h_nbytes: int
    h2d_copies: int
    d2h_copies: int
    pageable_copies: int
    host_syncs: int
    seconds: float  # simulated
    output: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the output."""
        return {name: value for name, value in vars(self).items() if name != "output"}


def measure(name: str, way: str, steps: int = 2) -> Movement:
    """Runs the pipeline ``name`` of CASES twice on a simulated device that is fresh."""
    device = sim.load()
    case = PIPELINES[CASES[name]]
    gc.collect()
    sim.reset()
    pipe = case.build("tiny")
    nbytes = _weights_nbytes(pipe)
    placed = WAYS[way](pipe, device, case.seq)
    try:
        _, first_peak = _call(case, pipe, steps)
        before, began = sim.counters(), sim.now()
        output, peak = _call(case, pipe, steps)
        moved = sim.counters().since(before)
        torch.accelerator.synchronize()
        seconds = sim.now() - began
    finally:
        placed.detach()
    return Movement(
        name, way, nbytes, first_peak, peak, moved.h2d_nbytes, moved.d2h_nbytes, moved.h2d_copies,
        moved.d2h_copies, moved.pageable_copies, moved.host_syncs, seconds, output,
    )  # fmt: skip


def _call(case: Any, pipe: Any, steps: int) -> tuple[torch.Tensor, int]:
    torch.accelerator.reset_peak_memory_stats()
    output = torch.as_tensor(case.run(pipe, steps))
    return output, torch.accelerator.max_memory_allocated()


def _weights_nbytes(pipe: Any) -> int:
    parts = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    tensors = (t for part in parts for t in (*part.parameters(), *part.buffers()))
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def show(results: list[Movement]) -> str:
    """The table, one line for each way of each pipeline."""
    first = {result.pipeline: result.output for result in reversed(results)}
    head = (
        "pipeline", "way", "peak KiB", "1st call", "up KiB", "down KiB", "copies up", "down",
        "pageable", "host syncs", "sim ms", "same bits",
    )  # fmt: skip
    return table(head, [_row(r, torch.equal(r.output, first[r.pipeline])) for r in results])


def _row(result: Movement, is_same: bool) -> tuple[Any, ...]:
    r = result
    sizes = (r.peak_nbytes, r.first_peak_nbytes, r.h2d_nbytes, r.d2h_nbytes)
    counts = (r.h2d_copies, r.d2h_copies, r.pageable_copies, r.host_syncs)
    kib = [f"{nbytes / 1024:.1f}" for nbytes in sizes]
    return (r.pipeline, r.way, *kib, *counts, f"{r.seconds * 1e3:.2f}", is_same)
