"""The machine itself: its link, what pinning costs, and small questions only a GPU can answer.

``python -m benchmarks.gpu_machine --help``. `benchmarks.gpu` starts it first: every other number is
to be read beside the bandwidth found here.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from offload_engine import host_store
from offload_engine.units import format_nbytes

from . import fast_path, host, models, noticing
from .attaching import sim_registrar
from .gpu_run import OutOfTime, Record, memory_info, open_device
from .provenance import run_text

MIB = 2**20
_LINK_SIZES = (MIB, 16 * MIB, 256 * MIB)
_PIECES = (64 * MIB, 256 * MIB, 1024 * MIB)
_COPY_CHUNKS = (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
_HOST_BLOCK = 2048 * MIB
_TINY = 1024  # all sizes are so many times smaller in a dry run


class Machine:
    """One device; each method answers one question."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = open_device(options.device)
        self.scale = _TINY if options.tiny else 1
        self.rounds = 5 if options.tiny else 20
        is_cuda = self.device.type == "cuda"
        self.registrar = (host_store.cuda_registrar if is_cuda else sim_registrar)(self.device)

    def hardware(self) -> dict[str, Any]:
        """What the device is."""
        if self.device.type != "cuda":
            return {"name": self.device.type, "memory_nbytes": memory_info(self.device)[1]}
        properties = torch.cuda.get_device_properties(self.device)
        asked = "driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current"
        query = ("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
        answer = (run_text(*query) or "").splitlines()
        return {
            "name": properties.name,
            "memory_nbytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            asked: answer[0] if answer else None,
        }

    def link(self) -> list[dict[str, Any]]:
        """Bandwidth of single copies, by size, direction and kind of host memory."""
        rows = []
        for size, kind in itertools.product(_LINK_SIZES, ("pinned", "pageable")):
            nbytes = size // self.scale
            on_host = torch.ones(nbytes, dtype=torch.uint8)
            if kind == "pinned":
                on_host = on_host.pin_memory()
            on_device = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
            for direction in ("HtoD", "DtoH"):
                pair = (on_device, on_host) if direction == "HtoD" else (on_host, on_device)
                repeats = max(5, min(50, 2**30 // size))
                seconds = self._copy_seconds(*pair, repeats=repeats)
                rows.append(
                    {
                        "nbytes": nbytes,
                        "kind": kind,
                        "direction": direction,
                        "bandwidth": nbytes / statistics.median(seconds),
                        "samples_seconds": seconds,
                    }
                )
        return rows

    def _copy_seconds(self, target: Tensor, source: Tensor, repeats: int) -> list[float]:
        return [
            self._device_seconds(lambda: target.copy_(source, non_blocking=True))
            for _ in range(repeats + 2)
        ][2:]

    def _device_seconds(self, work: Callable[[], Any]) -> float:
        began = torch.Event(device=self.device, enable_timing=True)
        ended = torch.Event(device=self.device, enable_timing=True)
        torch.accelerator.synchronize()
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    def host_memory(self) -> dict[str, float]:
        """Seconds per GiB to fill fresh host memory of several kinds for the first time."""
        nbytes = 1024 * MIB // self.scale
        source = np.ones(nbytes, dtype=np.uint8)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        makers = {
            "the engine's": lambda: host_store._anonymous(nbytes).numpy(),
            "mmap shared": lambda: _mapped(nbytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
            "mmap private": lambda: _mapped(nbytes, private),
            "mmap private, huge pages": lambda: _mapped(nbytes, private, huge=True),
            "torch.empty": lambda: torch.empty(nbytes, dtype=torch.uint8).numpy(),
        }
        found = {}
        for name, make in makers.items():
            fresh = torch.from_numpy(make())
            began = time.perf_counter()
            fresh.copy_(torch.from_numpy(source))
            found[name] = (time.perf_counter() - began) * 2**30 / nbytes
            del fresh
        return found

    def pinning(self) -> list[dict[str, Any]]:
        """Seconds per GiB to fill, register and unregister memory, by size of one registration;
        beside them memory that torch allocates pinned."""
        nbytes = self._block_nbytes()
        pieces = [piece // self.scale for piece in _PIECES]
        rows = [self._pin(nbytes, piece) for piece in pieces]
        rows.append(self._pin(nbytes, pieces[-1], fill=False))
        began = time.perf_counter()
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        took = time.perf_counter() - began
        del pinned
        rows.append({"how": "torch, pin_memory=True", "pin_seconds_per_gib": took * 2**30 / nbytes})
        return rows

    def _pin(self, nbytes: int, piece: int, fill: bool = True) -> dict[str, Any]:
        whole = host_store._PIECE_NBYTES
        host_store._PIECE_NBYTES = piece
        try:
            block = host_store._anonymous(nbytes)
            times = [time.perf_counter()]
            if fill:
                block.fill_(1)
            times.append(time.perf_counter())
            undo = host_store.register(block, self.registrar)
            times.append(time.perf_counter())
            undo()
            times.append(time.perf_counter())
        finally:
            host_store._PIECE_NBYTES = whole
        host.settle()
        filled, pinned, unpinned = (b - a for a, b in itertools.pairwise(times))
        how = f"registered in pieces of {format_nbytes(piece)}"
        return {
            "how": how if fill else f"{how}, not filled before",
            "fill_seconds_per_gib": filled * 2**30 / nbytes if fill else None,
            "pin_seconds_per_gib": pinned * 2**30 / nbytes,
            "unpin_seconds_per_gib": unpinned * 2**30 / nbytes,
        }

    def _block_nbytes(self) -> int:
        available = host.available_nbytes() or _HOST_BLOCK * 8
        return min(_HOST_BLOCK, available // 8, memory_info(self.device)[0] // 4) // self.scale

    def copying(self) -> list[dict[str, Any]]:
        """One copy from registered memory against the same bytes in pieces, and tensor by tensor
        in the sizes of SDXL's denoiser; with the host's time to queue them."""
        nbytes = min(self._block_nbytes(), host_store._PIECE_NBYTES)  # in one registration
        block = host_store._anonymous(nbytes).fill_(1)
        unregister = host_store.register(block, self.registrar)
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        try:
            ways = self._ways_to_copy(nbytes)
            return [self._copy(name, edges, target, block) for name, edges in ways.items()]
        finally:
            unregister()

    def _copy(self, name: str, edges: list[int], target: Tensor, source: Tensor) -> dict[str, Any]:
        copies = list(itertools.pairwise(edges))
        host_seconds: list[float] = []

        def queue() -> None:
            began = time.perf_counter()
            for start, stop in copies:
                target[start:stop].copy_(source[start:stop], non_blocking=True)
            host_seconds.append(time.perf_counter() - began)

        seconds = [self._device_seconds(queue) for _ in range(4)][1:]
        return {
            "how": name,
            "copies": len(copies),
            "nbytes": edges[-1],
            "bandwidth": edges[-1] / statistics.median(seconds),
            "host_seconds": statistics.median(host_seconds[1:]),
            "samples_seconds": seconds,
        }

    def _ways_to_copy(self, nbytes: int) -> dict[str, list[int]]:
        ways = {"one copy": [0, nbytes]}
        for chunk in _COPY_CHUNKS:
            step = chunk // self.scale
            ways[f"pieces of {format_nbytes(step)}"] = [*range(0, nbytes, step), nbytes]
        sizes = [2 * p.numel() for p in models.sdxl_unet().parameters()]
        ends = itertools.accumulate(max(1, size // self.scale) for size in sizes)
        ways["tensor by tensor"] = [0, *itertools.takewhile(lambda end: end <= nbytes, ends)]
        return ways

    def crossing(self) -> dict[str, Any]:
        """Whether one copy may cross from one registration into the next, as the engine's never
        do. The last question: an answer of no is an error of the driver."""
        nbytes = 64 * MIB // self.scale
        block = host_store._anonymous(nbytes).fill_(1)
        whole = host_store._PIECE_NBYTES
        host_store._PIECE_NBYTES = nbytes // 2
        try:
            unregister = host_store.register(block, self.registrar)
        finally:
            host_store._PIECE_NBYTES = whole
        target = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        try:
            seconds = self._device_seconds(lambda: target.copy_(block, non_blocking=True))
            arrived = bool((target == 1).all())
            return {"works": arrived, "bandwidth": nbytes / seconds}
        except RuntimeError as error:
            return {"works": False, "error": str(error)}
        finally:
            unregister()

    def fast_path(self) -> list[dict[str, Any]]:
        """What a hook adds to a forward, on this device."""
        results = [
            fast_path.measure(self.device, name, rounds=self.rounds) for name in fast_path.DENOISERS
        ]
        print(fast_path.show(results))
        return [result.to_dict() for result in results]

    def noticing(self) -> dict[str, Any]:
        """Host time to notice changed weights of SDXL's denoiser."""
        result = noticing.measure(self.device, rounds=self.rounds)
        print(noticing.show(result))
        return result.to_dict()


QUESTIONS = (
    "hardware", "link", "host_memory", "pinning", "copying", "fast_path", "noticing", "crossing",
)  # fmt: skip


def _mapped(nbytes: int, flags: int, huge: bool = False) -> Any:
    mapped = mmap.mmap(-1, nbytes, flags=flags)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, dtype=np.uint8)


def main() -> None:
    """The child of `benchmarks.gpu`. A question that fails is noted and the next one asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, same code")
    parser.add_argument("--deadline", type=float, default=time.time() + 120, help="as time.time()")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    if options.tiny:
        torch.set_num_threads(1)  # models this small lose by a second
    record = Record(options.out)
    machine = Machine(options)
    for name in QUESTIONS:
        try:
            if time.time() > options.deadline:
                raise OutOfTime("the time for this part is over")
            with record.step(name):
                record.add(**{name: getattr(machine, name)()})
        except Exception as error:  # the next question does not depend on this one
            record.add(**{f"{name}_failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
