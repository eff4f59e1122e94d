"""The benchmark on a GPU: ``make bench-gpu``, or ``python -m benchmarks.gpu --help``.

SDXL and FLUX.1-dev at their published sizes, with random weights drawn on the GPU, run in several
ways, each in a process of its own. It keeps to a budget of seconds: what comes last is left out
first, and it says so. The result file has the hardware, the versions, the commit, the command and
every sample.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .children import ChildFailed, run_child, write_result
from .provenance import provenance
from .tables import table
from .ways import why_missing

# What matters most comes first.
ORDER = (
    ("sdxl", "this engine"),
    ("sdxl", "no offload"),
    ("sdxl", "accelerate"),
    ("flux", "this engine"),
    ("flux", "no offload"),
    ("flux", "this engine, 35%"),
    ("flux", "accelerate"),
    ("flux", "group offload"),
    ("sdxl", "this engine, 35%"),
    ("sdxl", "group offload"),
    ("flux", "this engine, 70%"),
    ("sdxl", "pinned chain"),
    ("flux", "pinned chain"),
)
MODELS = ("sdxl", "flux")
_LEAST_SECONDS = {"sdxl": 25.0, "flux": 55.0}  # a run that has less is not begun
_GROWTH_CALLS = {"sdxl": 20, "flux": 0}
_MACHINE_SECONDS = 75.0  # most for the part about the machine
_GIB = 2**30


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything that is asked for and fits into the budget; the whole result."""
    deadline = time.time() + options.budget
    result: dict[str, Any] = {**provenance(), "options": _plain(options), "runs": []}
    machine_deadline = min(deadline, time.time() + _MACHINE_SECONDS)
    result["machine"] = _child("benchmarks.gpu_machine", options, machine_deadline)
    _save(options, result)
    print(show_machine(result["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as room:
        for model, way in ORDER:
            if model in options.models and way in options.ways:
                result["runs"].append(_run(model, way, options, deadline, Path(room)))
                _compare_image(result["runs"], Path(room))
                _save(options, result)
                print(_progress(result["runs"][-1], deadline), flush=True)
    result["file"] = str(_save(options, result))
    return result


def _run(
    model: str, way: str, options: argparse.Namespace, deadline: float, room: Path
) -> dict[str, Any]:
    missing = why_missing(way)
    left = deadline - time.time()
    least = 0 if options.tiny else _LEAST_SECONDS[model]
    if missing is None and left < least:
        missing = f"{max(0, left):.0f} s of the budget are left, it takes {least:.0f} s or more"
    if missing is not None:
        return {"model": model, "way": way, "skipped": missing}
    arguments = ["--model", model, "--way", way, "--steps", str(getattr(options, f"{model}_steps"))]
    arguments += ["--requests", str(getattr(options, f"{model}_requests"))]
    arguments += ["--growth-calls", str(3 if options.tiny else _GROWTH_CALLS[model])]
    arguments += ["--image", str(_image(room, model, way))]
    if options.cap_gib:
        arguments += ["--cap-gib", str(options.cap_gib)]
    return {
        "model": model,
        "way": way,
        **_child("benchmarks.gpu_run", options, deadline, arguments),
    }


def _child(
    module: str, options: argparse.Namespace, deadline: float, arguments: list[str] | None = None
) -> dict[str, Any]:
    """What a child found until its deadline; {"failed": why} where that is nothing."""
    arguments = [*(arguments or ()), "--device", options.device, "--deadline", str(deadline)]
    arguments += ["--tiny"] if options.tiny else []
    try:
        found = run_child(module, *arguments, timeout=max(1.0, deadline - time.time() + 5))
    except ChildFailed as error:
        return {"failed": str(error)}
    assert isinstance(found, dict)
    return found


def _image(room: Path, model: str, way: str) -> Path:
    return room / f"{model}-{way.replace(' ', '-')}.npy"


def _compare_image(runs: list[dict[str, Any]], room: Path) -> None:
    """Whether the last run and the first with an image of this model made the same bits."""
    last = runs[-1]
    made = [r for r in runs if r["model"] == last["model"] and _image_of(room, r).exists()]
    if last not in made or made[0] is last:
        return
    image, first = np.load(_image_of(room, last)), np.load(_image_of(room, made[0]))
    last["compared_with"] = made[0]["way"]
    last["same_bits"] = bool(np.array_equal(image, first))
    last["largest_difference"] = float(np.abs(image - first).max())


def _image_of(room: Path, run: dict[str, Any]) -> Path:
    return _image(room, run["model"], run["way"])


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}


def _save(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Writes the result file; the same one each time."""
    name = result["machine"].get("hardware", {}).get("name", options.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path: Path = options.results / f"{slug}-{result['date'][:10]}-{result['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, result)
    return path


def _progress(run: dict[str, Any], deadline: float) -> str:
    took = sum(step["seconds"] for step in run.get("steps", {}).values())
    said = _why_not(run) or f"{run['seconds']:.3f} s a request"
    left = deadline - time.time()
    return f"{run['model']}, {run['way']}: {said} (took {took:.0f} s, {left:.0f} s left)"


def _why_not(run: dict[str, Any]) -> str | None:
    """Why a run has no time of a request; None where it has."""
    if "seconds" in run:
        return None
    if "skipped" in run:
        return f"skipped: {run['skipped']}"
    for name in ("out_of_memory", "stopped"):
        if name in run:
            return f"{name.replace('_', ' ')} in {run[name]}"
    if "failed" in run:
        return "failed: " + str(run["failed"])
    return f"out of time in {run.get('under_way')}"


def show_machine(machine: dict[str, Any]) -> str:
    """The tables about the machine."""
    parts = [f"Hardware: {machine.get('hardware', machine.get('failed'))}"]
    if "link" in machine:
        rows = [
            [f"{r['nbytes'] / 2**20:g} MiB", r["kind"], r["direction"], r["bandwidth"] / 1e9]
            for r in machine["link"]
        ]
        parts.append(table(["one copy", "host memory", "direction", "GB/s"], rows))
    if "host_memory" in machine:
        rows = [[name, seconds] for name, seconds in machine["host_memory"].items()]
        parts.append(table(["host memory, filled for the first time", "s/GiB"], rows))
    if "pinning" in machine:
        names = ("fill_seconds_per_gib", "pin_seconds_per_gib", "unpin_seconds_per_gib")
        rows = [[r["how"], *(r.get(name) for name in names)] for r in machine["pinning"]]
        parts.append(table(["pinning", "fill s/GiB", "pin s/GiB", "unpin s/GiB"], rows))
    if "copying" in machine:
        rows = [
            [r["how"], r["copies"], r["bandwidth"] / 1e9, r["host_seconds"] * 1e3]
            for r in machine["copying"]
        ]
        parts.append(table(["to the device", "copies", "GB/s", "host ms to queue"], rows))
    if "fast_path" in machine:
        rows = [
            [r["denoiser"], name, seconds * 1e6]
            for r in machine["fast_path"]
            for name, seconds in r["added_seconds"].items()
        ]
        parts.append(table(["denoiser on the device", "hook", "adds us"], rows))
    if "noticing" in machine:
        ours = machine["noticing"]
        seconds = ours["before_seconds"] + ours["after_seconds"] - ours["pointing_seconds"]
        parts.append(f"Noticing changed weights, SDXL's denoiser: {seconds * 1e3:.2f} ms a fetch")
    failed = [f"{k}: {v}" for k, v in machine.items() if k.endswith("_failed")]
    return "\n\n".join([*parts, *failed])


HEAD = (
    "model", "way", "s/request", "x none", "peak alloc GiB", "reserved GiB", "process VRAM GiB",
    "up GB", "down GB", "attach s", "host RSS GiB", "same bits",
)  # fmt: skip


def show_runs(runs: list[dict[str, Any]]) -> str:
    """The table of the runs, and a line for each that is not in it."""
    none = {r["model"]: r["seconds"] for r in runs if r["way"] == "no offload" and "seconds" in r}
    rows = [_row(run, none.get(run["model"])) for run in runs if "seconds" in run]
    rest = [f"{r['model']}, {r['way']}: {_why_not(r)}" for r in runs if "seconds" not in r]
    stopped = [f"{r['model']}, {r['way']}: stopped: {r['stopped']}" for r in runs if _is_short(r)]
    fetches = [_fetch_line(run) for run in runs if "report" in run]
    failed = [
        f"{r['model']}, {r['way']}: failed after that: {r['failed']}" for r in runs if _late(r)
    ]
    return "\n".join([table(HEAD, rows), *rest, *stopped, *failed, *fetches])


def _late(run: dict[str, Any]) -> bool:
    return "seconds" in run and "failed" in run


def _is_short(run: dict[str, Any]) -> bool:
    return "seconds" in run and "stopped" in run


def _row(run: dict[str, Any], none_seconds: float | None) -> list[Any]:
    requests, steps = run["requests"], run["steps"]
    traffic = run.get("traffic", {})
    peaks = [max(r[name] for r in requests) / _GIB for name in _PEAKS]
    moved = [traffic[way]["nbytes"] / 1e9 if way in traffic else None for way in ("HtoD", "DtoH")]
    rss = steps["timed"]["rss_nbytes"]
    return [
        run["model"],
        run["way"],
        f"{run['seconds']:.3f}",
        f"{run['seconds'] / none_seconds:.2f}" if none_seconds else None,
        *(f"{peak:.2f}" for peak in (*peaks, run["process_vram_nbytes"] / _GIB)),
        *(None if nbytes is None else f"{nbytes:.2f}" for nbytes in moved),
        f"{steps['attach']['seconds']:.1f}",
        None if rss is None else f"{rss / _GIB:.1f}",
        run.get("same_bits"),
    ]


_PEAKS = ("peak_allocated_nbytes", "peak_reserved_nbytes")


def _fetch_line(run: dict[str, Any]) -> str:
    """Bandwidth that the engine's fetches reached, and what noticing cost in the same call."""
    report = run["report"]
    parts = report["components"].values()
    nbytes, seconds = (sum(c[k] for c in parts) for k in ("fetched_nbytes", "fetch_seconds"))
    line = f"{run['model']}, {run['way']}: fetches of {nbytes / 1e9:.2f} GB took {seconds:.3f} s"
    if seconds:
        line += f", {nbytes / seconds / 1e9:.1f} GB/s"
    if report.get("predicted_seconds"):
        line += f"; the call took {report['seconds']:.3f} s, {report['predicted_seconds']:.3f} s "
        line += f"predicted, {report['bound_seconds']:.3f} s at best"
    if run.get("fetch_seconds") and not run["device"].startswith("sim"):  # whose time is its own
        part = sum(run["settling_seconds"]) / run["fetch_seconds"]
        line += f"; settling (looking for changes, pointing back) was {100 * part:.1f} % of that"
    if "growth" in run:
        first, last = run["growth"]["readings"][0], run["growth"]["readings"][-1]
        reserved = (last["reserved_nbytes"] - first["reserved_nbytes"]) / 2**20
        line += f"; {last['calls']} calls: reserved {reserved:+.1f} MiB"
    return line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help='"sim" with --tiny is a dry run without a GPU')
    add("--tiny", action="store_true", help="small sizes, same code: for a dry run")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    ways = [*dict.fromkeys(way for _, way in ORDER)]
    add("--ways", nargs="+", choices=ways, default=ways, metavar="WAY")
    add("--sdxl-steps", type=int, default=20, help="denoising steps at 1024 px (default: 20)")
    add("--flux-steps", type=int, default=10, help="denoising steps at 1024 px (default: 10)")
    add("--sdxl-requests", type=int, default=3, help="timed ones, after a warm one (default: 3)")
    add("--flux-requests", type=int, default=2, help="timed ones, after a warm one (default: 2)")
    add("--cap-gib", type=float, help="device memory a process may use: emulates a smaller GPU")
    add("--budget", type=float, default=450, help="seconds for everything (default: 450)")
    results = Path(__file__).parent / "results"
    add("--results", type=Path, default=results, help="folder of the result files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes; 1 where there is no such device, or no run gave a number."""
    options = parse(arguments)
    if options.device.startswith("cuda") and not _has_cuda():
        print("Nothing measured: torch finds no CUDA device here.")
        return 1
    print(f"{datetime.datetime.now():%H:%M:%S}, budget {options.budget:.0f} s", flush=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = measure(options)
    print("\n" + show_runs(result["runs"]))
    print(f"\nWritten to {result['file']}")
    return 0 if any("seconds" in run for run in result["runs"]) else 1


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    raise SystemExit(main())
