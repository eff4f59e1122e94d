"""What is special about diffusers: components, exclusions, the ways into and out of a call.

[Note: the attached class] While a pipeline is attached, its class is a subclass of its own, of the
same name, whose methods tell the engine when a call begins and ends. Every pipeline is thus seen
to the end of its call, also by an exception, and also the nine classes that never call
``maybe_free_model_hooks``. Detaching puts the class back.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from . import sequence
from .blocks import Block, find_blocks, least_nbytes, named_blocks
from .errors import ComponentError, OffloadError, PlanError
from .hooks import HfHook, Undo
from .segments import opaque_classes
from .sequence import Sequence
from .units import format_nbytes

_LARGE = 1 / 8  # of the budget: smaller components move as one
_SURELY_FITS = 1 / 4  # of the budget: with weights beyond that, activations may not find room
ENGINE = "_offload_engine"  # the attribute of an attached pipeline that holds its engine
_STATE = (ENGINE, "_all_hooks", "_offload_device", "_offload_gpu_id")


class Callee(Protocol):
    """What an attached pipeline calls (engine.Engine)."""

    def begin_call(self, steps: int | None) -> None: ...

    def end_call(self, error: BaseException | None, result: Any = None) -> None: ...

    def free(self) -> None: ...

    def refresh(self) -> None: ...

    def detach_from_outside(self) -> None: ...

    def note_move(self, target: Any) -> None: ...

    def without_hooks(self) -> Any: ...

    component_names: frozenset[str]


class Pipeline:
    """A diffusers-style pipeline, or a plain mapping of names to modules, as the engine sees it."""

    def __init__(self, pipe: Any) -> None:
        """Raises ComponentError where ``pipe`` has no components."""
        self.pipe = pipe
        self._is_mapping = isinstance(pipe, Mapping)
        if not self._is_mapping and not isinstance(getattr(pipe, "components", None), Mapping):
            raise ComponentError(
                f"{type(pipe).__name__} has no components. Give a diffusers pipeline, or a mapping "
                "of names to modules such as {'unet': unet, 'vae': vae}."
            )

    @property
    def name(self) -> str:
        return "the mapping" if self._is_mapping else type(self.pipe).__name__

    @property
    def components(self) -> dict[str, Any]:
        return dict(self.pipe if self._is_mapping else self.pipe.components)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The components that are modules, in their order."""
        return {k: v for k, v in self.components.items() if isinstance(v, nn.Module)}

    def sequence(self, seq: Any) -> Sequence:
        """``seq`` read and checked, or the pipeline's own; raises SequenceError."""
        known = self.components
        if seq is not None:
            parsed = sequence.parse(seq)
            parsed.check_names(known)
            return parsed.only(self.modules)
        text = getattr(self.pipe, "model_cpu_offload_seq", None)
        if isinstance(text, str):
            return sequence.declared(text, self.modules)
        if self._offloads_its_own_way():
            return Sequence(tuple((name,) for name in self.modules))
        raise sequence.missing(self.name)

    def _offloads_its_own_way(self) -> bool:
        """AudioLDM2 and a few others name no sequence but override enable_model_cpu_offload."""
        base = _diffusion_pipeline()
        if base is None or not isinstance(self.pipe, base):
            return False
        lineage = type(self.pipe).__mro__
        return any(
            "enable_model_cpu_offload" in vars(cls) for cls in lineage[: lineage.index(base)]
        )

    def excluded(self, seq: Sequence) -> set[str]:
        """Components that stay on the device: those excluded upstream, unless in the sequence."""
        names = set(getattr(self.pipe, "_exclude_from_cpu_offload", ()))
        return (names & set(self.modules)) - set(seq.names)

    @property
    def progress_bar_config(self) -> dict[str, Any]:
        """The pipeline's own tqdm settings (``pipe.set_progress_bar_config``)."""
        return dict(getattr(self.pipe, "_progress_bar_config", None) or {})

    def check_not_placed(self) -> None:
        """Raises ComponentError where something else already decides where components are."""
        modules = self.modules
        grouped = [name for name, module in modules.items() if _is_group_offloaded(module)]
        if grouped:
            raise ComponentError(
                f"Group offloading is active on {', '.join(grouped)}, and two engines cannot move "
                "the same weights. Load these components anew and attach without "
                "enable_group_offload(); or engine.detach() before you call it.",
                names=grouped,
            )
        sharded = [name for name, module in modules.items() if _is_sharded(module)]
        if sharded:
            raise ComponentError(
                f"{', '.join(sharded)} is sharded over devices (tensor parallelism): each rank "
                "already holds its part only, and the engine cannot move parts.",
                names=sharded,
            )
        mapped = getattr(self.pipe, "hf_device_map", None)
        if isinstance(mapped, Mapping) and len(mapped) > 1:
            raise ComponentError(
                f"A device map is active on the pipeline: {dict(mapped)}. Call "
                "pipe.reset_device_map() first, then attach.",
                names=mapped,
            )
        split = [name for name, module in modules.items() if _is_split(module)]
        if split:
            raise ComponentError(
                f"A device map spreads {', '.join(split)} over several devices. Load it without "
                "device_map, or with one device.",
                names=split,
            )

    def check_loaded(self, device: torch.device) -> None:
        """Raises ComponentError for weights that cannot be moved: on the meta device, in classes
        that cannot be taken apart, or bitsandbytes 8-bit ones that are not on ``device``."""
        empty = [name for name, module in self.modules.items() if _on_meta(module)]
        if empty:
            raise ComponentError(
                f"{', '.join(empty)} has weights on the meta device, so there is nothing to "
                "offload. Load its weights first (from_pretrained, or to_empty and "
                "load_state_dict).",
                names=empty,
            )
        opaque = {name: sorted(opaque_classes(module)) for name, module in self.modules.items()}
        opaque = {name: classes for name, classes in opaque.items() if classes}
        if opaque:
            said = ", ".join(f"{name} ({', '.join(c)})" for name, c in opaque.items())
            raise ComponentError(
                f"Weights of {said} cannot be moved: their class wraps other tensors and has no "
                "__tensor_flatten__ to take it apart. Use another quantisation, or leave the "
                "component out of the pipeline.",
                names=opaque,
            )
        stuck = [
            name
            for name, module in self.modules.items()
            if is_bitsandbytes_8bit(module) and next(module.parameters()).device.type != device.type
        ]
        if stuck:
            raise ComponentError(
                f"{', '.join(stuck)} is in bitsandbytes 8-bit on the CPU, and stays where it is. "
                f"Load it on {device} (device_map={{'': '{device}'}}), or in 4-bit.",
                names=stuck,
            )

    def cuts(
        self, seq: Sequence, vram_nbytes: int | None, paths: Iterable[str] | None
    ) -> dict[str, list[Block]]:
        """The blocks of each component that is to be cut: of those that the user named, and, if
        ``vram_nbytes`` may not hold everything, of the large ones.

        Raises ComponentError for paths that do not exist, and PlanError where the rest and the
        largest block of a component do not fit.
        """
        stay = self.excluded(seq)
        parts = {n: m for n, m in self.modules.items() if n not in stay}
        cut = self._named(parts, paths)
        if vram_nbytes is None:
            if paths is not None:
                raise OffloadError("blocks are streamed within a budget: give vram as well.")
            return {}
        sizes = {name: least_nbytes(module, ()) for name, module in parts.items()}
        if sum(sizes.values()) > _SURELY_FITS * vram_nbytes:
            for name, module in parts.items():
                if name not in cut and sizes[name] > _LARGE * vram_nbytes:
                    cut[name] = find_blocks(module)
        least = {name: least_nbytes(module, cut.get(name, ())) for name, module in parts.items()}
        if least and max(least.values()) > vram_nbytes:
            name = max(least, key=lambda each: least[each])
            raise PlanError(
                None,
                (name,),
                least[name],
                vram_nbytes,
                f"vram={vram_nbytes} bytes ({format_nbytes(vram_nbytes)}) does not hold {name}: "
                f"what of it must be there at once takes {least[name]} bytes "
                f"({format_nbytes(least[name])}), without activations. The least vram that can "
                f"work is {least[name]} bytes and what the activations take.",
            )
        return cut

    def _named(
        self, parts: Mapping[str, nn.Module], paths: Iterable[str] | None
    ) -> dict[str, list[Block]]:
        if isinstance(paths, str):
            paths = [paths]
        found: dict[str, list[str]] = {}
        for path in paths or ():
            name, _, below = path.partition(".")
            if name not in parts:
                near = difflib.get_close_matches(name, parts, n=3, cutoff=0.4)
                raise ComponentError(
                    f"blocks names {path!r}, but there is no component {name!r} to offload; near "
                    f"matches: {', '.join(map(repr, near)) or 'none'}.",
                    names=[path],
                )
            found.setdefault(name, []).append(below)
        return {name: named_blocks(parts[name], name, below) for name, below in found.items()}

    def remove_foreign_hooks(self) -> None:
        """Takes accelerate's hooks off, as enable_model_cpu_offload does first."""
        foreign = {k: m for k, m in self.modules.items() if _has_foreign_hook(m)}
        if not foreign:
            return
        remove = getattr(type(self.pipe), "remove_all_hooks", None)
        if remove is None:
            raise ComponentError(
                f"{', '.join(foreign)} carries hooks of accelerate or of a ComponentsManager. "
                "Remove them first (accelerate.hooks.remove_hook_from_module(module, "
                "recurse=True), or disable_auto_cpu_offload()).",
                names=foreign,
            )
        remove(self.pipe)

    def remember(self, device: torch.device) -> None:
        """Leaves the device's index on the pipeline, where the next attachment looks for it."""
        if not self._is_mapping:
            self.pipe.__dict__["_offload_gpu_id"] = device.index or 0

    def attach(self, engine: Callee, device: torch.device, undo: Undo) -> None:
        """Has the pipeline tell ``engine`` about its calls; enters in ``undo`` how to end that."""
        if self._is_mapping:
            return
        pipe, original = self.pipe, type(self.pipe)
        values = (engine, [engine], device, device.index or 0)
        state = dict(zip(_STATE, values, strict=True))
        before = {name: pipe.__dict__[name] for name in state if name in pipe.__dict__}

        def put_back() -> None:
            pipe.__class__ = getattr(type(pipe), "_offload_original", type(pipe))
            for name in state:
                pipe.__dict__.pop(name, None)
            pipe.__dict__.update(before)

        undo.append(put_back)
        pipe.__dict__.update(state)
        pipe.__class__ = _attached_class(original)  # type: ignore[arg-type]


def engine_of(pipe: Any) -> Any:
    """The engine that ``pipe`` is attached to, or None; finds it after `patch_diffusers`."""
    return getattr(pipe, "__dict__", {}).get(ENGINE)


@functools.cache
def _attached_class(original: type) -> type:
    """See [Note: the attached class]."""
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_offload_original": original,
        "__setattr__": _setattr(original),
        "__reduce_ex__": _reduce(original),
    }
    if "__call__" in dir(original):  # every type is callable; are its instances?
        members["__call__"] = _call(original)
    for name, make in (
        ("maybe_free_model_hooks", _maybe_free_model_hooks),
        ("remove_all_hooks", _remove_all_hooks),
        ("load_textual_inversion", _load_textual_inversion),
        ("to", _to),
    ):
        if hasattr(original, name):
            members[name] = make(original)
    return type(original)(original.__name__, (original,), members)


def calls_on_stack(engine: Any) -> int:
    """How many calls of the pipeline of ``engine`` this thread is in, itself the judge: an
    interrupt may have kept any of them from being counted off."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == _CALL and frame.f_locals.get("_offload_call_of") is engine:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


_CALL = "_offloaded_call"


def _call(original: Any) -> Any:
    @functools.wraps(original.__call__)
    def _offloaded_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _offload_call_of = engine_of(self)
        if _offload_call_of is None:
            return original.__call__(self, *args, **kwargs)
        try:
            _offload_call_of.begin_call(_steps(original, self, args, kwargs))
            result = original.__call__(self, *args, **kwargs)
        except BaseException:
            # No name for it here: `calls_on_stack` reads the locals of this frame, and what reads
            # them keeps them; the error, its frames and their tensors would form a cycle.
            _offload_call_of.end_call(sys.exc_info()[1])
            raise
        _offload_call_of.end_call(None, result)
        return result

    return _offloaded_call


def _steps(original: Any, pipe: Any, args: Any, kwargs: Any) -> int | None:
    """The denoising steps that a call asks for, or by default takes; None where it has none."""
    steps = kwargs.get("num_inference_steps")
    for own in ("timesteps", "sigmas"):  # as schedulers take them, in the place of a number
        if steps is None and isinstance(kwargs.get(own), (list, tuple)):
            steps = len(kwargs[own])
    if steps is None:
        try:
            bound = _signature(original).bind_partial(pipe, *args, **kwargs)
        except (TypeError, ValueError):
            return None
        bound.apply_defaults()
        steps = bound.arguments.get("num_inference_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


@functools.cache
def _signature(original: Any) -> inspect.Signature:
    return inspect.signature(original.__call__)


def _maybe_free_model_hooks(original: Any) -> Any:
    @functools.wraps(original.maybe_free_model_hooks)
    def maybe_free_model_hooks(self: Any) -> None:
        engine = engine_of(self)
        if engine is None:
            return original.maybe_free_model_hooks(self)
        for component in self.components.values():
            if hasattr(component, "_reset_stateful_cache"):
                component._reset_stateful_cache()
        engine.free()
        override = self.__dict__.get("enable_model_cpu_offload")
        if override is not None:  # the user's own: upstream ends by calling it, too
            override(device=self._offload_device)

    return maybe_free_model_hooks


def _remove_all_hooks(original: Any) -> Any:
    @functools.wraps(original.remove_all_hooks)
    def remove_all_hooks(self: Any) -> None:
        engine = engine_of(self)
        if engine is None:
            return original.remove_all_hooks(self)
        engine.detach_from_outside()
        self._all_hooks = []

    return remove_all_hooks


def _load_textual_inversion(original: Any) -> Any:
    @functools.wraps(original.load_textual_inversion)
    def load_textual_inversion(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine is None:
            return original.load_textual_inversion(self, *args, **kwargs)
        with engine.without_hooks():  # upstream needs accelerate as soon as it sees an _hf_hook
            return original.load_textual_inversion(self, *args, **kwargs)

    return load_textual_inversion


def _to(original: Any) -> Any:
    @functools.wraps(original.to)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine is not None:
            engine.note_move(kwargs.get("device", args[0] if args else None))
        return original.to(self, *args, **kwargs)

    return to


def _setattr(original: Any) -> Any:
    def __setattr__(self: Any, name: str, value: Any) -> None:
        original.__setattr__(self, name, value)
        engine = engine_of(self)
        if engine is not None and name in engine.component_names:
            engine.refresh()

    return __setattr__


def _reduce(original: Any) -> Any:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in _STATE}
        return _bare, (original,), state

    return __reduce_ex__


def _bare(cls: Any) -> Any:
    """What a copy of an attached pipeline begins with: an object that is not attached."""
    return cls.__new__(cls)


def _diffusion_pipeline() -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        return None
    return DiffusionPipeline


def _is_group_offloaded(module: nn.Module) -> bool:
    registries = (getattr(each, "_diffusers_hook", None) for each in module.modules())
    return any(r is not None and r.get_hook("group_offloading") is not None for r in registries)


def _is_sharded(module: nn.Module) -> bool:
    return any(
        type(p).__name__ == "DTensor" or hasattr(p, "device_mesh") for p in module.parameters()
    )


def _is_split(module: nn.Module) -> bool:
    placed = getattr(module, "hf_device_map", None)
    return isinstance(placed, Mapping) and len({str(device) for device in placed.values()}) > 1


def _on_meta(module: nn.Module) -> bool:
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def _has_foreign_hook(module: nn.Module) -> bool:
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and not isinstance(hook, HfHook)


def is_bitsandbytes_8bit(module: nn.Module) -> bool:
    """Whether ``module`` holds bitsandbytes 8-bit weights, whose state is outside its tensors."""
    return any(type(parameter).__name__ == "Int8Params" for parameter in module.parameters())
