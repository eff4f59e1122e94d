"""`attach`: the engine of one pipeline, its lifetime and its configuration."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import slots
from .errors import ComponentError, DeviceError
from .hooks import HfHook, Undo, Walker, install, run_back
from .host_store import HostStore
from .pipeline import Pipeline, calls_on_stack, engine_of, is_bitsandbytes_8bit
from .report import Report, build_report
from .residency import Event, Residency, Unit, new_log
from .segments import sharing
from .sequence import Cursor, Sequence, learn
from .watch import watch_process

_log = logging.getLogger("offload_engine")


def attach(
    pipe: Any,
    seq: Any = None,
    *,
    device: torch.device | str | None = None,
    gpu_id: int | None = None,
    vram: int | str | None = None,
    pin: str | bool | int = "auto",
) -> Engine:
    """Offloads the components of ``pipe``: on the device while they run, in host memory otherwise.

    ``pipe``: a diffusers pipeline, any object with a ``components`` mapping, or a mapping of names
    to modules. ``seq``: the order in which components run, "text_encoder->unet->vae" or a list;
    "+" joins those that alternate in one loop; None: the pipeline's ``model_cpu_offload_seq``. It
    is a first guess: each call teaches the next. ``device``, ``gpu_id``: as in diffusers'
    ``enable_model_cpu_offload``; None: the accelerator torch finds. ``pin``: "auto", True, False,
    or the most bytes of host memory to pin. ``vram``: not available yet.

    Attaches everything or nothing; attaching again replaces. Raises OffloadError (a ValueError):
    SequenceError, DeviceError, ComponentError.
    """
    pipeline = Pipeline(pipe)
    pipeline.check_not_placed()
    sequence = pipeline.sequence(seq)
    target = resolve_device(device, gpu_id, getattr(pipe, "_offload_gpu_id", None))
    if vram is not None:
        raise NotImplementedError("vram= is not available yet; leave it out for chain mode.")
    store = HostStore(target, pin)
    pipeline.remove_foreign_hooks()
    pipeline.check_loaded(target)
    before = engine_of(pipe)
    if before is not None and not before.could_share(target, pin):
        before.detach()
    return Engine(pipeline, sequence, Residency(target), store, pin, before)


class Engine:
    """Offloads one pipeline; made by `attach`. Also a context manager that detaches at its end."""

    def __init__(
        self,
        pipeline: Pipeline,
        sequence: Sequence,
        residency: Residency,
        store: HostStore,
        pin: Any,
        before: Engine | None,
    ) -> None:
        self._pipeline = pipeline
        self._sequence = sequence
        self._store = store
        self._pin = pin
        self._walker = Walker(residency)
        self._mounts: dict[str, _Mount] = {}  # component name -> mount
        self._placed: dict[str, nn.Module] = {}  # excluded components, on the device for good
        # Of each call that is under way, the cursor that it interrupted.
        self._calls: list[tuple[Cursor, Callable[[], None] | None, deque[Event]]] = []
        self._log = residency.log  # of the last call
        self._solo = False  # a loop did not fit: one component at a time from now on
        self._attached = True
        self._last_report: Report | None = None  # once detached
        self._peaks = (0, 0)
        self._undo: Undo = []
        self.component_names: frozenset[str] = frozenset(pipeline.components)
        try:
            self._undo.append(weakref.finalize(self, _count_engine()))
            self._mount_all(progress=True)
            if before is not None:
                before.detach()
            pipeline.attach(self, residency.device, self._undo)
            self._idle()
        except BaseException:
            self.detach()
            raise

    # ---- what it is and believes

    @property
    def device(self) -> torch.device:
        """Where components run."""
        return self._residency.device

    @property
    def plan(self) -> None:
        """The plan in force; None in chain mode."""
        return None

    @property
    def sequence(self) -> Sequence:
        """The order in which components are believed to run."""
        return self._sequence

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the components with weights on the device now."""
        here = set(self._placed)
        on_device = self._residency.resident
        here |= {name for name, mount in self._mounts.items() if mount.unit in on_device}
        return tuple(name for name in self._pipeline.modules if name in here)

    @property
    def _residency(self) -> Residency:
        return self._walker.residency

    def __repr__(self) -> str:
        state = f"on {self.device}" if self._attached else "detached"
        return f"<offload_engine.Engine of {self._pipeline.name}, {state}, {self._sequence}>"

    # ---- what the user asks of it

    def report(self) -> Report:
        """What moved in the last call, or since it where components were run outside of one."""
        if self._last_report is not None:
            return self._last_report
        return build_report(
            list(self._log),
            {name: mount.unit for name, mount in self._mounts.items()},
            device=self.device,
            sequence=self._sequence,
            peak_before_nbytes=self._peaks[0],
            peak_nbytes=slots.peak_nbytes(self.device) if self._calls else self._peaks[1],
        )

    def release(self) -> None:
        """Gives all device memory of the components back now, torch's cached blocks included."""
        self._walker.release_all()
        self._idle()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def detach(self) -> None:
        """Undoes everything: the pipeline is as before, its weights in ordinary host memory."""
        if not self._attached:
            return
        self._last_report = self.report()
        with self._residency.lock:
            self._walker.leave()
            for name in list(self._mounts):
                self._unmount(name)
            while self._placed:
                module = next(reversed(self._placed.values()))
                if not is_bitsandbytes_8bit(module):  # it stays where it was found
                    module.to("cpu")
                _take_off_protocol(module)
                self._placed.popitem()
            run_back(self._undo)
            self._attached = False

    def detach_from_outside(self) -> None:
        """The hooks were removed in diffusers' or accelerate's way, mostly to be put on again."""
        self.detach()
        self._pipeline.remember(self.device)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    def __deepcopy__(self, memo: Any) -> None:
        return None  # the copy of a pipeline is not attached

    def __reduce__(self) -> Any:
        return _no_engine, ()

    # ---- what the attached pipeline tells it

    def begin_call(self) -> None:
        """The pipeline was called."""
        walker = self._walker
        del self._calls[calls_on_stack(self) - 1 :]
        if not self._calls:
            self.refresh()
            peak = slots.peak_nbytes(self.device)
            self._peaks = (peak, peak)
        self._calls.append((walker.cursor, walker.on_wrap, self._residency.log))
        if len(self._calls) == 1:
            self._log = self._residency.log = new_log()
        walker.cursor, walker.on_wrap = self._cursor(), None

    def end_call(self, error: BaseException | None) -> None:
        """The call returned, or raised ``error``: learn from it, and give the memory back."""
        walker = self._walker
        trace = walker.cursor.trace
        depth = calls_on_stack(self) - 1
        if len(self._calls) > depth:
            walker.cursor, walker.on_wrap, self._residency.log = self._calls[depth]
            del self._calls[depth:]
        if error is None:
            self._learn(trace)
        elif isinstance(error, torch.OutOfMemoryError):
            self._solo = True
        if not self._attached:
            return
        try:
            walker.release_all()
        except Exception:
            if error is None:
                raise
            _log.exception("Could not release every component; the next call will.")
        if not self._calls:
            self._peaks = (self._peaks[0], slots.peak_nbytes(self.device))
            if walker.on_wrap is not None:  # not within a call of another pipeline
                self._residency.log = self._log
                self._idle()

    def free(self) -> None:
        """``maybe_free_model_hooks``: everything off the device."""
        self._walker.release_all()
        if not self._calls:
            self._idle()
            self.refresh()

    def refresh(self) -> None:
        """Takes in components that were replaced or added, and lets go of those that left."""
        if not self._attached:
            return
        self.component_names = frozenset(self._pipeline.components)
        self._pipeline.check_not_placed()
        modules = self._pipeline.modules
        for name, mount in list(self._mounts.items()):
            if modules.get(name) not in mount.unit.modules:
                self._unmount(name)
        for name, module in list(self._placed.items()):
            if modules.get(name) is not module:
                _take_off_protocol(self._placed.pop(name))
            elif not is_bitsandbytes_8bit(module) and not _is_on(module, self.device):
                module.to(self.device)  # moved away meanwhile, as by pipe.to("cpu")
        if set(modules) - set(self._mounts) - set(self._placed):
            self._mount_all(progress=False)

    def note_move(self, target: Any) -> None:
        """``pipe.to(target)``: says so when it defeats the offload."""
        with contextlib.suppress(RuntimeError, TypeError):
            if target is None or isinstance(target, torch.dtype):
                return
            if torch.device(target).type != "cpu" and self.device.type != "cpu":
                _log.warning(
                    "The pipeline is offloaded and is now being moved to %s as a whole; this takes "
                    "the memory that offloading saves, until each component has run once. "
                    "Call engine.detach() first to place it yourself.",
                    target,
                )

    @contextlib.contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Weights on the host and no ``_hf_hook`` in sight: for loaders that change modules."""
        self._walker.release_all()
        modules = [module for mount in self._mounts.values() for module in mount.unit.modules]
        modules += self._placed.values()
        hidden = [(module, module.__dict__.pop("_hf_hook", None)) for module in modules]
        try:
            yield
        finally:
            for module, hook in hidden:
                if hook is not None:
                    module.__dict__["_hf_hook"] = hook

    # ---- inside

    def could_share(self, device: torch.device, pin: Any) -> bool:
        """Whether a new engine for the same pipeline can take over the masters of this one."""
        return self._attached and self.device == device and self._pin == pin

    def _cursor(self) -> Cursor:
        units = {name: mount.unit.name for name, mount in self._mounts.items()}
        stages = tuple(
            tuple(dict.fromkeys(units[name] for name in stage if name in units))
            for stage in self._sequence.stages
        )
        stages = tuple(stage for stage in stages if stage)
        return Cursor(Sequence(stages), self._nbytes(), solo=self._solo)

    def _nbytes(self) -> dict[str, int]:
        """Bytes of each unit of this pipeline."""
        return {mount.unit.name: mount.unit.nbytes for mount in self._mounts.values()}

    def _learn(self, trace: list[str]) -> None:
        names = {mount.unit.name: name for name, mount in reversed(self._mounts.items())}
        if trace:
            nbytes = {names[unit]: size for unit, size in self._nbytes().items()}
            self._sequence = learn([names[unit] for unit in trace if unit in names], nbytes)

    def _idle(self) -> None:
        """Outside of calls: components that the user runs by hand are followed just as well.

        Nothing is learned from them: who runs a part by hand has not shown how the whole runs.
        """
        if not self._calls and self._attached:
            self._walker.cursor, self._walker.on_wrap = self._cursor(), self._idle

    def _mount_all(self, progress: bool) -> None:
        """Mounts every component that is not; on failure those mounted here are taken down."""
        modules = self._pipeline.modules
        excluded = self._pipeline.excluded(self._sequence)
        new = {n: m for n, m in modules.items() if n not in self._mounts and n not in self._placed}
        stay = {n for n, m in new.items() if n in excluded or is_bitsandbytes_8bit(m)}
        on_device = any(not _is_on(module, torch.device("cpu")) for module in new.values())
        try:
            for name in stay:
                self._place(name, new[name])
            moving = {name: module for name, module in new.items() if name not in stay}
            with self._progress(moving, progress) as on_copy:
                for group, sharers in self._groups(moving):
                    self._mount(group, sharers, on_copy)
        except BaseException:
            for name in new.keys() & self._mounts.keys():
                self._unmount(name)
            raise
        if on_device and self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def _groups(
        self, new: dict[str, nn.Module]
    ) -> Iterator[tuple[dict[str, nn.Module], list[_Mount]]]:
        """Components that must move together, since they share weights; mounts they share with."""
        names = list(new)
        others = [(mount, module) for mount in _mounts for module in mount.unit.modules]
        for group in sharing([*new.values(), *(module for _, module in others)]):
            found = {names[i]: new[names[i]] for i in group if i < len(names)}
            if found:
                yield found, [others[i - len(names)][0] for i in group if i >= len(names)]

    @contextlib.contextmanager
    def _progress(
        self, new: dict[str, nn.Module], show: bool
    ) -> Iterator[Callable[[str, int], None]]:
        total = sum(t.nbytes for m in new.values() for t in (*m.parameters(), *m.buffers()))
        config = {"desc": "Moving weights to pinned memory", "leave": False}
        config.update(self._pipeline.progress_bar_config)
        config["disable"] = config.get("disable", False) or not show or self.device.type == "cpu"
        with tqdm(total=total, unit="B", unit_scale=True, **config) as bar:
            yield lambda kind, nbytes: bar.update(nbytes)

    def _mount(
        self,
        group: dict[str, nn.Module],
        sharers: list[_Mount],
        on_copy: Callable[[str, int], None],
    ) -> None:
        modules = tuple(dict.fromkeys(group.values()))
        held = next(iter(sharers), None)
        if held is None:
            held = _Mount(self._new_unit(next(iter(group)), modules), self._walker)
        elif held.walker.residency.device != self.device:
            raise ComponentError(
                f"{', '.join(group)} is already offloaded to {held.walker.residency.device} by "
                "another pipeline. Attach to that device, or detach the other pipeline first.",
                names=group,
            )
        else:
            self._join(held.walker)
        self._mounts.update(dict.fromkeys(group, held))
        held.users.append(self)
        held.open(modules, on_copy)

    def _new_unit(self, name: str, modules: tuple[nn.Module, ...]) -> Unit:
        taken = self._residency.units
        return Unit(next(n for n in _candidates(name) if n not in taken), modules, self._store)

    def _join(self, walker: Walker) -> None:
        """Shares the residency of another pipeline: one view of what is on the device."""
        if walker is self._walker:
            return
        walker.residency.absorb(self._walker.residency)
        for held in list(_mounts):
            if held.walker is self._walker:
                held.move_to(walker)
        self._walker = walker

    def _unmount(self, name: str) -> None:
        held = self._mounts[name]
        if list(self._mounts.values()).count(held) == 1:
            held.users[:] = [user for user in held.users if user is not self]
            if not held.users:
                held.close()
        del self._mounts[name]

    def _place(self, name: str, module: nn.Module) -> None:
        """On the device for good: excluded from offload, or of a kind that cannot move."""
        if is_bitsandbytes_8bit(module):
            _log.info("%s is loaded in bitsandbytes 8-bit and stays where it is.", name)
        else:
            module.to(self.device)
        self._placed[name] = module
        module.__dict__["_hf_hook"] = HfHook(self.device, None, None)


class _Mount:
    """A unit with its entries on the modules, shared by every engine whose pipeline has them."""

    def __init__(self, unit: Unit, walker: Walker) -> None:
        self.unit = unit
        self.walker = walker
        self.users: list[Engine] = []
        self._undo: Undo = []

    def open(self, modules: tuple[nn.Module, ...], on_copy: Callable[[str, int], None]) -> None:
        """Moves the weights to masters and puts the entries on; again for more ``modules``, which
        share weights with those it has."""
        new = tuple(module for module in modules if module not in self.unit.modules)
        if new or not self._undo:
            run_back(self._undo)
            self.unit.modules += new
            self.walker.residency.adopt(self.unit, on_copy)
            self._install()

    def move_to(self, walker: Walker) -> None:
        """Changes over to the walker of another pipeline that shares modules with this one."""
        run_back(self._undo)
        self.walker = walker
        self._install()

    def _install(self) -> None:
        _mounts.add(self)
        install(self.unit, self.walker, self, self._undo)

    def detach(self) -> None:
        """Somebody removed the hooks from outside (accelerate's remove_hook_from_module)."""
        for engine in list(self.users):
            engine.detach_from_outside()

    def close(self) -> None:
        """Takes the entries off and gives the weights ordinary memory."""
        self.walker.leave()
        run_back(self._undo)
        self.walker.residency.drop(self.unit)
        _mounts.discard(self)


_mounts: weakref.WeakSet[_Mount] = weakref.WeakSet()


def _mount_of(module: nn.Module) -> _Mount | None:
    return getattr(module.__dict__.get("_hf_hook"), "owner", None)


_engines = 0
_unwatch_process: Callable[[], None] | None = None


def _count_engine() -> Callable[[], None]:
    """Weights can be watched while there is any engine (watch.py); returns the undo."""
    global _engines, _unwatch_process
    if _engines == 0:
        _unwatch_process = watch_process()
    _engines += 1

    def undo() -> None:
        global _engines
        _engines -= 1
        if _engines == 0 and _unwatch_process is not None:
            _unwatch_process()

    return undo


def resolve_device(
    device: torch.device | str | None, gpu_id: int | None, previous: int | None
) -> torch.device:
    """The device to run on, with its index. ``previous``: the index of an earlier attachment.

    Raises DeviceError where it does not exist, is not an accelerator that torch can drive, or is
    given twice.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        if kind is None:
            raise DeviceError(
                "There is no accelerator here. Give device='cpu' to run without one, or use the "
                "simulated accelerator (offload_engine.sim.load()) to test offloading."
            )
        device = kind
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device={device!r} is not a device: {error}") from error
    if gpu_id is not None and wanted.index is not None:
        raise DeviceError(
            f"Both gpu_id={gpu_id} and an indexed device={str(wanted)!r} were given. Give one: "
            f"gpu_id={gpu_id}, or device={str(wanted)!r}."
        )
    if wanted.type == "cpu":
        return torch.device("cpu")
    if kind is None or wanted.type != kind.type:
        have = f"the accelerator here is {kind.type!r}" if kind else "there is no accelerator here"
        raise DeviceError(f"device={str(wanted)!r} does not exist: {have}. device='cpu' always is.")
    index = next(i for i in (gpu_id, wanted.index, previous, 0) if i is not None)
    count = torch.accelerator.device_count()
    if isinstance(index, bool) or not isinstance(index, int):
        raise DeviceError(f"gpu_id={gpu_id!r} is not a device number; give 0, 1, ...")
    if not 0 <= index < count:
        raise DeviceError(
            f"{wanted.type}:{index} does not exist: there are {count} devices of type "
            f"{wanted.type!r}, numbered from 0."
        )
    return torch.device(wanted.type, index)


class _Undo:
    """Takes a patch back when called, or at the end of a ``with`` block. Idempotent."""

    def __init__(self, undo: Undo) -> None:
        self._undo = undo

    def __call__(self) -> None:
        run_back(self._undo)

    def __enter__(self) -> _Undo:
        return self

    def __exit__(self, *exception: Any) -> None:
        self()


def patch_diffusers() -> _Undo:
    """From now on ``pipe.enable_model_cpu_offload()`` attaches this engine.

    Returns its undo, to be called or used as a context manager.
    """
    from diffusers import DiffusionPipeline

    def enable_model_cpu_offload(
        self: Any, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Attaches offload_engine in chain mode; see offload_engine.attach."""
        attach(self, gpu_id=gpu_id, device=device)

    def restore(value: bool) -> None:
        HfHook.stands_for_accelerates = value

    undo: Undo = [functools.partial(restore, HfHook.stands_for_accelerates)]
    restore(True)
    for cls in (DiffusionPipeline, *_own_chains()):
        original = cls.__dict__["enable_model_cpu_offload"]
        undo.append(functools.partial(setattr, cls, "enable_model_cpu_offload", original))
        cls.enable_model_cpu_offload = enable_model_cpu_offload
    return _Undo(undo)


def _own_chains() -> list[Any]:
    """Pipelines that override enable_model_cpu_offload with a chain of accelerate hooks.

    The combined pipelines override it too, but hand it on to the pipelines inside.
    """
    import diffusers

    found = []
    for name in ("AudioLDM2Pipeline", "MusicLDMPipeline"):
        cls = getattr(diffusers, name, None)
        if cls is not None and "enable_model_cpu_offload" in vars(cls):
            found.append(cls)
    return found


def _candidates(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}#{number}"
        number += 1


def _is_on(module: nn.Module, device: torch.device) -> bool:
    return all(t.device == device for t in (*module.parameters(), *module.buffers()))


def _take_off_protocol(module: nn.Module) -> None:
    module.__dict__.pop("_hf_hook", None)


def _no_engine() -> None:
    return None
