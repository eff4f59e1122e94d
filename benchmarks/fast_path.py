"""What a hook adds to the forward of a denoiser that is on the device already.

The denoisers are those of real pipelines, small, and set up as their users do, since what
accelerate's hook costs depends on the modules around it; only their forward is replaced by one that
does nothing. The variants take turns, so that what else the machine does falls on all of them; the
median counts.
"""

from __future__ import annotations

import statistics
import time
import types
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .tables import table
from .ways import WAYS, modules, why_missing

ROUNDS = 60
CALLS = 300  # a round
DENOISERS = {"sdxl": "unet", "flux": "transformer"}  # pipeline -> component

BARE, PRE_HOOK, ENGINE, ACCELERATE = "no hook", "bare pre-hook", "this engine", "accelerate"


def _do_nothing(self: nn.Module, sample: Tensor, timestep: Tensor, **more: Any) -> Tensor:
    return sample


@dataclass(frozen=True)
class FastPath:
    """Seconds per forward of one denoiser: without a hook, and what each hook adds to it."""

    device: str
    denoiser: str
    bare_seconds: float
    added_seconds: dict[str, float]
    samples: dict[str, list[float]]  # seconds per forward, one a round

    def ratio(self, of: str, to: str) -> float | None:
        """What ``of`` adds, as a part of what ``to`` adds; None where one was not measured."""
        if of not in self.added_seconds or to not in self.added_seconds:
            return None
        return self.added_seconds[of] / self.added_seconds[to]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the ratio that has a target."""
        return {**asdict(self), "engine_to_accelerate": self.ratio(ENGINE, ACCELERATE)}


def measure(
    device: torch.device, pipeline: str = "sdxl", rounds: int = ROUNDS, calls: int = CALLS
) -> FastPath:
    """The denoiser of ``pipeline`` with a bare pre-hook, this engine and, if there, accelerate."""
    variants = _variants(device, pipeline)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for module in variants.values():
            _time(module, device, calls)  # warm; offloaded ones are fetched
        for _ in range(rounds):
            for name, module in variants.items():
                samples[name].append(_time(module, device, calls))
    added = {
        name: statistics.median(a - b for a, b in zip(taken, samples[BARE], strict=True))
        for name, taken in samples.items()
        if name != BARE
    }
    denoiser = f"{pipeline} {DENOISERS[pipeline]}"
    return FastPath(str(device), denoiser, statistics.median(samples[BARE]), added, samples)


def _variants(device: torch.device, pipeline: str) -> dict[str, nn.Module]:
    ways = {BARE: "no offload", PRE_HOOK: "no offload", ENGINE: ENGINE}
    # On "cpu" accelerate compares with "cpu:0" and moves every weight at every forward.
    if device.type != "cpu" and why_missing(ACCELERATE) is None:
        ways[ACCELERATE] = ACCELERATE
    made = {name: _denoiser(device, pipeline, way) for name, way in ways.items()}
    made[PRE_HOOK].register_forward_pre_hook(lambda module, args: None)
    return made


def _denoiser(device: torch.device, pipeline: str, way: str) -> nn.Module:
    pipe = models.model(pipeline, tiny=True).build()
    models.materialise(pipe, torch.device("cpu"), torch.float32, lambda drawn: drawn)
    denoiser = modules(pipe)[DENOISERS[pipeline]]
    denoiser.forward = types.MethodType(_do_nothing, denoiser)
    denoiser.__dict__["_keeps"] = WAYS[way](pipe, device)  # for as long as the module lives
    return denoiser


def _time(module: nn.Module, device: torch.device, calls: int) -> float:
    sample, timestep = torch.zeros(2, 8, device=device), torch.zeros(1, device=device)
    more = {"encoder_hidden_states": sample, "added_cond_kwargs": {"time_ids": sample}}
    began = time.perf_counter()
    for _ in range(calls):
        module(sample, timestep, return_dict=False, **more)
    return (time.perf_counter() - began) / calls


def show(results: list[FastPath]) -> str:
    """The table; times are this machine's, the ratios are what counts."""
    head = ["denoiser", "device", "hook", "adds us", "x bare pre-hook", "x accelerate"]
    rows = [
        [
            result.denoiser,
            result.device,
            name,
            f"{seconds * 1e6:.2f}",
            _text(result.ratio(name, PRE_HOOK)),
            _text(result.ratio(name, ACCELERATE)),
        ]
        for result in results
        for name, seconds in result.added_seconds.items()
    ]
    return table(head, rows)


def _text(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.3f}"
