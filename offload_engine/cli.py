"""The console program: ``offload-engine doctor`` says what this machine can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="offload-engine", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="devices, host memory, pinning, link bandwidth")
    doctor.add_argument("--device", help="the device to look at (default: the one torch finds)")
    doctor.add_argument("--mib", type=int, default=256, help="size of the test copy in MiB")
    options = parser.parse_args(arguments)
    return _doctor(options.device, options.mib)


def _doctor(device_name: str | None, mib: int) -> int:
    import torch

    from . import slots
    from .engine import resolve_device
    from .errors import DeviceError
    from .host_store import HostStore, machine_nbytes
    from .units import format_nbytes

    print(
        f"offload_engine {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}"
    )
    print(f"host memory that may be used: {format_nbytes(machine_nbytes())}")
    store = HostStore(torch.device("cpu"))
    print(f"most of it that pin='auto' pins: {format_nbytes(store.limit_nbytes or 0)}")
    try:
        device = resolve_device(device_name, None, None)
    except DeviceError as error:
        print(f"device: {error}")
        return 1
    if device.type == "cpu":
        print("device: cpu (nothing moves there)")
        return 0
    free, total = slots.memory_info(device)
    print(f"device: {device}, {format_nbytes(free)} of {format_nbytes(total)} free")
    for pin in (True, False):
        speed = _bandwidth(device, mib * 2**20, pin)
        print(f"link, {'pinned' if pin else 'pageable'} memory: {speed / 1e9:.1f} GB/s")
    return 0


def _bandwidth(device: object, nbytes: int, pin: bool) -> float:
    """Bytes a second from host to device, the best of five copies; 0.0 if it cannot be timed."""
    import torch

    from .host_store import HostStore
    from .slots import lend
    from .transfers import Fetch, Link

    assert isinstance(device, torch.device)
    store, link = HostStore(device, pin), Link(device)
    block = store.allocate(nbytes)
    block.flat.zero_()
    store.seal(block)
    best = 0.0
    for _ in range(5):
        fetch = Fetch(lend("test copy", nbytes, device, lambda: None), link.current_stream())
        assert fetch.flat is not None
        link.prepare(fetch, [(block, 0)])
        link.queue(fetch)
        link.wait(fetch)
        seconds = fetch.timing.seconds
        best = max(best, nbytes / seconds if seconds else 0.0)
        link.join(fetch)
        fetch.flat = None
    block.close()
    return best


if __name__ == "__main__":
    sys.exit(main())
