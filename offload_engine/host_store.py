"""Owns the masters: exact-size pinned host memory, its budget and its ledger.

[Note: exact pinned memory] torch rounds pinned requests up to a power of two
(pytorch CachingHostAllocator.h; on 2.13 by default too), up to twice the bytes. On CUDA a block
is anonymous memory of the exact size that is filled first, which also touches its pages, and
registered after, piece by piece: one registration of 512 GiB fails on recent drivers, and a copy
must not cross from one registration into the next. Other accelerators get their own pinned
memory through torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .segments import View
from .units import format_nbytes, parse_nbytes

_log = logging.getLogger("offload_engine")
_PIECE_NBYTES = 2**30  # one registration


class Block:
    """One flat run of host memory that holds masters.

    Whoever keeps a tensor carved from it keeps the memory alive, also after ``close``.
    """

    registered = False  # pinned where it lies, and unpinned there; else allocated as pinned

    def __init__(self, flat: Tensor, *, unpin: Callable[[], None] | None = None) -> None:
        """``unpin``: takes a pinned block off the ledger; None: it is pageable."""
        self.flat = flat  # uint8, 1-D
        self.pinned = unpin is not None
        # Also where nobody closes the block: its pipeline was dropped while attached.
        self._unpin = None if unpin is None else weakref.finalize(self, unpin)
        self._spans: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return self.flat.numel()

    def pieces(self) -> list[tuple[int, int]]:
        """The byte ranges to copy one by one: none crosses a registration."""
        edges = [*range(0, self.nbytes, _PIECE_NBYTES), self.nbytes]
        return list(itertools.pairwise(edges))

    def carve(self, view: View) -> Tensor:
        """The tensor at ``view``. Each span has a storage of its own, so that saving or copying
        one weight does not take the whole block along (facts: deepcopy, pickle, safetensors)."""
        with torch.inference_mode(False):
            return view.in_span(self._span(view))

    def _span(self, view: View) -> Tensor:
        if view.span_start not in self._spans:
            array = self.flat.numpy()[view.span_start : view.span_start + view.span_nbytes]
            self._spans[view.span_start] = torch.from_numpy(array)
        return self._spans[view.span_start]

    def register(self, unpin: Callable[[], None]) -> None:
        """The filled memory has been pinned where it lies; ``unpin`` undoes that."""
        self.registered = self.pinned = True
        self._unpin = weakref.finalize(self, unpin)

    def close(self) -> bool:
        """Gives the memory back; the caller has waited for every copy from it.

        True where it is not pinned any more, so that tensors carved from it may live on in it.
        """
        self._spans.clear()
        if self._unpin is not None:
            self._unpin()
        self.pinned = self.pinned and not self.registered
        return not self.pinned


class HostStore:
    """Makes blocks, pinned while the budget lasts, and keeps the ledger of their bytes."""

    pinned_nbytes = 0  # of all stores of this process: the budget is the machine's

    def __init__(self, device: torch.device, pin: str | bool | int = "auto") -> None:
        """``pin``: "auto" (most of the machine's memory), True (no limit), False (never), or
        the most bytes to pin in this process, as a number or as text ("24GiB")."""
        self.device = device
        self.limit_nbytes = _pin_limit(pin)
        self._warned = False

    def allocate(self, nbytes: int) -> Block:
        """A block of exactly ``nbytes`` bytes; pageable, with one warning, where pinning fails.

        On CUDA it is pinned by ``seal``, after it was filled.
        """
        if self.device.type == "cpu" or not self._may_pin(nbytes):
            return Block(_anonymous(nbytes))
        if self.device.type == "cuda":
            return Block(_anonymous(nbytes))
        return self._torch_pinned(nbytes)

    def seal(self, block: Block) -> None:
        """Registers a filled block with the device where that is how it is pinned."""
        if self.device.type != "cuda" or block.pinned or not self._may_pin(block.nbytes):
            return
        try:
            unregister = register(block.flat, cuda_registrar(self.device))
        except RuntimeError as error:
            _discard_last_error(self.device)
            self._warn(block.nbytes, str(error))
            return
        block.register(_booked(block.nbytes, unregister))

    def _torch_pinned(self, nbytes: int) -> Block:
        try:
            flat = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            if not flat.is_pinned():  # a backend that only knows the method
                flat = flat.pin_memory()
        except (RuntimeError, MemoryError) as error:
            self._warn(nbytes, str(error).splitlines()[0])
            return Block(_anonymous(nbytes))
        return Block(flat, unpin=_booked(nbytes, lambda: None))

    def _may_pin(self, nbytes: int) -> bool:
        if nbytes == 0:
            return False
        allowed = self.limit_nbytes
        if allowed is None or HostStore.pinned_nbytes + nbytes <= allowed:
            return True
        if allowed:
            self._warn(nbytes, f"the limit is {format_nbytes(allowed)} (pin=)")
        return False

    def _warn(self, nbytes: int, why: str) -> None:
        if self._warned:
            return
        self._warned = True
        _log.warning(
            "Could not pin %s more host memory, with %s pinned already: %s. Going on with pageable "
            "memory: results are the same, transfers are slower. Give pin=False to silence this.",
            format_nbytes(nbytes),
            format_nbytes(HostStore.pinned_nbytes),
            why,
        )


def _booked(nbytes: int, unregister: Callable[[], None]) -> Callable[[], None]:
    """Books ``nbytes`` as pinned; returns what takes them off the ledger and unregisters them."""
    HostStore.pinned_nbytes += nbytes

    def unpin() -> None:
        HostStore.pinned_nbytes -= nbytes
        unregister()

    return unpin


def trim() -> None:
    """Gives freed heap memory back to the system, where the C library can (glibc)."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


_malloc_trim = _find_malloc_trim()


def _anonymous(nbytes: int) -> Tensor:
    """``nbytes`` of fresh memory straight from the system: exact to the page, gone when freed."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    with torch.inference_mode(False):
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8))


Registrar = tuple[Callable[[int, int], int], Callable[[int], int]]


def cuda_registrar(device: torch.device) -> Registrar:
    """(register(address, nbytes) -> error, unregister(address) -> error) of the CUDA runtime."""
    runtime = torch.cuda.cudart()
    portable = 1  # cudaHostRegisterPortable: pinned for every device

    def do_register(address: int, nbytes: int) -> int:
        with torch.cuda.device(device):
            return int(runtime.cudaHostRegister(address, nbytes, portable))

    def do_unregister(address: int) -> int:
        return int(runtime.cudaHostUnregister(address))

    return do_register, do_unregister


def _discard_last_error(device: torch.device) -> None:
    """A registration that failed leaves its error behind for the next kernel launch to raise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)


def register(flat: Tensor, registrar: Registrar) -> Callable[[], None]:
    """Registers ``flat`` piece by piece; returns the undo. All or nothing: raises RuntimeError
    with the driver's error code after taking back the pieces that went well."""
    do_register, do_unregister = registrar
    done: list[int] = []

    def undo() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # torch does not keep the memory for copies in flight
        while done:
            do_unregister(done.pop())

    for start in range(0, flat.numel(), _PIECE_NBYTES):
        address = flat.data_ptr() + start
        error = do_register(address, min(_PIECE_NBYTES, flat.numel() - start))
        if error:
            undo()
            raise RuntimeError(f"cudaHostRegister returned error {error}")
        done.append(address)
    return undo


def _pin_limit(pin: str | bool | int) -> int | None:
    """Most bytes to pin in this process; None: no limit."""
    if pin is True:
        return None
    if pin is False:
        return 0
    return _most_of_memory() if pin == "auto" else parse_nbytes(pin, "pin")


def _most_of_memory() -> int:
    """All but 4 GiB or a tenth of the memory this process may use, at least 40 % of it.

    The rule is ComfyUI's (comfy/model_management.py); a container's limit counts.
    """
    total = machine_nbytes()
    return int(max(0.4 * total, min(0.9 * total, total - 4 * 2**30)))


def machine_nbytes() -> int:
    """Host memory that this process may use: the machine's, or its control group's if less."""
    limits = [_physical_nbytes()]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _physical_nbytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 * 2**30  # a system that does not say (Windows)
