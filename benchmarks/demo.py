"""The demo: two images from an offloaded SDXL with random weights, and what the offload did.

Run it with ``make demo``, or ``python -m benchmarks.demo --help``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch

import offload_engine
from benchmarks.pipelines import PIPELINES, modules
from offload_engine import OffloadError, sim
from offload_engine.engine import resolve_device
from offload_engine.units import format_nbytes

_CASE = PIPELINES["sdxl"]
_SEEDS = (1, 2)  # of the noise, one for each image


@dataclass(frozen=True)
class Target:
    """Where to run, why there, and in which precision."""

    device: torch.device
    why: str
    dtype: torch.dtype

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Run:
    """Two images made in one way; `peak_nbytes` is 0 where the device does not count."""

    images: list[torch.Tensor]  # (1, 3, height, width), 0 to 1
    seconds: list[float]
    peak_nbytes: int


def choose_target(wanted: str | None) -> Target:
    """The device asked for; else an accelerator, a simulated one, or the CPU."""
    device, why = _choose_device(wanted)
    is_real = device.type not in ("cpu", "sim")
    return Target(device, why, torch.float16 if is_real else torch.float32)


def _choose_device(wanted: str | None) -> tuple[torch.device, str]:
    if wanted == "sim":
        return sim.load(), "asked for"
    if wanted is not None:
        return resolve_device(wanted, None, None), "asked for"
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        return torch.device(found.type, 0), "the accelerator that torch finds here"
    reason = sim.why_unavailable()
    if reason is None:
        return sim.load(), "no accelerator here, so a simulated one: bytes count, times do not"
    return torch.device("cpu"), f"no accelerator here, and no simulated one: {reason}"


def generate(pipe: Any, target: Target, steps: int) -> Run:
    """Makes the images, and takes the peak of device memory while it does."""
    _reset_peak(target)
    images, seconds = [], []
    for seed in _SEEDS:
        began = time.perf_counter()
        noise = torch.Generator("cpu").manual_seed(seed)
        images.append(torch.as_tensor(_CASE.run(pipe, steps, generator=noise)))
        seconds.append(time.perf_counter() - began)
    return Run(images, seconds, _peak_nbytes(target))


def _reset_peak(target: Target) -> None:
    if not target.is_cpu:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(target.device)


def _peak_nbytes(target: Target) -> int:
    return 0 if target.is_cpu else int(torch.accelerator.max_memory_allocated(target.device))


def save(images: list[torch.Tensor], folder: Path) -> list[Path]:
    """Writes the images as PNG files into `folder`, which it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"demo-{seed}.png" for seed in _SEEDS]
    for image, path in zip(images, paths, strict=True):
        pixels = (image[0].float() * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    return paths


def show(target: Target, engine: Run, resident: Run) -> bool:
    """Prints how the two runs compare; returns whether their images are the same to the bit."""
    same = all(map(torch.equal, engine.images, resident.images))
    print(f"\n{'':22}{'offloaded':>14}{'all resident':>14}")
    if not target.is_cpu:
        peaks = [format_nbytes(run.peak_nbytes) for run in (engine, resident)]
        print(f"{'peak device memory':22}{peaks[0]:>14}{peaks[1]:>14}")
    for number, pair in enumerate(zip(engine.seconds, resident.seconds, strict=True), 1):
        print(f"{f'image {number}, host seconds':22}{pair[0]:>14.2f}{pair[1]:>14.2f}")
    print(f"\nImages bit-identical: {'yes' if same else 'NO'}")
    return same


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the demo."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    parser.add_argument("--device", help="cpu, sim, cuda, cuda:1, ... (default: the best here)")
    parser.add_argument(
        "--size",
        choices=("tiny", "demo", "full"),
        default="demo",
        help="of the model; full is SDXL as published, for a GPU and 32 GB of RAM (default: demo)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 1 where offloading changed a bit of the images."""
    options = parse(arguments)
    diffusers.logging.set_verbosity_error()
    try:
        target = choose_target(options.device)
    except (OffloadError, sim.SimUnavailable) as error:
        raise SystemExit(f"--device {options.device}: {error}") from None
    print(f"Device: {target.device} ({target.why})")

    pipe = _CASE.build(options.size, target.dtype)
    parts = modules(pipe).values()
    nbytes = sum(weight.nbytes for part in parts for weight in part.parameters())
    dtype = str(target.dtype).removeprefix("torch.")
    print(f"Pipeline: {type(pipe).__name__}, random {dtype} weights, {format_nbytes(nbytes)}")

    with offload_engine.attach(pipe, device=target.device) as engine:
        offloaded = generate(pipe, target, options.steps)
        print(f"\nThe second image, with the engine ({options.steps} steps):")
        engine.report().print()
    for path in save(offloaded.images, options.out):
        print(f"Saved {path}")

    try:
        resident = generate(pipe.to(target.device), target, options.steps)
    except torch.OutOfMemoryError:
        peak = format_nbytes(offloaded.peak_nbytes)
        print(f"\nAll resident, it does not fit; offloaded, the peak was {peak}.")
        return 0
    return 0 if show(target, offloaded, resident) else 1


if __name__ == "__main__":
    raise SystemExit(main())
