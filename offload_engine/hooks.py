"""Entry points: pre-hooks on components that lead the residency through a call.

A component is entered through its root (``module(...)``), through methods such as ``decode`` and
``generate``, through ``_hf_hook.pre_forward`` (what diffusers calls when accelerate is there), and
through any submodule while the weights are on the host. The guide says what to release and to
fetch, the residency does it, the meter measures.

[Note: doors] While a unit is on the host, its roots carry a forward pre-hook, and so does every
submodule, which may be called before its component: the door. Entered through a door, a unit keeps
its doors on, since what comes next may enter by another one and bring arguments that were left on
the host. Entered through its root, it takes all hooks off.

[Note: fast path] What is left on a resident component is the gate before its ``forward``: one
attribute test, and a look at the current stream. A hook that stays on costs torch 1 us per call
before its first line runs.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import slots
from .guide import Chain, Guide
from .measure import Mark, Meter
from .residency import CLOSED, Residency, State, Unit
from .sequence import Cursor, Sequence

# Methods through which pipelines enter a component without calling it (facts: AST scan of
# diffusers 0.42 and transformers 5): they may read weights or `self.device` first.
_ENTRY_METHODS = re.compile(
    r"_?encode|_?decode|generate|generate_captions|tokenize|quantize|post_process_latents"
    r"|get_\w+_features|get_image_tokens|get_codebook_entry"
)

_HOST = torch.device("cpu")
_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_UNKNOWN = 1 << 62  # work of a unit whose size has changed: more than whatever was measured


class Walker:
    """Leads one residency through the call that is under way."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.opened: list[Unit] = []  # units that may run unasked, entered through their root
        self.at_door: Unit | None = None  # the unit that ran last, entered through a submodule
        self.inside: list[tuple[nn.Module, bool]] = []  # submodules entered; from the host?
        self.running: Unit | None = None  # the unit that ran last, while every forward matters
        self.stream: Any = None  # the key of the stream that `at_door` or `running` ran on
        self.stream_key: Callable[[], Any] = lambda: None
        if residency.link is not None:
            self.stream_key = residency.link.current_key
        self.vram_nbytes: int | None = None  # the tightest budget, if there is one
        self.by_hand: Unit | None = None  # entered by its pre-hook, with arguments on the host
        self.announced: Unit | None = None  # entered by its pre-hook, its gate comes next
        self.guide: Guide = Chain(Cursor(Sequence(())))
        self.meter = Meter(residency.link)
        self.sizes: dict[str, int] = {}  # bytes of units when the call began
        self.on_wrap: Callable[[], None] | None = None  # what to do when a round begins anew

    @torch.compiler.disable
    def enter(self, unit: Unit, work: int, *, way: str = "forward", by_door: bool = False) -> None:
        """Has ``unit`` resident on the current stream, and what the guide allows beside it.

        ``work``: elements in the tensors it is given; ``way``: the method it is entered by.
        """
        residency, guide = self.residency, self.guide
        with residency.lock:
            self.announced = None
            if self.at_door is not None or not guide.is_still:
                self.leave()
            if self.on_wrap is not None and guide.wraps(unit.name):
                self.on_wrap()
                guide = self.guide
            self._switch(unit, work, way, guide)
            key = self.stream_key()
            if by_door:
                self.at_door, self.stream = unit, key
                return
            if guide.watches_forwards or residency.has_more:
                _disarm(unit)
                self.running, self.stream = unit, key
            else:
                self._open(unit, key)
                if guide.is_still:
                    for block in residency.landed_blocks(unit):
                        self._open(block, key)

    def _open(self, unit: Unit, key: Any) -> None:
        _disarm(unit)
        self.opened.append(unit)
        unit.open_on = key

    def runs_again(self, unit: Unit, work: int, way: str) -> bool:
        """Whether ``unit`` is the one that ran last: then it is counted, and copies go on."""
        if self.running is not unit or unit.state is not State.RESIDENT or unit.stale:
            return False
        mark = self.meter.marks[-1] if self.meter.marks else None
        if mark is None or work > mark.work or self.stream_key() != self.stream:
            return False
        if (unit.name, way) not in self.meter.ways:
            return False
        if self.guide.watches_forwards:
            mark.forwards += 1
        with self.residency.lock:
            self.residency.queue_part()
            if not (self.guide.watches_forwards or self.residency.has_more):
                self.opened.append(unit)
                unit.open_on = self.stream
        return True

    def _switch(self, unit: Unit, work: int, way: str, guide: Guide) -> None:
        residency, meter = self.residency, self.meter
        residency.settle()
        mark = meter.marks[-1] if meter.marks else None
        again = mark is not None and mark.unit == unit.name
        reached = None if again else meter.boundary()
        here = {other.name: other.nbytes for other in residency.resident}
        needs = [other.name for other in unit.needs]
        whole = (unit, *unit.parts)
        is_other = any(each.nbytes != self.sizes.get(each.name, each.nbytes) for each in whole)
        is_new_way = guide.tells_ways_apart and (unit.name, way) not in meter.ways
        meter.ways.add((unit.name, way))
        asked = _UNKNOWN if is_other or is_new_way else work
        late = residency.enter(unit, guide.enter(unit.name, asked, here, needs))
        if mark is not None and again:
            mark.forwards += 1 if guide.watches_forwards else 0
            mark.work = max(mark.work, work)
        else:
            forwards = 1 if guide.watches_forwards else 0
            meter.begin(Mark(unit.name, work, forwards), reached, late)

    def run(self, unit: Unit, way: str, bare: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs ``bare`` of a unit that was just entered, watched if the guide wants to know."""
        if not self.guide.samples:
            return bare(*args, **kwargs)
        can_be_watched = functools.partial(_runs_as_it_is, unit)
        return self.meter.run(unit.name, way, can_be_watched, bare, args, kwargs)

    def is_tight_for(self, unit: Unit, change: Any, module: nn.Module) -> bool:
        """Whether a budget may not hold ``unit`` beside what ``change`` makes of its weights, to
        judge by those of ``module``."""
        if self.vram_nbytes is None or unit.state is not State.RESIDENT:
            return False
        growth = _growth(change, module)
        allocated = slots.allocated_nbytes(self.residency.device)
        return growth > 0 and allocated + growth * unit.nbytes > self.vram_nbytes

    def leave(self) -> None:
        """No unit is known to be ready: the next entry looks at everything again."""
        for unit in self.opened:
            unit.open_on = CLOSED
        self.opened.clear()
        self.at_door = self.running = None
        self.inside.clear()

    def release_all(self) -> None:
        with self.residency.lock:
            self.leave()
            self.residency.release_all()


def _disarm(unit: Unit) -> None:
    for each in (unit, *unit.parts):
        if each.doors is not None:
            each.doors.disarm()


def _runs_as_it_is(unit: Unit) -> bool:
    """Whether all of it runs below a mode as it does without: what is compiled would be compiled
    anew, and below a mode for functions, which is the one in inference mode, torch's own attention
    leaves its fast path."""
    modules = [m for root in unit.modules for m in root.modules()]
    if torch.is_inference_mode_enabled() and any(isinstance(m, _FAST_PATHS) for m in modules):
        return False
    return not any(map(_is_compiled_itself, modules))


def _is_compiled_itself(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or hasattr(module, "_orig_mod")


class Entry:
    """The pre-hook of a component's root; what its other entries ask."""

    __slots__ = ("device", "is_live", "unit", "walker")

    def __init__(self, walker: Walker, unit: Unit) -> None:
        self.walker = walker
        self.unit = unit
        self.device = walker.residency.device
        self.is_live = True

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.is_open():
            return None
        walker, unit = self.walker, self.unit
        by_hand = bool(unit.needs) and _all_on_host([args, kwargs])
        walker.announced = None  # by an entry whose gate never came: compiled away, or an error
        entered = self.enter(args, kwargs)
        if by_hand:
            unit.open_on = CLOSED  # so that its gate sees to the result
        walker.by_hand = unit if by_hand else None
        walker.announced = None if self.is_open() else unit
        return entered

    def is_open(self) -> bool:
        """Whether the unit is the one that ran last, on this very stream."""
        return bool(self.walker.stream_key() == self.unit.open_on)

    def enter(self, args: Any, kwargs: Any, way: str = "forward") -> tuple[Any, Any]:
        """Has the unit resident; gives the arguments back, on its device if it had to enter.

        Once closed it lets everything pass: somebody may have wrapped what it stood before.
        """
        if not self.is_live:
            return args, kwargs
        walker, unit = self.walker, self.unit
        if walker.announced is unit and unit.state is State.RESIDENT and not unit.stale:
            walker.announced = None
        else:
            work = _elements([args, kwargs])
            if walker.runs_again(unit, work, way):
                return args, kwargs  # as on the fast path
            walker.enter(unit, work, way=way)
        return to_device(args, self.device), to_device(kwargs, self.device)

    def close(self) -> None:
        self.is_live = False

    def __deepcopy__(self, memo: Any) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        return _get_nothing, ()


class Door(Entry):
    """The pre-hook of a submodule while its unit was not entered through the root."""

    __slots__ = ()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        walker = self.walker
        if walker.at_door is not self.unit or walker.stream_key() != walker.stream:
            walker.enter(self.unit, 0, by_door=True)
        walker.inside.append((module, _all_on_host([args, kwargs])))
        return to_device(args, self.device), to_device(kwargs, self.device)


class DoorExit(Entry):
    """The hook behind a submodule: who came with tensors on the host gets the result there.

    Some pipelines ask ``text_encoder.device``, which is the host, prepare everything there and
    call submodules (Ideogram4).
    """

    __slots__ = ()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        inside = self.walker.inside
        while inside:
            entered, from_host = inside.pop()
            if entered is module:
                return to_device(output, _HOST) if from_host else None
        return None


def nothing(module: nn.Module, args: Any, kwargs: Any) -> None:
    """What the copy of a hooked module has in the place of its hooks."""


def _get_nothing() -> Any:
    return nothing


class MethodEntry:
    """Stands before a method of one module; a copy of the module has the bare method."""

    def __init__(self, entry: Entry, module: nn.Module, name: str) -> None:
        self._entry = entry
        self._module = module
        self._name = name
        self._bare = getattr(module, name)
        functools.update_wrapper(self, self._bare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._entry.is_open():
            return self._bare(*args, **kwargs)
        args, kwargs = self._entry.enter(args, kwargs, self._name)
        return self._entry.walker.run(self._entry.unit, self._name, self._bare, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        return self._bare if copied is None else getattr(type(copied), self._name).__get__(copied)

    def __reduce__(self) -> Any:
        return getattr, (self._module, self._name)


class Gate(MethodEntry):
    """Stands before ``forward``; see [Note: fast path]."""

    def __init__(self, entry: Entry, module: nn.Module) -> None:
        super().__init__(entry, module, "forward")
        self._walker = entry.walker
        self._unit = entry.unit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        walker = self._walker
        if torch.compiler.is_compiling() or walker.stream_key() == self._unit.open_on:
            return self._bare(*args, **kwargs)
        # Somebody runs the blocks of a component one by one, on the host as it seems; see DoorExit.
        by_hand = walker.by_hand is self._unit
        by_hand = by_hand or (bool(self._unit.needs) and _all_on_host([args, kwargs]))
        walker.by_hand = None
        args, kwargs = self._entry.enter(args, kwargs)
        output = walker.run(self._unit, "forward", self._bare, args, kwargs)
        return to_device(output, _HOST) if by_hand else output


class ApplyWatch(MethodEntry):
    """Stands before ``_apply``, through which ``.to``, ``.half`` and ``.cpu`` replace weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        walker, unit = self._entry.walker, self._entry.unit
        if walker.is_tight_for(unit, args[0] if args else kwargs.get("fn"), self._module):
            walker.leave()
            walker.residency.release(unit)
        try:
            return self._bare(*args, **kwargs)
        finally:
            unit.after_apply(walker.residency.link)
            if walker.vram_nbytes is not None and unit.has_left_its_slot:
                unit.stale = True  # what it takes now is in no account
            if unit.stale:
                walker.leave()


def _growth(change: Any, module: nn.Module) -> float:
    """How large what ``change`` makes of a weight on the device is there, relative to the weight; 0
    where it copies nothing."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        return 0.0
    before = torch.empty(0, dtype=first.dtype, device=first.device)
    try:
        after = change(before)
        is_copy = after is not before and after.device == before.device
        return after.dtype.itemsize / before.dtype.itemsize if is_copy else 0.0
    except Exception:
        return 2.0


class _Detachable(Protocol):
    def detach(self) -> None: ...


Owner = _Detachable | None


class HfHook:
    """What diffusers looks for as ``_hf_hook`` (accelerate's ModelHook, by its shape)."""

    no_grad = False
    stands_for_accelerates = False  # set by patch_diffusers

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Under ``patch_diffusers`` this is a CpuOffload for ``isinstance``: whoever finds one
        takes it off and calls ``enable_model_cpu_offload``, which then is ours."""
        accelerates = sys.modules.get("accelerate.hooks")
        if HfHook.stands_for_accelerates and accelerates is not None:
            return accelerates.CpuOffload
        return HfHook

    def __init__(self, device: torch.device | None, entry: Entry | None, owner: Owner) -> None:
        self.execution_device = device
        self.owner = owner  # who is asked to detach; None: nobody
        self._entry = entry

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._entry is None or self._entry.is_open():
            return args, kwargs
        return self._entry.enter(args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Takes the engine off this module; accelerate, which calls it, deletes the rest itself."""
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.detach()
        self.execution_device = self._entry = None
        module.__dict__.setdefault("_hf_hook", self)
        return module

    def __deepcopy__(self, memo: Any) -> HfHook:
        return HfHook(None, None, None)

    def __reduce__(self) -> Any:
        return HfHook, (None, None, None)


class UnitDoors:
    """See [Note: doors]."""

    def __init__(self, entry: Entry, hook_id: int) -> None:
        """``entry``: that of the unit, or of the unit that it is a part of."""
        self._entry = entry
        self._door = Door(entry.walker, entry.unit)
        self._exit = DoorExit(entry.walker, entry.unit)
        self._hook_id = hook_id
        self._armed: list[nn.Module] = []

    def arm(self, modules: Iterable[nn.Module]) -> None:
        if self._armed:
            self.disarm()
        roots = self._entry.unit.modules
        # Whatever runs comes to a module with weights of its own.
        self._armed = [m for m in modules if m._parameters or m._buffers or m in roots]
        for module in self._armed:
            is_root = module in roots
            # The flag before the hook, here and in disarm: an interrupt may fall in between.
            module._forward_pre_hooks_with_kwargs[self._hook_id] = True
            module._forward_pre_hooks[self._hook_id] = self._entry if is_root else self._door
            if is_root:  # before the hooks of others, which may look at the weights
                module._forward_pre_hooks.move_to_end(self._hook_id, last=False)  # type: ignore
            else:
                module._forward_hooks[self._hook_id] = self._exit

    def disarm(self) -> None:
        """Takes the hooks off; but where every forward matters, not those of compiled roots, whose
        gates are compiled away."""
        entry, walker = self._entry, self._entry.walker
        stay: list[nn.Module] = []
        watches = walker.guide.watches_forwards or walker.residency.has_more
        if entry.is_live and (watches or walker.vram_nbytes is not None):
            outer = [root for unit in entry.unit.needs for root in unit.modules]
            within = any(map(_is_compiled_itself, outer))
            roots = [module for module in self._armed if module in entry.unit.modules]
            stay = [module for module in roots if within or _is_compiled_itself(module)]
        for module in self._armed:
            if module in stay:
                continue
            module._forward_pre_hooks.pop(self._hook_id, None)
            module._forward_pre_hooks_with_kwargs.pop(self._hook_id, None)
            module._forward_hooks.pop(self._hook_id, None)
        self._armed = stay


Undo = list[Callable[[], None]]  # run from the end; safe to run when nothing was done yet


def install(unit: Unit, walker: Walker, owner: Owner, undo: Undo) -> None:
    """Puts every entry on the modules of ``unit``, which has its parts entered with it.

    ``owner``: what the modules' ``_hf_hook`` belongs to and asks to detach. Each step is entered
    in ``undo`` before it is done, so that an interrupt at any point can be undone.
    """
    entry = Entry(walker, unit)
    undo.append(entry.close)
    for module in unit.modules:
        undo.append(functools.partial(_remove_pre_hooks, module, entry))
        handle = module.register_forward_pre_hook(entry, prepend=True, with_kwargs=True)
        if not unit.needs:  # blocks are not what diffusers looks at
            _shadow(module, "_hf_hook", HfHook(entry.device, entry, owner), undo)
        for name in _entry_methods(module):
            _shadow(module, name, MethodEntry(entry, module, name), undo)
        _shadow(module, "forward", Gate(entry, module), undo)
        _shadow(module, "_apply", ApplyWatch(entry, module, "_apply"), undo)
        _remove_pre_hooks(module, entry)  # from here on it comes and goes with the doors
    for part in unit.parts:
        apart = Entry(walker, part)
        for module in part.modules:
            _shadow(module, "_apply", ApplyWatch(apart, module, "_apply"), undo)
    on_cpu = walker.residency.link is None  # nothing moves there: the roots alone tell
    for each in (unit, *unit.parts):
        each.doors = doors = UnitDoors(entry, handle.id)
        undo.append(doors.disarm)
        if each.state is State.HOST and not (on_cpu and each is not unit):
            doors.arm(each.modules if on_cpu else each.scan().modules)


def _shadow(module: nn.Module, name: str, stand_in: Any, undo: Undo) -> None:
    """Puts ``stand_in`` before an attribute of this instance. The undo puts back what was there,
    unless somebody has put something else there since."""
    attributes = module.__dict__
    before = attributes.get(name, stand_in)

    def put_back() -> None:
        if attributes.get(name) is stand_in:
            del attributes[name]
            if before is not stand_in:
                attributes[name] = before

    undo.append(put_back)
    attributes[name] = stand_in


def _remove_pre_hooks(module: nn.Module, entry: Entry) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is entry]:
        module._forward_pre_hooks.pop(key, None)
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _entry_methods(module: nn.Module) -> list[str]:
    names = [name for name in dir(type(module)) if _ENTRY_METHODS.fullmatch(name)]
    return [name for name in names if callable(getattr(type(module), name, None))]


def run_back(undo: Undo) -> None:
    """Undoes, from the last step to the first."""
    while undo:
        undo.pop()()


def _all_on_host(value: Any) -> bool:
    """Whether ``value`` holds tensors, and all of them on the host."""
    places = {tensor.device.type for tensor in _tensors(value)}
    return places == {"cpu"}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _elements(value: Any) -> int:
    """Elements in all tensors of ``value``."""
    return sum(tensor.numel() for tensor in _tensors(value))


def nbytes_on(value: Any, device: torch.device) -> int:
    """Bytes of device memory that the tensors in ``value`` keep alive."""
    storages = (t.untyped_storage() for t in _tensors(value) if t.device == device)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``; the same object where nothing moved."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, (list, tuple)):
        moved = [to_device(item, device) for item in value]
        if all(new is old for new, old in zip(moved, value, strict=True)):
            return value
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, Mapping):
        changed = {key: to_device(item, device) for key, item in value.items()}
        if all(changed[key] is value[key] for key in changed):
            return value
        return type(value)(changed)  # type: ignore[call-arg]
    return value
