"""The benchmarks that need no GPU: ``make bench``, or ``python -m benchmarks --help``.

Bytes, counts and memory are exact here. Times of the host are this machine's, so look at their
ratios; times of the simulated accelerator say nothing about a real one.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import diffusers
import torch

from offload_engine import sim

from . import attaching, fast_path, growth, movement, noticing, planner, scaled, streaming
from .children import write_result
from .least import HAS_SCIPY
from .pipelines import PIPELINES
from .provenance import provenance
from .tables import table
from .ways import WAYS, why_missing


@dataclass(frozen=True)
class Target:
    """A number to reach, and whether it was."""

    name: str
    wanted: str
    measured: str
    met: bool


@dataclass
class Findings:
    """What has been measured so far."""

    data: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def target(self, name: str, wanted: str, measured: str, met: bool) -> None:
        self.targets.append(Target(name, wanted, measured, met))


def measure_fast_path(options: argparse.Namespace, found: Findings) -> None:
    """(a) What the hook adds to a forward of a component that is there already."""
    device = sim.load()
    results = [fast_path.measure(device, name) for name in fast_path.DENOISERS]
    print(fast_path.show(results))
    found.data["fast_path"] = [result.to_dict() for result in results]
    ratios = [result.ratio(fast_path.ENGINE, fast_path.ACCELERATE) for result in results]
    known = [ratio for ratio in ratios if ratio is not None]
    if known:
        name, worst = "added per forward, part of accelerate's", max(known)
        found.target(name, "<= 0.125", f"{worst:.3f}", worst <= 1 / 8)


def measure_movement(options: argparse.Namespace, found: Findings) -> None:
    """(b) Bytes, copies and peaks of each pipeline, run in each way."""
    ways = [way for way in movement.COMPARED if why_missing(way) is None]
    results = [movement.measure(name, way) for name in movement.CASES for way in ways]
    print(movement.show(results))
    found.data["movement"] = [result.to_dict() for result in results]
    by_way = {way: [r for r in results if r.way == way] for way in ways}
    ours, none = by_way["this engine"], by_way["no offload"]
    same = [torch.equal(a.output, b.output) for a, b in zip(ours, none, strict=True)]
    found.target("pipelines with the same bits", f"{len(same)}", f"{sum(same)}", all(same))
    extra = sum(a.d2h_nbytes - b.d2h_nbytes for a, b in zip(ours, none, strict=True))
    found.target("bytes copied back beyond no offload", "0", str(extra), extra == 0)
    if "accelerate" in by_way:
        pairs = list(zip(ours, by_way["accelerate"], strict=True))
        worst = max(_peak(a) / _peak(b) for a, b in pairs)
        met = all(_peak(a) <= _peak(b) for a, b in pairs)
        found.target("peak device memory, part of accelerate's", "<= 1", f"{worst:.6f}", met)


def _peak(result: movement.Movement) -> int:
    return max(result.first_peak_nbytes, result.peak_nbytes)


def measure_attaching(options: argparse.Namespace, found: Findings) -> None:
    """(c) Host memory while weights move into masters."""
    nbytes = int(options.gb * 1e9)
    results = [attaching.measure(nbytes, masters) for masters in attaching.MASTERS]
    print(attaching.show(results))
    found.data["attaching"] = [asdict(result) for result in results]
    worst = max(result.part(result.attach_peak_nbytes) for result in results)
    found.target(
        "rise of host memory by attaching", "<= 10 %", f"{100 * worst:.2f} %", worst <= 0.1
    )
    left = sum(result.left_pinned_nbytes + result.left_device_nbytes for result in results)
    found.target("pinned and device bytes after detach", "0", str(left), left == 0)


def measure_noticing(options: argparse.Namespace, found: Findings) -> None:
    """(d) What it costs to notice changed weights, beside the fetch."""
    result = noticing.measure(sim.load())
    print(noticing.show(result))
    if options.profile:
        print(noticing.profile(sim.load()))
    found.data["noticing"] = result.to_dict()
    part = result.noticing_seconds / result.fetch_seconds
    name = "noticing changed weights, part of the fetch"
    found.target(name, "<= 2 %", f"{100 * part:.2f} %", part <= 0.02)


def measure_growth(options: argparse.Namespace, found: Findings) -> None:
    """(e) Whether anything grows over many calls."""
    device = sim.load()
    for way in ("this engine", "no offload"):
        case = PIPELINES["flux"]
        pipe = case.build("tiny")
        pipe.set_progress_bar_config(disable=True)
        placed = WAYS[way](pipe, device)
        call = functools.partial(case.run, pipe, steps=1)
        result = growth.measure(call, device, options.calls)
        placed.detach()
        print(growth.show(result, way), end="\n\n")
        found.data.setdefault("growth", {})[way] = result.to_dict()
        if way == "this engine":
            held = max(result.of(n) for n in ("allocated_nbytes", "pinned_nbytes", "peak_nbytes"))
            name = f"growth over {options.calls} calls, device and pinned"
            found.target(name, "0", str(held), held <= 0)


def measure_streaming(options: argparse.Namespace, found: Findings) -> None:
    """(f) Streaming under budgets, beside group and sequential offload."""
    results = streaming.measure_all()
    print(streaming.show(results))
    found.data["streaming"] = [result.to_dict() for result in results]
    worst = max(result.part_of_bound or 0.0 for result in results)
    found.target("streamed call, part of the bound", "<= 1.05", f"{worst:.3f}", worst <= 1.05)
    same = [result.same_bits for result in results if result.bound_seconds]
    found.target("streamed with the same bits", str(len(same)), str(sum(same)), all(same))


def measure_planner(options: argparse.Namespace, found: Findings) -> None:
    """(g) The planner: quality against exact solutions, and speed."""
    results = planner.measure(quick=True)
    print(planner.show(results))
    found.data["planner"] = results
    worst = max(row["max %"] for row in results["small"])
    found.target("small plans above the optimum", "<= 2 %", f"{worst:.2f} %", worst <= 2)
    worst = max(row["above %"] for row in results["flux"])
    found.target("plans for FLUX.1 above their bound", "<= 5 %", f"{worst:.2f} %", worst <= 5)


def measure_scaled(options: argparse.Namespace, found: Findings) -> None:
    """(h) The proportions of real models under budgets."""
    rows = scaled.measure_all()
    print(scaled.show(rows))
    found.data["scaled"] = rows
    worst = max(row["part of bound"] for row in rows)
    found.target("scaled models, part of the bound", "<= 1.05", f"{worst:.3f}", worst <= 1.05)
    if HAS_SCIPY:
        worst = max(row["of any as fast"] or inf for row in rows)  # None: the solver gave up
        name = "bytes, of the fewest that any call as fast can copy"
        found.target(name, "<= 1.05", f"{worst:.3f}", worst <= 1.05)
    else:
        found.left_out.append("the fewest bytes that any call as fast can copy: needs scipy")


PARTS: dict[str, Callable[[argparse.Namespace, Findings], None]] = {
    "fast_path": measure_fast_path,
    "movement": measure_movement,
    "attaching": measure_attaching,
    "noticing": measure_noticing,
    "growth": measure_growth,
    "streaming": measure_streaming,
    "planner": measure_planner,
    "scaled": measure_scaled,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--gb", type=float, default=1.0, help="weights to attach (default: 1)")
    parser.add_argument("--calls", type=int, default=200, help="for growth (default: 200)")
    parser.add_argument("--profile", action="store_true", help="where noticing spends its time")
    parser.add_argument("--json", type=Path, help="write everything, raw samples included")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; 2 where there is no simulated accelerator to measure on."""
    options = parse(arguments)
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # models this small lose by a second
    reason = sim.why_unavailable()
    if reason is not None:
        print(f"Nothing measured: there is no simulated accelerator here ({reason}).")
        return 2
    found = Findings()
    missing = why_missing("accelerate")
    if missing is not None:
        found.left_out.append(f"every comparison with accelerate: {missing}")
    for name in options.only:
        print(f"\n== {PARTS[name].__doc__}\n", flush=True)
        began = time.perf_counter()
        PARTS[name](options, found)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    print("\n" + "\n".join(_summary(found)))
    if options.json:
        targets = [asdict(target) for target in found.targets]
        write_result(options.json, {**provenance(), **found.data, "targets": targets})
        print(f"Written to {options.json}")
    return 0


def _summary(found: Findings) -> Iterator[str]:
    rows = [(t.name, t.wanted, t.measured, t.met) for t in found.targets]
    yield "== Numbers to reach\n"
    yield table(["number", "wanted", "measured", "reached"], rows)
    yield from (f"Left out: {text}" for text in found.left_out)


if __name__ == "__main__":
    raise SystemExit(main())
