"""The only file with streams and events: start a fetch, wait for it on the compute stream.

[Note: stream protocol] The slot is allocated on the compute stream and ``granted`` recorded there
right after: earlier work of that stream may still use the memory the allocator hands out. The
copy stream waits for ``granted``, copies, records ``ready``. The compute stream waits for
``ready``, then runs. A fetch may be queued in parts, see [Note: pacing]. When the slot is dropped,
the stream it was allocated on must have waited for ``ready`` and for every other stream that used
it; then the allocator may lend the memory anew on that stream without any ``record_stream``. The
host never waits.

[Note: pacing] Copies in one direction are first come, first served: a prompt's few bytes, uploaded
by the pipeline itself, wait behind every gigabyte that is queued ahead of need. So at each forward
only as much is queued as the link can copy during that forward. Then such an upload waits until
about its end, when what it is for could begin anyway.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .host_store import Block

_LEAST_NBYTES = 2**12  # smaller copies are not worth their launch


class Timing:
    """When the copies of one fetch ran."""

    def __init__(self) -> None:
        self.spans: list[tuple[torch.Event, torch.Event]] = []  # around what was queued together
        self.is_complete = False

    @property
    def has_landed(self) -> bool:
        """Whether all copies have run."""
        return self.is_complete and all(ended.query() for _, ended in self.spans)

    @property
    def seconds(self) -> float:
        """Time on the link; 0.0 where the device does not time. Waits for the copies."""
        return sum(elapsed_seconds(began, ended) for began, ended in self.spans)


class _InFlight:
    """What must outlive copies that nobody has waited for yet, even if their slot is dropped with
    all that knows of it: the garbage collector orders no streams."""

    def __init__(self, owner: torch.Stream) -> None:
        self.owner = owner
        self.last: torch.Event | None = None
        self.blocks: list[Block] = []

    def settle(self) -> None:
        """Called when the slot dies."""
        if self.last is not None:
            self.owner.wait_event(self.last)
            self.last.synchronize()
        self.blocks.clear()


class Fetch:
    """A slot and the copies on their way into it, with its streams."""

    def __init__(self, flat: Tensor, owner: torch.Stream) -> None:
        self.flat: Tensor | None = flat
        self.owner = owner  # the stream that the slot was allocated on
        self.users: list[torch.Stream] = []  # streams that waited for it, the owner included
        self.granted: torch.Event | None = None
        self.to_queue: deque[tuple[Block, int, int, int]] = deque()  # block, start, stop, target
        self.ready: torch.Event | None = None  # after the last copy
        self.timing = Timing()
        self.in_flight = _InFlight(owner)
        weakref.finalize(flat.untyped_storage(), self.in_flight.settle).atexit = False


class Link:
    """The host-to-device copy path of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy_stream = torch.Stream(device=device)
        self.current_key = _stream_key(device)

    def current_stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def order(self, stream: torch.Stream, event: torch.Event | None) -> None:
        """Makes ``stream`` wait for ``event``; every order between streams is made here, but for
        slots that the garbage collector drops (`_InFlight`)."""
        assert event is not None
        stream.wait_event(event)

    def prepare(self, fetch: Fetch, blocks: Iterable[tuple[Block, int]]) -> None:
        """Has ``fetch`` copy each block to its offset in the slot, once `queue` says so."""
        fetch.granted = torch.Event(device=self.device)
        fetch.granted.record(fetch.owner)
        for block, offset in blocks:
            fetch.in_flight.blocks.append(block)
            fetch.to_queue.extend((block, start, stop, offset) for start, stop in block.pieces())
        if not fetch.to_queue:
            self.queue(fetch)

    def queue(self, fetch: Fetch, nbytes: float = math.inf) -> float:
        """Queues copies of at most ``nbytes``; gives what is left of them. See [Note: pacing]."""
        if fetch.ready is not None or nbytes < min(_LEAST_NBYTES, _left_nbytes(fetch)):
            return nbytes
        assert fetch.flat is not None
        began = torch.Event(device=self.device, enable_timing=True)
        with self.copy_stream, torch.inference_mode(False), torch.no_grad():
            if not fetch.timing.spans:
                self.order(self.copy_stream, fetch.granted)
            began.record(self.copy_stream)
            while fetch.to_queue and nbytes >= min(_LEAST_NBYTES, _left_nbytes(fetch)):
                block, start, stop, target = fetch.to_queue[0]
                part = stop - start if nbytes >= stop - start else int(nbytes)
                piece = fetch.flat[target + start : target + start + part]
                piece.copy_(block.flat[start : start + part], non_blocking=True)
                nbytes -= part
                fetch.to_queue[0] = (block, start + part, stop, target)
                if start + part == stop:
                    fetch.to_queue.popleft()
        self._end_span(fetch, began)
        return nbytes

    def _end_span(self, fetch: Fetch, began: torch.Event) -> None:
        ended = torch.Event(device=self.device, enable_timing=True)
        ended.record(self.copy_stream)
        fetch.timing.spans.append((began, ended))
        fetch.in_flight.last = ended
        if not fetch.to_queue:
            fetch.ready = ended
            fetch.timing.is_complete = True

    def wait(self, fetch: Fetch) -> None:
        """Makes the current stream wait for the copies."""
        assert fetch.ready is not None
        stream = self.current_stream()
        self.order(stream, fetch.ready)
        fetch.users.append(stream)
        if stream == fetch.owner:
            fetch.in_flight.last = None

    def mark(self) -> torch.Event:
        """A timed event, recorded on the current stream."""
        event = torch.Event(device=self.device, enable_timing=True)
        event.record(self.current_stream())
        return event

    def join(self, fetch: Fetch) -> None:
        """Orders the slot's owner and the current stream behind every use of the slot.

        After it the slot may be dropped, and what it holds may be read on the current stream.
        """
        if fetch.ready is None:  # not all of it was queued
            fetch.to_queue.clear()
            fetch.ready = torch.Event(device=self.device)
            fetch.ready.record(self.copy_stream)
        fetch.in_flight.last = None
        here = self.current_stream()
        for stream in {fetch.owner, here} if fetch.owner != here else {here}:
            if stream not in fetch.users:
                self.order(stream, fetch.ready)
            for user in fetch.users:
                if user != stream:
                    used = torch.Event(device=self.device)
                    used.record(user)
                    self.order(stream, used)

    def finish(self, fetch: Fetch) -> None:
        """Blocks the host until the copies have left host memory; mostly they have long."""
        spans = fetch.timing.spans
        last = fetch.ready or (spans[-1][1] if spans else None)
        if last is not None and not last.query():
            last.synchronize()


def _left_nbytes(fetch: Fetch) -> int:
    """Bytes of the piece that is to be queued next."""
    return fetch.to_queue[0][2] - fetch.to_queue[0][1] if fetch.to_queue else 0


def elapsed_seconds(start: torch.Event | None, end: torch.Event | None) -> float:
    """Device time between two events; 0.0 where the device does not time. Waits for ``end``."""
    if start is None or end is None:
        return 0.0
    try:
        if not end.query():
            end.synchronize()
        return start.elapsed_time(end) / 1e3
    except (RuntimeError, NotImplementedError, ValueError):
        return 0.0


def _stream_key(device: torch.device) -> Callable[[], Any]:
    """The cheapest call that tells the current streams of ``device`` apart by equality.

    It runs at every forward. The public call takes 1 us; what it ends in, 0.1 us.
    """
    name = "_cuda_getCurrentRawStream" if device.type == "cuda" else "_accelerator_getStream"
    bare = getattr(torch._C, name, None)
    if bare is None:
        return functools.partial(torch.accelerator.current_stream, device)
    return functools.partial(bare, device.index)
