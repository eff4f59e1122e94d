"""One pipeline of a published size, run in one way, in a process of its own.

``python -m benchmarks.gpu_run --help``. The result is written after each step, so that a run that
is ended early has said what it found. `benchmarks.gpu` starts these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from offload_engine import sim
from offload_engine.units import format_nbytes

from . import growth, host, models
from .children import write_result
from .noticing import timed_settling
from .ways import WAYS, Placed, modules

_FEW_STEPS = 2  # of requests that are not timed: what moves does not depend on the steps
_HOST_SPARE = 4 * 2**30  # bytes of host memory to leave alone
# Host memory that a way needs, as a part of the weights. Pinned tensor by tensor, sizes are rounded
# up to powers of two.
_HOST_NEED = {"no offload": 0.1, "accelerate": 1.1, "pinned chain": 1.7, "group offload": 1.7}
_OWN_HOST_NEED = 1.1
_STREAMS = ("group offload", "this engine, 35%", "this engine, 70%")  # no component as a whole


class Skipped(Exception):
    """This run cannot be made here; the text says why."""


class OutOfTime(Exception):
    """The budget does not last for the next step; what was measured so far counts."""


class Record:
    """What has been measured, on disk after each step."""

    def __init__(self, path: Path, **data: Any) -> None:
        self._path = path
        self.data: dict[str, Any] = data

    def add(self, **data: Any) -> None:
        self.data.update(data)
        write_result(self._path, self.data)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Notes that ``name`` is under way, then its seconds and the host memory behind it."""
        self.add(under_way=name)
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.add(under_way=None)
        steps = self.data.setdefault("steps", {})
        steps[name] = {"seconds": seconds, "rss_nbytes": host.rss_nbytes()}
        self.add()


class Run:
    """The measurement: each method is a step."""

    def __init__(self, options: argparse.Namespace, record: Record) -> None:
        self.options = options
        self.record = record
        self.device = open_device(options.device, options.cap_gib)
        self.model = models.model(options.model, options.tiny)
        self.dtype = torch.float32 if options.tiny else torch.bfloat16
        self.used_at_start = used_nbytes(self.device)
        record.add(device=str(self.device), used_at_start_nbytes=self.used_at_start)

    def left(self) -> float:
        """Seconds until the deadline."""
        return float(self.options.deadline - time.time())

    def build(self) -> Any:
        """The pipeline, with its weights on the device or on the host, as its way starts."""
        pipe = self.model.build()
        pipe.set_progress_bar_config(disable=True)
        sizes = models.component_nbytes(pipe, self.dtype)
        self.record.add(weights_nbytes=sizes, dtype=str(self.dtype).removeprefix("torch."))
        self._check_fit(sizes)
        to_host = self.options.way != "no offload"
        place = models.ToHost(2**16 if self.options.tiny else 2**28) if to_host else _stay
        models.materialise(pipe, self.device, self.dtype, place)
        del place
        empty_caches()
        return pipe

    def _check_fit(self, sizes: dict[str, int]) -> None:
        way, free = self.options.way, free_nbytes(self.device, self.options.cap_gib)
        need = sum(sizes.values()) if way == "no offload" else max(sizes.values())
        if need > free and way not in _STREAMS:
            raise Skipped(
                f"weights of {format_nbytes(need)} must be on the device at once, where "
                f"{format_nbytes(free)} are free"
            )
        part = _HOST_NEED.get(way, _OWN_HOST_NEED)
        need = int(sum(sizes.values()) * part) + (not self.options.tiny) * _HOST_SPARE
        available = host.available_nbytes()
        if available is not None and need > available:
            raise Skipped(
                f"{format_nbytes(need)} of host memory are needed, "
                f"{format_nbytes(available)} are available"
            )

    def attach(self, pipe: Any) -> Placed:
        """Sets the pipeline up in its way; how far host memory rose on the way."""
        host.settle()
        before, could_forget = host.rss_nbytes(), host.forget_peak()
        placed = WAYS[self.options.way](pipe, self.device)
        torch.accelerator.synchronize()
        if before is not None and could_forget:
            self.record.add(attach_rise_nbytes=(host.peak_rss_nbytes() or 0) - before)
        return placed

    def warm(self, pipe: Any) -> None:
        """The first request; the memory of the device is sampled while it runs."""
        with VramSampler(self.device) as sampler:
            self.record.add(warm_request=self._request(pipe, self.options.steps)[1])
        used = sampler.peak_nbytes - self.used_at_start
        self.record.add(process_vram_nbytes=used, process_vram_samples=sampler.samples)

    def timed(self, pipe: Any, placed: Placed) -> None:
        """The requests that count; the image of the last goes to a file."""
        taken: list[dict[str, Any]] = []
        longest = self.record.data["warm_request"]["seconds"]
        for _ in range(self.options.requests):
            if self.left() < 1.5 * longest:
                self.record.add(stopped=f"out of time after {len(taken)} timed requests")
                break
            image, found = self._request(pipe, self.options.steps)
            taken.append(found)
            self.record.add(requests=taken)
        if not taken:
            raise OutOfTime("no time for a timed request")
        self.record.add(
            seconds=statistics.median(found["seconds"] for found in taken),
            is_finite=bool(image.isfinite().all()),
        )
        np.save(self.options.image, image.numpy())
        if placed.engine is not None:
            self.record.add(report=placed.engine.report().to_dict())

    def _request(self, pipe: Any, steps: int) -> tuple[Tensor, dict[str, Any]]:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        image = self.model.request(pipe, steps)
        torch.accelerator.synchronize()
        return image, {
            "seconds": time.perf_counter() - began,
            "peak_allocated_nbytes": torch.accelerator.max_memory_allocated(self.device),
            "peak_reserved_nbytes": torch.accelerator.max_memory_reserved(self.device),
            "used_nbytes": used_nbytes(self.device) - self.used_at_start,
        }

    def traffic(self, pipe: Any) -> None:
        """Bytes that one request moves, by direction and kind of host memory."""
        self._has_time(4)
        self.record.add(traffic=count_traffic(self.device, lambda: self._few(pipe)))

    def engine_extras(self, pipe: Any, placed: Placed) -> None:
        """What only this engine is asked: the cost of noticing, and growth over many calls."""
        assert placed.engine is not None
        self._has_time(2)
        with timed_settling() as settling:
            self._few(pipe)
        components = placed.engine.report().components.values()
        self.record.add(
            settling_seconds=settling, fetch_seconds=sum(c.fetch_seconds for c in components)
        )
        calls = self.options.growth_calls
        if not calls:
            return
        self._has_time(calls)
        before = allocator_counts(self.device)
        found = growth.measure(lambda: self._few(pipe), self.device, calls)
        after = allocator_counts(self.device)
        self.record.add(
            growth=found.to_dict(), allocator={name: after[name] - before[name] for name in after}
        )

    def _has_time(self, requests: int) -> None:
        """Raises OutOfTime unless the budget lasts for so many requests of few steps."""
        if self.left() < requests * self.record.data["warm_request"]["seconds"] / 2:
            raise OutOfTime(f"{self.left():.0f} s left")

    def _few(self, pipe: Any) -> None:
        self.model.request(pipe, min(_FEW_STEPS, self.options.steps))

    def detach(self, pipe: Any, placed: Placed) -> None:
        """Undoes the way; what stays behind on the device."""
        placed.detach()
        torch.accelerator.synchronize()
        empty_caches()
        left = sum(
            t.nbytes for m in modules(pipe).values() for t in m.parameters() if not on_cpu(t)
        )
        self.record.add(
            left_on_device_nbytes=left,
            left_allocated_nbytes=torch.accelerator.memory_allocated(self.device),
        )


def _stay(drawn: Tensor) -> Tensor:
    return drawn


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def open_device(name: str, cap_gib: float | None = None) -> torch.device:
    """The device ``name``, ready for use, its memory for this process limited to ``cap_gib``."""
    device = sim.load() if name == "sim" else torch.device(name)
    if device.index is None:
        device = torch.device(device.type, 0)
    torch.accelerator.set_device_index(device.index)
    torch.zeros(1, device=device)
    torch.accelerator.synchronize()
    if cap_gib is not None and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        fraction = min(1.0, cap_gib * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    elif cap_gib is not None and name == "sim":
        sim.configure(capacity_nbytes=int(cap_gib * 2**30))
    return device


def memory_info(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    free, total = torch.accelerator.get_memory_info(device)
    return free, total


def used_nbytes(device: torch.device) -> int:
    """Bytes of the device that are taken, by whomever."""
    free, total = memory_info(device)
    return total - free


def free_nbytes(device: torch.device, cap_gib: float | None) -> int:
    """Bytes of the device that this process could still take."""
    free = memory_info(device)[0]
    return free if cap_gib is None else min(free, int(cap_gib * 2**30))


def empty_caches() -> None:
    """What torch keeps for later goes back to the device and to the host."""
    host.settle()
    torch.accelerator.empty_cache()
    for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):  # newer and older torch
        empty = getattr(torch._C, name, None)
        if empty is not None:
            empty()
            break


def allocator_counts(device: torch.device) -> dict[str, int]:
    """How often torch's allocator went to the driver, and how often it ran into the limit."""
    of = torch.cuda if device.type == "cuda" else torch.accelerator
    stats = of.memory_stats(device)
    names = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_ooms")
    return {name: int(stats.get(name, 0)) for name in names}


class VramSampler:
    """Reads how much of the device is taken, 50 times a second, until its block ends."""

    def __init__(self, device: torch.device, interval_seconds: float = 0.02) -> None:
        self.peak_nbytes = 0
        self.samples = 0
        self._device = device
        self._interval_seconds = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak_nbytes = max(self.peak_nbytes, used_nbytes(self._device))
            self.samples += 1
            if self._done.wait(self._interval_seconds):
                return

    def __enter__(self) -> VramSampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        self._thread.join()


def count_traffic(device: torch.device, request: Callable[[], None]) -> dict[str, Any]:
    """Copies between host and device during ``request``; {"unknown": why} where none can tell."""
    if device.type == "sim":
        before = sim.counters()
        request()
        moved = sim.counters().since(before)
        return {
            "HtoD": {"nbytes": moved.h2d_nbytes, "copies": moved.h2d_copies},
            "DtoH": {"nbytes": moved.d2h_nbytes, "copies": moved.d2h_copies},
        }
    try:
        return sum_copies(_profiled(request))
    except Exception as error:  # the profiler is not essential, and fails in many ways
        return {"unknown": f"{type(error).__name__}: {error}"}


def _profiled(request: Callable[[], None]) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        request()
        torch.accelerator.synchronize()
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]
    return list(events)


def sum_copies(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes, number and device seconds of the copies in a trace of torch's profiler, by direction
    and kind: "HtoD", "HtoD Pinned", "HtoD Pageable", "DtoH", ..."""
    sums: dict[str, Any] = {}
    for event in events:
        words = str(event.get("name", "")).replace("(", " ").replace(")", " ").split()
        if words[:1] != ["Memcpy"] or "bytes" not in event.get("args", {}):
            continue
        direction = words[1]
        kinds = {"Pinned", "Pageable"} & set(words[2:])
        for name in (direction, *(f"{direction} {kind}" for kind in kinds)):
            entry = sums.setdefault(name, {"nbytes": 0, "copies": 0, "seconds": 0.0})
            entry["nbytes"] += int(event["args"]["bytes"])
            entry["copies"] += 1
            entry["seconds"] += float(event.get("dur", 0.0)) / 1e6
    if not sums:
        return {"unknown": "the profiler recorded no copies"}
    return sums


def run(options: argparse.Namespace, record: Record) -> None:
    """All steps, as far as the time lasts. Raises Skipped."""
    with record.step("device"):
        this = Run(options, record)
    with record.step("build"):
        pipe = this.build()
    with record.step("attach"):
        placed = this.attach(pipe)
    with record.step("warm"):
        this.warm(pipe)
    with record.step("timed"):
        this.timed(pipe, placed)
    with record.step("traffic"):
        this.traffic(pipe)
    if placed.engine is not None:
        with record.step("extras"):
            this.engine_extras(pipe, placed)
    if options.way != "no offload":
        with record.step("detach"):
            this.detach(pipe, placed)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("sdxl", "flux"), required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, same code")
    parser.add_argument("--cap-gib", type=float, help="most device memory for this process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--growth-calls", type=int, default=0, help="to look for growth over")
    parser.add_argument("--deadline", type=float, default=time.time() + 300, help="as time.time()")
    parser.add_argument("--image", default="image.npy")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """The child of `benchmarks.gpu`."""
    options = parse()
    diffusers.logging.set_verbosity_error()
    if options.tiny:
        torch.set_num_threads(1)  # models this small lose by a second
    record = Record(options.out, model=options.model, way=options.way, steps_asked=options.steps)
    try:
        run(options, record)
    except Skipped as why:
        record.add(skipped=str(why))
    except OutOfTime as why:
        record.add(stopped=f"{record.data['under_way']}: {why}")
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        record.add(out_of_memory=f"{record.data['under_way']}: {first}")
    except Exception:
        record.add(failed=f"{record.data['under_way']}: {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    main()
