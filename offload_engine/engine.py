"""`attach`: the engine of one pipeline, its lifetime and its configuration."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from . import slots
from .blocks import Block, least_nbytes, parts_of
from .errors import ComponentError, DeviceError
from .guide import Chain, Guide
from .hooks import HfHook, Undo, Walker, install, nbytes_on, run_back
from .host_store import HostStore
from .measure import Meter
from .pipeline import Pipeline, calls_on_stack, engine_of, is_bitsandbytes_8bit
from .plan import Plan
from .planner import Planner, opening
from .report import Report, build_report
from .residency import Event, Residency, State, Unit, new_log
from .segments import sharing
from .sequence import Cursor, Sequence, learn
from .transfers import elapsed_seconds
from .units import format_nbytes, parse_nbytes
from .watch import watch_process

_log = logging.getLogger("offload_engine")


def attach(
    pipe: Any,
    seq: Any = None,
    *,
    device: torch.device | str | None = None,
    gpu_id: int | None = None,
    vram: int | str | None = None,
    blocks: Seq[str] | None = None,
    pin: str | bool | int = "auto",
) -> Engine:
    """Offloads the components of ``pipe``: on the device while they run, in host memory otherwise.

    ``pipe``: a diffusers pipeline, any object with a ``components`` mapping, or a mapping of names
    to modules. ``seq``: the order in which components run, "text_encoder->unet->vae" or a list;
    "+" joins those that alternate in one loop; None: the pipeline's ``model_cpu_offload_seq``. It
    is a first guess: each call teaches the next. ``device``, ``gpu_id``: as in diffusers'
    ``enable_model_cpu_offload``; None: the accelerator torch finds. ``pin``: "auto", True, False,
    or the most bytes of host memory to pin.

    ``vram``: None is chain mode: one component at a time, all memory given back at the end of a
    call. Or the bytes of device memory to use, weights and activations together, as a number, as
    text ("8GiB"), or "auto" for what is free now: the first call is careful and measures, the
    next ones follow a plan, and what is worth keeping stays between calls. (A mapping has no calls
    that could be seen: it keeps to the budget without a plan.) Pipelines with a ``vram`` on one
    device share it. Where it does not hold everything, large components are
    streamed block by block. Their blocks are found; ``blocks`` names them, for the components it
    mentions: paths of lists of blocks or of single ones ("transformer.transformer_blocks").

    Attaches everything or nothing; attaching again replaces. Raises OffloadError (a ValueError):
    SequenceError, DeviceError, ComponentError, PlanError where a component is larger than ``vram``.
    """
    pipeline = Pipeline(pipe)
    pipeline.check_not_placed()
    sequence = pipeline.sequence(seq)
    target = resolve_device(device, gpu_id, getattr(pipe, "_offload_gpu_id", None))
    budget_nbytes = _read_vram(vram, pipeline, target)
    cuts = pipeline.cuts(sequence, budget_nbytes, blocks)
    store = HostStore(target, pin)
    pipeline.remove_foreign_hooks()
    pipeline.check_loaded(target)
    before = engine_of(pipe)
    if before is not None and not before.could_share(target, pin, budget_nbytes, cuts):
        before.detach()
    return Engine(pipeline, sequence, target, store, pin, budget_nbytes, cuts, before)


class Engine:
    """Offloads one pipeline; made by `attach`. Also a context manager that detaches at its end."""

    def __init__(
        self,
        pipeline: Pipeline,
        sequence: Sequence,
        device: torch.device,
        store: HostStore,
        pin: Any,
        vram_nbytes: int | None,
        blocks: dict[str, list[Block]],
        before: Engine | None,
    ) -> None:
        self._pipeline = pipeline
        self._sequence = sequence
        self._store = store
        self._pin = pin
        self._blocks = blocks  # component -> what of it moves on its own
        self._walker = _walker_of_budget(device, vram_nbytes) or Walker(Residency(device))
        self._planner = Planner(vram_nbytes)
        self._mounts: dict[str, _Mount] = {}  # component name -> mount
        self._placed: dict[str, nn.Module] = {}  # excluded components, on the device for good
        self._calls: list[_Before] = []  # of each call that is under way, what it interrupted
        self._log = self._residency.log  # of the last call
        self._meter = Meter(None)  # the same
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
                self._walker.release_all()  # what it kept need not fit here
            pipeline.attach(self, device, self._undo)
            if vram_nbytes is not None:
                placed = [t for m in self._placed.values() for t in _tensors_on(m, device)]
                outside = slots.outside_nbytes(device) - sum(t.nbytes for t in placed)
                self._planner.outside_nbytes = max(0, outside)
                _budgeted.add(self)
            _read_budgets(self._walker)
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
    def plan(self) -> Plan | None:
        """The plan in force; None until a call was measured."""
        return self._planner.plan

    @property
    def vram_nbytes(self) -> int | None:
        """The device memory to use, in bytes; None in chain mode."""
        return self._planner.vram_nbytes

    @property
    def sequence(self) -> Sequence:
        """The order in which components are believed to run."""
        return self._sequence

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the components with weights on the device now; not those on their way."""
        here = set(self._placed)
        on_device = {u for u in self._residency.resident if u.state is not State.LOADING}
        here |= {n for n, mount in self._mounts.items() if not on_device.isdisjoint(mount.units)}
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
        last = [] if self._calls else list(self._meter.marks)
        return build_report(
            list(self._log),
            {name: mount.units for name, mount in self._mounts.items()},
            device=self.device,
            sequence=self._sequence,
            marks=last + list(self._walker.meter.marks),
            seconds=elapsed_seconds(last[0].reached, last[-1].ended) if last else 0.0,
            plan=self._planner.plan_of_last_call,
            peak_before_nbytes=self._peaks[0],
            peak_nbytes=slots.peak_nbytes(self.device) if self._calls else self._peaks[1],
        )

    def curve(self, points: int = 8) -> list[tuple[int, Plan]]:
        """Time against memory: plans for ``points`` budgets, from the least that can work to what
        holds everything, as (vram in bytes, plan); ``plan.seconds`` is what a call would take.

        For a pipeline that was called once at least. Raises OffloadError before that.
        """
        return self._planner.curve(self._units, points)

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
            _read_budgets(self._walker)

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

    def begin_call(self, steps: int | None = None) -> None:
        """The pipeline was called, to take ``steps`` denoising steps if that is known."""
        walker = self._walker
        del self._calls[calls_on_stack(self) - 1 :]
        if not self._calls:
            self.refresh()
            peak = slots.peak_nbytes(self.device)
            self._peaks = (peak, peak)
        walker.leave()
        residency = self._residency
        self._calls.append(
            _Before(walker.guide, walker.meter, walker.on_wrap, residency.log, residency.busy)
        )
        walker.meter.is_interrupted = residency.busy
        residency.busy = True
        if len(self._calls) == 1:
            self._log = residency.log = new_log()
        if self.vram_nbytes is not None:
            residency.settle_all(self._units)
        walker.on_wrap, walker.meter = None, Meter(residency.link)
        walker.sizes = {unit.name: unit.nbytes for unit in self._units}
        walker.guide = self._planner.guide(
            self._chain, self._units, steps, walker.meter, solo=self._solo
        )

    def end_call(self, error: BaseException | None, result: Any = None) -> None:
        """The call gave ``result``, or raised ``error``: learn from it, and give memory back."""
        walker, residency = self._walker, self._residency
        guide, meter = walker.guide, walker.meter
        meter.boundary()
        walker.leave()
        depth, log_before = calls_on_stack(self) - 1, residency.log
        if len(self._calls) > depth:
            before = self._calls[depth]
            walker.guide, walker.meter, walker.on_wrap = before.guide, before.meter, before.on_wrap
            residency.busy, log_before = before.busy, before.log
            del self._calls[depth:]
            if not self._calls:
                self._meter = meter
            if error is None:
                self._learn(guide, meter, residency.log)
        if isinstance(error, torch.OutOfMemoryError):
            self._solo = True
            self._planner.ran_out()
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(self._held())
        try:
            if not self._attached:
                return
            if isinstance(error, torch.OutOfMemoryError):
                walker.release_all()
                residency.release_idle_others()
            elif self.vram_nbytes is None:
                walker.release_all()
            elif error is None and not self._calls:
                self._settle(nbytes_on(result, self.device))
        except Exception:
            if error is None:
                raise
            _log.exception("Could not release every component; the next call will.")
        finally:
            if residency.busy:  # it was within another call
                residency.log = log_before
        if not self._calls:
            self._peaks = (self._peaks[0], slots.peak_nbytes(self.device))
            if not residency.busy:
                self._idle()

    def _held(self) -> str:
        """What the engine has on the device, for whoever ran out of memory."""
        held = {u.name: u.nbytes for u in self._residency.resident}
        total = slots.lent_nbytes(self.device)
        largest = sorted(held, key=lambda name: -held[name])[:5]
        said = ", ".join(f"{name} {format_nbytes(held[name])}" for name in largest)
        more = f" and {len(held) - 5} more" if len(held) > 5 else ""
        return (
            f"offload_engine held {format_nbytes(total)} of weights on {self.device}: "
            f"{said or 'nothing'}{more}. They are released now; the next call leaves more room."
        )

    def free(self) -> None:
        """``maybe_free_model_hooks``: everything off the device; pipelines call it at their end.

        With a ``vram`` of its own, a call keeps what is worth keeping.
        """
        if self.vram_nbytes is None or not self._calls:
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

    def could_share(
        self,
        device: torch.device,
        pin: Any,
        vram_nbytes: int | None,
        blocks: dict[str, list[Block]],
    ) -> bool:
        """Whether a new engine for the same pipeline can take over the masters of this one."""
        is_alike = (self.vram_nbytes is None) == (vram_nbytes is None) and self._blocks == blocks
        return self._attached and self.device == device and self._pin == pin and is_alike

    def _chain(self) -> Chain:
        units = {name: mount.unit.name for name, mount in self._mounts.items()}
        stages = tuple(
            tuple(dict.fromkeys(units[name] for name in stage if name in units))
            for stage in self._sequence.stages
        )
        stages = tuple(stage for stage in stages if stage)
        nbytes = {unit.name: unit.nbytes for unit in self._units}
        cursor = Cursor(Sequence(stages), nbytes, solo=self._solo)
        return Chain(cursor, watches_forwards=bool(self._calls))

    @property
    def _units(self) -> list[Unit]:
        """Every unit of this pipeline."""
        return [unit for mount in dict.fromkeys(self._mounts.values()) for unit in mount.units]

    def _learn(self, guide: Guide, meter: Meter, log: deque[Event]) -> None:
        """Takes in what the call showed: the order of its uses, and what they cost."""
        if not meter.marks or meter.is_full:
            return
        names = {
            unit.name: name
            for name, mount in reversed(self._mounts.items())
            for unit in mount.units
        }
        if not guide.is_still:  # such a call shows each unit once only
            nbytes = {name: mount.nbytes for name, mount in self._mounts.items()}
            trace = [names[mark.unit] for mark in meter.marks if mark.unit in names]
            switches = [name for name, _ in itertools.groupby(trace)]
            self._sequence = learn(switches, nbytes)
        turns: dict[str, int] = {}
        for number, mark in enumerate(meter.marks):
            turns.setdefault(mark.unit, number)
        for unit in self._units:
            turns |= {part.name: turns[unit.name] for part in unit.parts if unit.name in turns}
            unit.turn = turns.get(unit.name, math.inf)
        if not self._calls:
            self._planner.ended(guide, meter, log, frozenset(names))

    def _settle(self, result_nbytes: int) -> None:
        """Has on the device what the plan for the next call begins with. The result of this one,
        ``result_nbytes`` on the device, is expected to be gone by then."""
        outside = slots.outside_nbytes(self.device) - result_nbytes
        plan = self._planner.prepare(self._units, outside)
        if plan is None:
            return
        residency = self._residency
        with residency.lock:
            order, later_nbytes = opening(plan)
            units = [residency.units[name] for name in order]
            missing = [unit.name for unit in units if unit.state is State.HOST]
            if not missing:
                return
            for unit in residency.resident:
                if unit.name not in order:
                    residency.release(unit)
            nbytes = sum(residency.units[name].nbytes for name in missing)
            residency.prefetch(missing, nbytes - later_nbytes)

    def _idle(self) -> None:
        """Outside of calls: components that the user runs by hand are followed just as well.

        Nothing is learned from them: who runs a part by hand has not shown how the whole runs.
        """
        if not self._calls and self._attached:
            walker = self._walker
            walker.meter = Meter(self._residency.link, most_marks=_MARKS_BY_HAND)
            walker.guide = self._planner.guide_by_hand(self._chain, self._units, walker.meter)
            walker.on_wrap = _weakly(self._idle)  # others may share the walker

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
            name = next(iter(group))
            blocks = self._blocks.get(name, ())
            name = self._residency.free_name(name)
            held = _Mount(name, self._walker, self._store, blocks)
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

    def _join(self, walker: Walker) -> None:
        """Shares the residency of another pipeline: one view of what is on the device."""
        if walker is self._walker:
            return
        before = self._walker
        walker.residency.absorb(before.residency)
        for held in list(_mounts):
            if held.walker is before:
                held.move_to(walker)
                for user in held.users:
                    user._walker = walker
        self._walker = walker
        _read_budgets(walker)

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


class _Before(NamedTuple):
    """What a call interrupted."""

    guide: Guide
    meter: Meter
    on_wrap: Callable[[], None] | None
    log: deque[Event]
    busy: bool


class _Mount:
    """A component as one or more units with entries on its modules, shared by every engine whose
    pipeline has it."""

    def __init__(self, name: str, walker: Walker, store: HostStore, blocks: Seq[Block]) -> None:
        """``blocks``: what of it moves on its own; only while it consists of one module."""
        self.name = name
        self.walker = walker
        self.users: list[Engine] = []
        self.units: list[Unit] = []  # the rest first
        self._store = store
        self._blocks = blocks
        self._undo: Undo = []

    @property
    def unit(self) -> Unit:
        """What is outside of the blocks."""
        return self.units[0]

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    def open(self, modules: tuple[nn.Module, ...], on_copy: Callable[[str, int], None]) -> None:
        """Moves the weights to masters and puts the entries on; again for more ``modules``, which
        share weights with those it has."""
        before = self.unit.modules if self.units else ()
        new = tuple(module for module in modules if module not in before)
        if not new and self._undo:
            return
        run_back(self._undo)
        if len(before + new) > 1 and len(self.units) > 1:
            self._drop_units()
        if not self.units:
            self._make_units(before + new)
        else:
            self.unit.modules += new
        for unit in self.units:
            self.walker.residency.adopt(unit, on_copy)
        self._install()

    def _make_units(self, modules: tuple[nn.Module, ...]) -> None:
        blocks = self._blocks if len(modules) == 1 else ()
        inner = [module for _, members in blocks for module in members]
        rest = Unit(self.name, modules, self._store, without=inner)
        self.units.append(rest)
        nbytes = least_nbytes(modules[0], ()) if blocks else 0
        for block in blocks:
            path, members = block
            name = f"{self.name}.{path}"
            parts = tuple(
                Unit(f"{name}/{number}", layers, self._store)
                for number, layers in enumerate(parts_of(block, nbytes), 1)
            )
            layers = [layer for part in parts for layer in part.modules]
            whole = Unit(name, members, self._store, without=layers, rest=(rest,), parts=parts)
            self.units += [whole, *parts]

    def _drop_units(self) -> None:
        while self.units:
            self.walker.residency.drop(self.units[-1])
            self.units.pop()

    def move_to(self, walker: Walker) -> None:
        """Changes over to the walker of another pipeline that shares modules with this one."""
        run_back(self._undo)
        self.walker = walker
        self._install()

    def _install(self) -> None:
        _mounts.add(self)
        parts = {part for unit in self.units for part in unit.parts}
        for unit in self.units:
            if unit not in parts:
                install(unit, self.walker, self, self._undo)

    def detach(self) -> None:
        """Somebody removed the hooks from outside (accelerate's remove_hook_from_module)."""
        for engine in list(self.users):
            engine.detach_from_outside()

    def close(self) -> None:
        """Takes the entries off and gives the weights ordinary memory."""
        self.walker.leave()
        run_back(self._undo)
        for unit in reversed(self.units):
            self.walker.residency.drop(unit)
        _mounts.discard(self)


_mounts: weakref.WeakSet[_Mount] = weakref.WeakSet()
_budgeted: weakref.WeakSet[Engine] = weakref.WeakSet()  # engines with a vram of their own
_MARKS_BY_HAND = 100


def _walker_of_budget(device: torch.device, vram_nbytes: int | None) -> Walker | None:
    """The walker of pipelines that share the budget of ``device``, if there are any."""
    sharers = [e for e in _budgeted if e._attached and e.device == device]
    return sharers[0]._walker if sharers and vram_nbytes is not None else None


def _read_budgets(walker: Walker) -> None:
    """Tells ``walker`` the tightest budget of the pipelines that it leads."""
    budgets = [e.vram_nbytes for e in _budgeted if e._attached and e._walker is walker]
    walker.vram_nbytes = min((b for b in budgets if b is not None), default=None)


def _read_vram(vram: int | str | None, pipeline: Pipeline, device: torch.device) -> int | None:
    """``vram`` in bytes; None for chain mode. Raises OffloadError."""
    if vram is None or vram != "auto":
        return None if vram is None else parse_nbytes(vram, "vram")
    if device.type == "cpu":
        return None
    mine = sum(t.nbytes for m in pipeline.modules.values() for t in _tensors_on(m, device))
    reserved = torch.accelerator.memory_reserved(device)
    free, total = slots.memory_info(device)
    if not total:
        raise DeviceError(f"{device} does not tell its free memory; give vram in bytes.")
    return free + reserved - slots.allocated_nbytes(device) + mine


def _tensors_on(module: nn.Module, device: torch.device) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.device == device]


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


def _is_on(module: nn.Module, device: torch.device) -> bool:
    return all(t.device == device for t in (*module.parameters(), *module.buffers()))


def _take_off_protocol(module: nn.Module) -> None:
    module.__dict__.pop("_hf_hook", None)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """``method``, which does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        bound = reference()
        if bound is not None:
            bound()

    return call


def _no_engine() -> None:
    return None
