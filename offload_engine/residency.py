"""The state of each unit, what changed in it, and the log of what moved.

A unit is what moves as one: a component, several that share weights, or a part of a block.
`Residency` holds the units of the pipelines that share modules, or a budget, on one device. It is
told what to release and what to fetch (guide.py): it decides nothing.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
import operator
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import slots
from . import watch as watch_room
from .guide import Move
from .host_store import Block, HostStore, trim
from .segments import Scan, TypedFlat, View, Wrapper, inner_tensors, layout, rebuild, scan, stack
from .transfers import Fetch, Link, Timing
from .watch import is_touched, same_content, unwatch, watch


class State(enum.Enum):
    """Where the weights of a unit are, and who owns their memory."""

    HOST = "host"  # in the masters, owned by the host store; no device memory
    LOADING = "loading"  # copies on their way into the slot; the tensors still are the masters
    RESIDENT = "resident"  # in the slot, owned by the unit; the masters are kept
    UNSETTLED = "unsettled"  # half way: tensors may point to either side, until `to_host`


class Event(NamedTuple):
    """One line of the log. ``at_seconds`` is the host's clock (time.perf_counter)."""

    kind: str  # "use", "fetch", "release", "write_back", "adopt"
    unit: str
    nbytes: int
    at_seconds: float
    allocated_nbytes: int  # on the device, right after
    fetch: Timing | None = None


class Doors(Protocol):
    """The entry checks that are armed while a unit is not on the device (hooks.py)."""

    def arm(self, modules: Iterable[nn.Module]) -> None: ...

    def disarm(self) -> None: ...


_LOG_LENGTH = 10_000  # events; a call has some tens
CLOSED = object()
OnCopy = Callable[[str, int], None]  # kind, nbytes


class _Weight:
    """One tensor of a unit: its master, and its place in the slot while resident."""

    __slots__ = ("block", "device_pointer", "host", "host_pointer", "tensor", "version", "view")

    def __init__(self, tensor: Tensor, block: Block, view: View) -> None:
        self.tensor = tensor  # the object the module holds
        self.block = block
        self.view = view
        self.host = block.carve(view)  # the master
        self.host_pointer = self.host.data_ptr()
        self.device_pointer = -1  # not on the device
        self.version = -1

    def fits(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` can live here: same shape, layout and type."""
        view = self.view
        return (
            tensor.dtype is view.dtype
            and tensor.size() == view.size
            and tensor.stride() == view.stride
        )


_values: Any = dict.values
_version: Any = operator.attrgetter("_version")
_dtype: Any = operator.attrgetter("dtype")
_device_pointer: Any = operator.attrgetter("device_pointer")
_version_at_fetch: Any = operator.attrgetter("version")
_turn: Any = operator.attrgetter("turn")


class _Snapshot:
    """What the last full look found, in lists that C code compares.

    [Note: noticing] The full look at a unit (`scan`, and Python for each tensor) takes 5 ms for the
    1,680 weights of SDXL's UNet, 2.6 % of a fetch at 24 GB/s; this takes one. It answers "is all
    as it was?"; any other answer than yes is left to the full look.
    """

    def __init__(self, found: Scan, weights: Iterable[_Weight]) -> None:
        self._homes: list[dict[str, Any]] = [
            home for m in found.modules for home in (m._parameters, m._buffers, m._modules)
        ]
        self._members = self._current_members()
        self.weights = list(weights)
        self._tensors = [weight.tensor for weight in self.weights]
        self._sizes = [weight.view.size for weight in self.weights]
        self._strides = [weight.view.stride for weight in self.weights]
        self._dtypes = [weight.view.dtype for weight in self.weights]
        self._host_pointers = [weight.host_pointer for weight in self.weights]
        self.touches = -1  # of all watched tensors, when these were fetched
        inference = any(weight.view.inference for weight in self.weights)
        self.counts_versions = not inference
        self._is_exact = not (inference or found.wrappers or found.subclasses)

    def _current_members(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(_values, self._homes)))

    def all_on_host(self) -> bool:
        """Whether the modules hold these tensors and no others, each at its master."""
        return (
            self._is_exact
            and list(map(Tensor.data_ptr, self._tensors)) == self._host_pointers
            and list(map(Tensor.size, self._tensors)) == self._sizes
            and list(map(Tensor.stride, self._tensors)) == self._strides
            and list(map(_dtype, self._tensors)) == self._dtypes
            and self._same_members()
        )

    def all_on_host_unchanged(self) -> bool:
        """`all_on_host`, and never written nor taken by somebody who could have: all are watched
        since their copies were queued."""
        return self._untouched() and self.all_on_host()

    def all_on_device(self) -> bool:
        """Whether the modules hold these tensors and no others, each in the slot."""
        return (
            self._is_exact
            and list(map(Tensor.data_ptr, self._tensors))
            == list(map(_device_pointer, self.weights))
            and self._same_members()
        )

    def all_on_device_unchanged(self) -> bool:
        """`all_on_device`, and never written, nor taken by somebody who could have, nor given
        another shape: all are watched."""
        return self._untouched() and self.all_on_device()

    def _untouched(self) -> bool:
        return (
            self._is_exact
            and self.touches == watch_room.touches
            and list(map(_version, self._tensors)) == list(map(_version_at_fetch, self.weights))
        )

    def _same_members(self) -> bool:
        now = self._current_members()
        return len(now) == len(self._members) and all(map(operator.is_, now, self._members))


class _Twin(NamedTuple):
    """A wrapper weight and the one around device tensors that stands in for it."""

    wrapper: Wrapper
    on_device: Tensor
    inner: list[tuple[_Weight, Tensor]]


class Unit:
    """Modules whose weights move together; the sole owner of their masters and their slot."""

    def __init__(
        self,
        name: str,
        modules: Iterable[nn.Module],
        store: HostStore,
        *,
        without: Iterable[nn.Module] = (),
        rest: tuple[Unit, ...] = (),
        parts: tuple[Unit, ...] = (),
    ) -> None:
        """``without``: modules below ``modules`` that belong to other units; ``rest``: what must be
        resident whenever this one runs; ``parts``: the same, and of modules below ``modules``,
        which run only with this one."""
        self.name = name
        self.modules: tuple[nn.Module, ...] = tuple(modules)
        self.without = tuple(without)
        self.parts = parts
        self.needs = rest + parts
        self.state = State.HOST
        self.turn = math.inf  # the number of the first use in a call that needs it
        self.stale = False  # moved by the user while resident: look again before the next use
        self.open_on: Any = CLOSED  # the key of the stream on which it may run unasked (hooks.py)
        self.doors: Doors | None = None
        self.fetch: Fetch | None = None
        self._store = store
        self._weights: dict[int, _Weight] = {}  # id(tensor) -> weight, which holds the tensor
        self._blocks: list[Block] = []
        self._nbytes: int | None = None  # of them
        self._found = Scan()
        self._snapshot = _Snapshot(self._found, ())
        self._twins: list[_Twin] = []
        self._last: Fetch | None = None  # its copies may still read the masters

    @property
    def nbytes(self) -> int:
        """Bytes of the slot: what one fetch copies."""
        if not self._blocks:  # no masters: on device="cpu" nothing moves
            return sum(tensor.nbytes for tensor in self.scan().tensors)
        if self._nbytes is None:  # asked for at every switch
            self._nbytes = stack(block.nbytes for block in self._blocks)[0]
        return self._nbytes

    def scan(self) -> Scan:
        """What is in its modules now."""
        return scan(self.modules, self.without)

    @property
    def is_pinned(self) -> bool:
        return bool(self._blocks) and all(block.pinned for block in self._blocks)

    # ---- to the host

    def to_host(self, link: Link | None, on_copy: OnCopy) -> None:
        """Points every weight to its master, which then holds its latest value; the slot goes.

        [Note: settling] This works from any state, half done ones included, and from whatever the
        user did meanwhile: each tensor is looked at where it is now. A master is written only
        where its weight changed. New tensors get masters, tensors that left lose theirs.
        """
        self.open_on = CLOSED
        if self.fetch is not None:
            assert link is not None
            link.join(self.fetch)
        before, self.state = self.state, State.UNSETTLED
        self._settle_all(before, link, on_copy)
        if self.fetch is not None:
            self.fetch.flat = None
            self._last, self.fetch = self.fetch, None
        self.state, self.stale = State.HOST, False
        if self.doors is not None:
            self.doors.arm(self._found.modules)

    def _settle_all(self, before: State, link: Link | None, on_copy: OnCopy) -> None:
        snapshot = self._snapshot
        if snapshot.weights and before is State.HOST and snapshot.all_on_host():
            return
        if before is State.LOADING and snapshot.all_on_host():
            for weight in snapshot.weights:
                unwatch(weight.tensor)
            return
        if before is State.RESIDENT and snapshot.all_on_device_unchanged():
            for weight in snapshot.weights:
                unwatch(weight.tensor)
                _point(weight.tensor, weight.host)
                weight.device_pointer = -1
            return

        def book(kind: str, nbytes: int) -> None:
            self.finish(link)  # a copy in flight must not see its source change
            on_copy(kind, nbytes)

        self._unwrap(book)
        self._found = self.scan()
        inner = [tensor for wrapper in self._found.wrappers for _, tensor in wrapper.inner]
        tensors = self._found.tensors + inner
        fresh = [tensor for tensor in tensors if not self._settle(tensor, book)]
        if len(tensors) - len(fresh) != len(self._weights):
            self._forget({id(t) for t in tensors} - {id(t) for t in fresh})
        if fresh:
            self._adopt(fresh, book)
        self._snapshot = _Snapshot(self._found, self._weights.values())

    def _settle(self, tensor: Tensor, book: OnCopy) -> bool:
        """Brings a known tensor home; False for one that has no master it fits into."""
        weight = self._weights.get(id(tensor))
        touched = unwatch(tensor)
        if weight is None or not weight.fits(tensor):
            return False
        pointer = tensor.data_ptr()
        if pointer != weight.host_pointer or tensor.device.type != "cpu":
            if pointer != weight.device_pointer or _changed(weight, tensor, touched):
                book(_kind(tensor), tensor.nbytes)
                _copy(weight.host, tensor)
            _point(tensor, weight.host)
        weight.device_pointer = -1
        return True

    def _forget(self, alive: set[int]) -> None:
        """Drops what left the modules. A tensor somebody else still holds keeps its value."""
        for key, weight in list(self._weights.items()):
            if key in alive:
                continue
            tensor = weight.tensor
            unwatch(tensor)
            if tensor.numel() and tensor.data_ptr() == weight.device_pointer:
                _point(tensor, _detached(tensor).cpu())
            del self._weights[key]
        self._nbytes = None
        used = {id(weight.block) for weight in self._weights.values()}
        for block in [block for block in self._blocks if id(block) not in used]:
            self._blocks.remove(block)
            block.close()

    def _adopt(self, fresh: list[Tensor], book: OnCopy) -> None:
        """Gives new tensors a block of their own and moves them in, one at a time."""
        nbytes, views = layout(fresh)
        block = self._store.allocate(nbytes)
        self._blocks.append(block)
        self._nbytes = None
        moved_nbytes = 0
        for tensor, view in zip(fresh, views, strict=True):
            weight = self._weights[id(tensor)] = _Weight(tensor, block, view)
            book(_kind(tensor), tensor.nbytes)
            _copy(weight.host, tensor)
            _point(tensor, weight.host)
            moved_nbytes += tensor.nbytes
            if moved_nbytes >= 2**27:
                moved_nbytes = 0
                trim()
        self._store.seal(block)
        trim()

    def _unwrap(self, book: OnCopy) -> None:
        """Puts wrapper weights back to those on the host, with what changed in their twins."""
        for twin in self._twins:
            for weight, on_device in twin.inner:
                if not weight.view.inference and on_device._version != weight.version:
                    book("write_back", on_device.nbytes)
                    _copy(weight.host, on_device)
            for home, name in twin.wrapper.homes:
                if home.get(name) is twin.on_device:
                    home[name] = twin.wrapper.outer
        self._twins.clear()

    # ---- to the device

    def start(self, link: Link, on_copy: OnCopy, make_room: Callable[[], None] | None) -> None:
        """Lends a slot, for `Link.queue` to copy into; the weights stay the masters until `land`.

        ``make_room``: as in `slots.lend`.
        """
        assert self.state is State.HOST, f"{self.name} is in state {self.state.value}"
        self._settle_all(State.HOST, link, on_copy)
        self.state = State.UNSETTLED
        nbytes, starts = stack(block.nbytes for block in self._blocks)
        flat = slots.lend(self.name, nbytes, link.device, make_room)
        self.fetch = Fetch(flat, link.current_stream())
        for weight in self._weights.values():
            if not weight.view.inference:
                weight.version = weight.tensor._version
            watch(weight.tensor)
        self._snapshot.touches = watch_room.touches
        link.prepare(self.fetch, zip(self._blocks, starts, strict=True))
        self.state = State.LOADING

    def is_as_started(self) -> bool:
        """Whether no weight was written or replaced since `start`."""
        assert self.state is State.LOADING
        if not self._snapshot.counts_versions:
            return True  # never started early
        return self._snapshot.all_on_host_unchanged() or self._looks_as_started()

    def _looks_as_started(self) -> bool:
        """The full look behind `is_as_started`."""
        found = self.scan()
        inner = [tensor for wrapper in found.wrappers for _, tensor in wrapper.inner]
        tensors = found.tensors + inner
        if {id(tensor) for tensor in tensors} != set(self._weights):
            return False
        return all(
            weight.tensor.data_ptr() == weight.host_pointer
            and weight.fits(weight.tensor)
            and weight.tensor._version == weight.version
            and not is_touched(weight.tensor)
            for weight in self._weights.values()
        )

    def land(self, link: Link) -> None:
        """Has the weights in the slot; the current stream waits for them, the host does not."""
        assert self.state is State.LOADING, f"{self.name} is in state {self.state.value}"
        assert self.fetch is not None and self.fetch.flat is not None
        self.state = State.UNSETTLED
        link.queue(self.fetch)
        link.wait(self.fetch)
        _, starts = stack(block.nbytes for block in self._blocks)
        start_of = {id(block): start for block, start in zip(self._blocks, starts, strict=True)}
        with torch.inference_mode(False), torch.no_grad():
            self._point_to(TypedFlat(self.fetch.flat), start_of)
        self.state = State.RESIDENT

    @property
    def can_start_early(self) -> bool:
        """Whether a change between `start` and `land` would be noticed."""
        return self._snapshot.counts_versions

    @property
    def is_settled(self) -> bool:
        """Whether a quick look shows that every weight still is its master."""
        return self._snapshot.all_on_host()

    @property
    def is_whole(self) -> bool:
        """Whether the modules hold the weights in the slot and no others."""
        if self.state is not State.RESIDENT or self.stale:
            return False
        return self._snapshot.all_on_device() or self._looks_whole()

    def _looks_whole(self) -> bool:
        """The full look behind `is_whole`."""
        found = self.scan()
        inner = {id(tensor) for twin in self._twins for _, tensor in twin.wrapper.inner}
        plain = [weight for key, weight in self._weights.items() if key not in inner]
        return (
            {id(weight.tensor) for weight in plain} == {id(tensor) for tensor in found.tensors}
            and {id(t.on_device) for t in self._twins} == {id(w.outer) for w in found.wrappers}
            and all(weight.tensor.data_ptr() == weight.device_pointer for weight in plain)
        )

    def _point_to(self, flat: TypedFlat, start_of: dict[int, int]) -> None:
        wrapped = self._wrap(flat, start_of) if self._found.wrappers else ()
        for key, weight in self._weights.items():
            if key in wrapped:
                continue
            tensor = weight.tensor
            on_device = weight.view.on(flat, start_of[id(weight.block)])
            weight.device_pointer = on_device.data_ptr()
            _point(tensor, on_device)
            if not weight.view.inference:
                weight.version = tensor._version
            watch(tensor)
        self._snapshot.touches = watch_room.touches

    def _wrap(self, flat: TypedFlat, start_of: dict[int, int]) -> set[int]:
        """Puts twins around device tensors in the place of wrapper weights; ids of the wrapped."""
        wrapped: set[int] = set()
        for wrapper in self._found.wrappers:
            weights = {path: self._weights[id(tensor)] for path, tensor in wrapper.inner}
            parts = {
                path: weight.view.on(flat, start_of[id(weight.block)])
                for path, weight in weights.items()
            }
            outer = rebuild(wrapper.outer, parts)
            inner = [(weights[path], tensor) for path, tensor in inner_tensors(outer)]
            for weight, on_device in inner:  # not those of `parts`: the class may wrap aliases
                weight.version = -1 if weight.view.inference else on_device._version
            wrapped.update(id(tensor) for _, tensor in wrapper.inner)
            twin = _Twin(wrapper, outer, inner)
            self._twins.append(twin)
            for home, name in wrapper.homes:
                home[name] = twin.on_device
        return wrapped

    def after_apply(self, link: Link | None) -> None:
        """The user moved or cast the modules (``.to``): what does that mean for the slot?"""
        if self.state is not State.RESIDENT or link is None:
            return
        tensors = self.scan().tensors
        self.stale = any(tensor.device != link.device for tensor in tensors)
        mine = {weight.device_pointer for weight in self._weights.values()}
        if self.fetch is not None and not any(t.data_ptr() in mine for t in tensors if t.numel()):
            link.join(self.fetch)
            self.fetch.flat = None

    @property
    def has_left_its_slot(self) -> bool:
        """Whether its weights were replaced on the device, and the slot was given back."""
        fetch = self.fetch
        return self.state is State.RESIDENT and fetch is not None and fetch.flat is None

    # ---- the end

    def finish(self, link: Link | None) -> None:
        """Blocks the host until no copy reads the masters; mostly none has for long."""
        for fetch in (self._last, self.fetch):
            if fetch is not None and link is not None:
                link.finish(fetch)
        self._last = None

    def close(self, link: Link | None) -> None:
        """Gives every weight ordinary memory and the masters back; the unit is done."""
        self.doors = None
        self.to_host(link, lambda kind, nbytes: None)
        self.finish(link)
        while self._blocks:
            block = self._blocks.pop()
            if not block.close():
                self._move_out(block)
        self._weights.clear()
        self._found = Scan()
        self._snapshot = _Snapshot(self._found, ())
        trim()

    def _move_out(self, block: Block) -> None:
        """Memory of their own for the weights in a block that cannot be unpinned in place."""
        spans: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            for weight in self._weights.values():
                if weight.block is block:
                    start = weight.view.span_start
                    if start not in spans:
                        span = block.flat[start : start + weight.view.span_nbytes]
                        spans[start] = span.clone()
                    _point(weight.tensor, weight.view.in_span(spans[start]))


def _kind(tensor: Tensor) -> str:
    """What copying ``tensor`` to a master is: it comes from the device, or from the host."""
    return "adopt" if tensor.device.type == "cpu" else "write_back"


def _changed(weight: _Weight, tensor: Tensor, touched: bool) -> bool:
    """Whether the device copy differs from its master; see watch.py."""
    if not weight.view.inference:  # whose version is not counted: only its content tells
        if tensor._version != weight.version:
            return True
        if not touched:
            return False
    try:
        return not same_content(weight.host, tensor)
    except torch.OutOfMemoryError:  # no room to look: copying it back is right in any case
        return True


_BASE: Any = torch._C.TensorBase  # type: ignore[attr-defined]


def _detached(tensor: Tensor) -> Tensor:
    return _BASE.detach(tensor)


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.inference_mode():  # also inference tensors can be written here
        target.copy_(_detached(source))


def _point(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data``, with its gradient brought to the same device."""
    grad = tensor.grad if tensor.is_leaf else None
    with torch._C.DisableTorchFunctionSubclass():
        _BASE.data.__set__(tensor, data)
    if grad is not None and grad.device != data.device:
        tensor.grad = None
        tensor.grad = grad.to(data.device)


def new_log() -> deque[Event]:
    """An empty log; it forgets the oldest events rather than grow for ever."""
    return deque(maxlen=_LOG_LENGTH)


class Residency:
    """The units of the pipelines that share modules or a budget on one device, and what happened
    to them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.link = Link(device) if device.type != "cpu" else None
        # By name. A unit lives as long as its modules, which its hooks are on.
        self.units: weakref.WeakValueDictionary[str, Unit] = weakref.WeakValueDictionary()
        self.log = new_log()
        self.lock = threading.RLock()
        self.busy = False  # a call is under way
        self._started: deque[weakref.ref[Fetch]] = deque()  # their copies may not be queued yet
        self._part_nbytes = math.inf
        _residencies.add(self)

    @property
    def resident(self) -> list[Unit]:
        """Units with weights on the device now, or on their way there or back; first what a call
        needs last."""
        found = [unit for unit in list(self.units.values()) if unit.state is not State.HOST]
        return sorted(found, key=_turn, reverse=True)

    def settle(self) -> None:
        """Releases what was interrupted half way, and units whose weights were moved."""
        for unit in list(self.units.values()):  # asked at every entry: in no order
            if unit.state is State.UNSETTLED or unit.stale:
                self.release(unit)

    def settle_all(self, units: Iterable[Unit]) -> None:
        """Takes in what became of ``units`` since the last call: weights that moved or changed
        their size. Those that are not whole on the device are released."""
        for unit in units if self.link is not None else ():
            if unit.state is State.HOST and not unit.is_settled:
                unit.to_host(self.link, self._copied(unit))
            elif unit.state is State.UNSETTLED or (
                unit.state is State.RESIDENT and not unit.is_whole
            ):
                self.release(unit)

    def enter(self, unit: Unit, move: Move) -> bool:
        """Carries out ``move``, then has ``unit`` resident on the current stream.

        True if that stream waits for the weights here. Whatever is raised, every unit is left in a
        state that the next call can go on from.
        """
        for name in move.release:
            self.release(self.units[name])
        needed = (*unit.needs, unit)
        for name in move.fetch:
            self._start(self.units[name], needed)
        late = False
        for each in needed:
            late = self._make_ready(each, needed) or late
        self._part_nbytes = move.copy_nbytes
        self.queue_part()
        self.note("use", unit, 0)
        return late

    def prefetch(self, names: Iterable[str], nbytes: float) -> None:
        """Fetches what nobody waits for yet, as far as there is memory; queues ``nbytes`` now."""
        for name in names:
            self._start(self.units[name], ())
        self._queue(nbytes)

    def queue_part(self) -> None:
        """Queues what the move of this use has for each of its forwards."""
        self._queue(self._part_nbytes)

    @property
    def has_more(self) -> bool:
        """Whether copies are left to queue."""
        return bool(self._started)

    def _queue(self, nbytes: float) -> None:
        """Queues copies of ``nbytes``, of the fetches that began first."""
        while self._started and self.link is not None:
            fetch = self._started[0]()
            if fetch is not None and fetch.flat is not None and fetch.to_queue:
                nbytes = self.link.queue(fetch, nbytes)
                if fetch.to_queue:
                    return
            self._started.popleft()

    def landed_blocks(self, rest: Unit) -> list[Unit]:
        """The units that cannot run without ``rest`` and are there, ready on this stream."""
        blocks = [unit for unit in self.resident if rest in unit.needs]
        return [unit for unit in blocks if all(map(self._has_landed, (*unit.parts, unit)))]

    def _has_landed(self, unit: Unit) -> bool:
        """Whether ``unit`` is there; then the current stream waits for it, which takes no time."""
        fetch = unit.fetch
        if fetch is None or fetch.ready is None:
            return False
        if unit.state is State.LOADING and fetch.ready.query():
            self._make_ready(unit, (unit,))
        if unit.state is not State.RESIDENT or unit.stale:
            return False
        self._wait(unit)
        return True

    def _wait(self, unit: Unit) -> bool:
        """True if the current stream had not waited for the weights before."""
        link, fetch = self.link, unit.fetch
        if link is None or fetch is None or link.current_stream() in fetch.users:
            return False
        link.wait(fetch)
        return True

    def _start(self, unit: Unit, needed: Collection[Unit]) -> None:
        """Starts to fetch ``unit``; if it is not ``needed`` now, then only as far as possible."""
        is_needed = unit in needed
        if unit.state is not State.HOST or not (is_needed or unit.can_start_early):
            return
        link = self.link
        if link is None:
            unit.state = State.RESIDENT
            return
        make_room = functools.partial(self._make_room, needed) if is_needed else None
        try:
            unit.start(link, self._copied(unit), make_room)
        except BaseException as error:
            unit.to_host(link, self._copied(unit))
            if is_needed or not isinstance(error, torch.OutOfMemoryError):
                raise
            return
        assert unit.fetch is not None
        self._started.append(weakref.ref(unit.fetch))
        self.note("fetch", unit, unit.nbytes, unit.fetch.timing)

    def _make_ready(self, unit: Unit, needed: Collection[Unit]) -> bool:
        """Has ``unit`` resident on the current stream; True if that has to wait for it."""
        if unit.state is State.RESIDENT:
            return self._wait(unit)
        if unit.state is State.LOADING and not unit.is_as_started():
            self.release(unit)
        self._start(unit, needed)
        if self.link is None:
            return False
        try:
            unit.land(self.link)
        except BaseException:
            unit.to_host(self.link, self._copied(unit))
            raise
        return True

    def _make_room(self, needed: Collection[Unit]) -> None:
        for other in self.resident:
            if other not in needed:
                self.release(other)
        self.release_idle_others()

    def release_idle_others(self) -> None:
        """Releases what other pipelines keep on the device between their calls."""
        for idle in [r for r in _residencies if r is not self and r.device == self.device]:
            idle.release_if_idle()

    def release_if_idle(self) -> None:
        """Releases every unit, unless a call is under way: what stayed after one is optional."""
        if not self.busy and self.lock.acquire(blocking=False):
            try:
                self.release_all()
            finally:
                self.lock.release()

    def release(self, unit: Unit) -> None:
        """Gives the slot of ``unit`` back; its masters then hold its latest values."""
        if self.link is None:
            unit.state = State.HOST
            return
        unit.to_host(self.link, self._copied(unit))
        self.note("release", unit, 0)

    def release_all(self) -> None:
        """Releases every unit and waits until no copy reads a master: the host may write them."""
        for unit in self.resident:
            self.release(unit)
        for unit in list(self.units.values()):
            unit.finish(self.link)

    def adopt(self, unit: Unit, on_copy: OnCopy) -> None:
        """Takes ``unit`` in; its weights move to masters. `drop` also undoes half of it."""
        if self.units.get(unit.name) is not unit:
            self._take_in(unit)
        if self.link is not None:
            unit.to_host(self.link, on_copy)

    def drop(self, unit: Unit) -> None:
        """Gives ``unit`` back to ordinary memory."""
        if self.link is not None:
            unit.close(self.link)
        unit.state = State.HOST
        self.units.pop(unit.name, None)

    def absorb(self, other: Residency) -> None:
        """Takes over the units of another residency on the same device."""
        other.release_all()
        for unit in list(other.units.values()):
            self._take_in(unit)
        other.units = self.units

    def _take_in(self, unit: Unit) -> None:
        unit.name = self.free_name(unit.name)
        self.units[unit.name] = unit

    def free_name(self, name: str) -> str:
        """``name``, or with a number behind it if there is such a unit."""
        numbered = (f"{name}#{number}" for number in itertools.count(2))
        return next(n for n in itertools.chain([name], numbered) if n not in self.units)

    def note(self, kind: str, unit: Unit, nbytes: int, fetch: Timing | None = None) -> None:
        now = slots.allocated_nbytes(self.device)
        self.log.append(Event(kind, unit.name, nbytes, time.perf_counter(), now, fetch))

    def _copied(self, unit: Unit) -> OnCopy:
        return lambda kind, nbytes: self.note(kind, unit, nbytes)


_residencies: weakref.WeakSet[Residency] = weakref.WeakSet()
