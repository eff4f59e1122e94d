"""Host memory while weights move into masters, and after the engine is gone.

It is measured in a process of its own (``python -m benchmarks.attaching --help``). The device is
the simulated one; its masters are pinned in one of two ways: "torch" is what every accelerator but
CUDA uses (memory that torch allocates pinned); "registered" is the way of CUDA (exact anonymous
memory, pinned where it lies), the driver played by the simulator.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import offload_engine
from offload_engine import engine as engine_module
from offload_engine import host_store, sim

from . import host
from .children import run_child, write_result
from .tables import table

MASTERS = ("torch", "registered")
_LARGEST = 1 / 40  # of all bytes, in the largest tensor: as in a T5-XXL encoder


@dataclass(frozen=True)
class Attaching:
    """Bytes in memory (RSS) of one process; ``*_peak`` is the highest of that phase."""

    masters: str
    weights_nbytes: int
    before_nbytes: int
    attach_peak_nbytes: int
    attached_nbytes: int
    detach_peak_nbytes: int
    detached_nbytes: int
    pinned_nbytes: int  # while attached
    left_pinned_nbytes: int  # after detach
    left_device_nbytes: int
    unchanged: bool  # whether every weight came back as it was

    def part(self, nbytes: int) -> float:
        """How far ``nbytes`` is above the start, as a part of the weights."""
        return (nbytes - self.before_nbytes) / self.weights_nbytes


def measure(nbytes: int, masters: str = "registered") -> Attaching:
    """Attaches ``nbytes`` of weights in a fresh process. Raises ChildFailed."""
    found = run_child(__name__, "--nbytes", str(nbytes), "--masters", masters, timeout=600)
    return Attaching(**found)


def build(nbytes: int) -> dict[str, nn.Module]:
    """Modules of ``nbytes`` of weights in bfloat16 or a little less, every page of them touched."""
    width = max(64, int((nbytes * _LARGEST / 2 / 4) ** 0.5) // 64 * 64)
    with torch.device("meta"):
        block = _block(width)
        count = max(2, nbytes // sum(p.nbytes for p in block.parameters()))
        blocks = nn.Sequential(*(_block(width) for _ in range(count)))
    for index, parameter in enumerate(list(blocks.parameters())):
        parameter.requires_grad_(False)
        _materialise(blocks, parameter, index)
    split = max(1, count // 5)
    return {"text_encoder": blocks[:split], "transformer": blocks[split:]}


def _block(width: int) -> nn.Module:
    block = nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 3 * width),
        nn.Linear(width, 4 * width),
        nn.Linear(4 * width, width),
    )
    return block.to(torch.bfloat16)


def _materialise(root: nn.Module, parameter: nn.Parameter, index: int) -> None:
    for module in root.modules():
        for name, held in module._parameters.items():
            if held is parameter:
                data = torch.full(held.shape, index % 251 + 1, dtype=held.dtype)
                module._parameters[name] = nn.Parameter(data, requires_grad=False)


def _is_unchanged(modules: dict[str, nn.Module]) -> bool:
    parameters = [p for module in modules.values() for p in module.parameters()]
    return all(bool((p == i % 251 + 1).all()) for i, p in enumerate(parameters))


def sim_registrar(device: torch.device) -> host_store.Registrar:
    """What pins host memory in place on the simulator; raises where the driver returns an error."""
    ops = torch.ops.offload_engine_sim

    def register(address: int, nbytes: int) -> int:
        ops.register_host(address, nbytes)
        return 0

    def unregister(address: int) -> int:
        ops.unregister_host(address)
        return 0

    return register, unregister


@contextlib.contextmanager
def registered_masters() -> Iterator[None]:
    """The engine pins as on CUDA, with the simulator as the driver that it registers with."""

    class Store(host_store.HostStore):
        def __init__(self, device: torch.device, pin: Any = "auto") -> None:
            super().__init__(torch.device("cuda"), pin)

    before = engine_module.HostStore, host_store.cuda_registrar
    engine_module.HostStore, host_store.cuda_registrar = Store, sim_registrar  # type: ignore[misc]
    try:
        yield
    finally:
        engine_module.HostStore, host_store.cuda_registrar = before  # type: ignore[misc]


def _measure_here(nbytes: int, masters: str) -> Attaching:
    device = sim.load()
    modules = build(nbytes)
    weights = sum(p.nbytes for module in modules.values() for p in module.parameters())
    offload_engine.attach({"warm": nn.Linear(8, 8)}, "warm", device=device).detach()
    way = registered_masters() if masters == "registered" else contextlib.nullcontext()
    with way:
        before, _ = _phase()
        engine = offload_engine.attach(modules, "text_encoder->transformer", device=device)
        attached, attach_peak = _phase()
        pinned = sim.counters().pinned_nbytes
        host.forget_peak()
        engine.detach()
        del engine
        detached, detach_peak = _phase()
    return Attaching(
        masters, weights, before, attach_peak, attached, detach_peak, detached, pinned,
        sim.counters().pinned_nbytes, torch.accelerator.memory_allocated(device),
        _is_unchanged(modules),
    )  # fmt: skip


def _phase() -> tuple[int, int]:
    """Bytes in memory, now that a phase is over, and the peak of the phase."""
    peak = host.peak_rss_nbytes()
    host.settle()
    now = host.rss_nbytes()
    if now is None or peak is None:
        raise SystemExit("this system does not say how much memory a process has")
    host.forget_peak()
    return now, peak


def show(results: list[Attaching]) -> str:
    """The table; everything but the first two columns is relative to the weights."""
    head = (
        "masters", "weights MiB", "attach peak +%", "attached +%", "detach peak +%", "detached +%",
        "pinned %", "left pinned", "left on device", "unchanged",
    )  # fmt: skip
    return table(head, [_row(result) for result in results])


def _row(r: Attaching) -> tuple[Any, ...]:
    rises = (r.attach_peak_nbytes, r.attached_nbytes, r.detach_peak_nbytes, r.detached_nbytes)
    parts = [f"{100 * r.part(nbytes):.2f}" for nbytes in rises]
    pinned = f"{100 * r.pinned_nbytes / r.weights_nbytes:.2f}"
    return (
        r.masters, f"{r.weights_nbytes / 2**20:.0f}", *parts, pinned, r.left_pinned_nbytes,
        r.left_device_nbytes, r.unchanged,
    )  # fmt: skip


def main() -> None:
    """The child: measures in this process, which has done nothing else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=int, default=10**9)
    parser.add_argument("--masters", choices=MASTERS, default="registered")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    write_result(options.out, asdict(_measure_here(options.nbytes, options.masters)))


if __name__ == "__main__":
    main()
