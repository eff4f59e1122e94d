"""Modules to segments: which tensors there are, how they lie in one flat buffer, what is tied.

[Note: spans] Tensors are laid out by the storage bytes they cover, not one by one. Tensors whose
bytes overlap (tied weights, slices of one matrix) share a span, so a copy of the buffer keeps
every alias, stride and expanded dimension exactly as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .watch import WatchedTensor

_LARGE_NBYTES = 4096  # tensors from here on are aligned for matrix kernels
_LARGE_ALIGNMENT = 256  # what cublasLt looks for before it picks its fastest kernels
_CACHE_LINE = 64
_ITEM = 16  # bytes of the widest dtype
_PLAIN = frozenset({Tensor, nn.Parameter, WatchedTensor})


class View(NamedTuple):
    """How one tensor lies in a flat buffer."""

    span_start: int  # bytes from the start of the buffer
    span_nbytes: int
    offset_nbytes: int  # from span_start to the tensor's first element
    size: torch.Size
    stride: tuple[int, ...]  # elements
    dtype: torch.dtype
    inference: bool  # whether the tensor was made in inference mode

    def on(self, flat: TypedFlat, start_nbytes: int = 0) -> Tensor:
        """The tensor in ``flat``, where this view's buffer begins at ``start_nbytes``."""
        start = start_nbytes + self.span_start + self.offset_nbytes
        return self._strided(flat, start // self.dtype.itemsize)

    def in_span(self, span: Tensor) -> Tensor:
        """The tensor in ``span`` (uint8, 1-D), a buffer that holds its span alone."""
        return self._strided(TypedFlat(span), self.offset_nbytes // self.dtype.itemsize)

    def _strided(self, flat: TypedFlat, start: int) -> Tensor:
        if not self.inference:
            return flat[self.dtype].as_strided(self.size, self.stride, start)
        with torch.inference_mode(True):
            # A view of a normal tensor is a normal tensor even here; a tensor set onto its
            # storage is an inference tensor, as the original was.
            bare = torch.empty(0, dtype=self.dtype, device=flat.raw.device)
            return bare.set_(flat.raw.untyped_storage(), start, self.size, self.stride)


class TypedFlat(dict[torch.dtype, Tensor]):
    """A flat buffer (uint8, 1-D) seen as each dtype: ``flat[torch.float16]``.

    To be used outside inference mode, so that views of it are normal tensors.
    """

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __missing__(self, dtype: torch.dtype) -> Tensor:
        whole = self.raw.numel() - self.raw.numel() % dtype.itemsize
        self[dtype] = typed = self.raw[:whole].view(dtype)
        return typed


class Wrapper(NamedTuple):
    """A weight whose class wraps other tensors (torchao and the like)."""

    homes: tuple[tuple[dict[str, Any], str], ...]  # every (module dict, name) that holds it
    outer: Tensor
    inner: tuple[tuple[str, Tensor], ...]  # attribute path -> plain tensor


@dataclass(frozen=True)
class Scan:
    """What a walk over modules found."""

    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)  # plain ones, each once
    wrappers: list[Wrapper] = field(default_factory=list)
    subclasses: list[Tensor] = field(default_factory=list)  # with tensors in their attributes

    @property
    def all_tensors(self) -> list[Tensor]:
        """Every plain tensor, those inside wrappers included."""
        return self.tensors + [tensor for w in self.wrappers for _, tensor in w.inner]


def scan(roots: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> Scan:
    """Every module and every parameter, buffer and inner tensor below ``roots``, each once.

    Modules in ``without``, and what is below them, are left out.
    """
    found = Scan()
    seen_modules = {id(module) for module in without}
    seen: set[int] = set()
    wrapped: dict[int, list[tuple[dict[str, Any], str]]] = {}
    outers: dict[int, Tensor] = {}
    stack: list[nn.Module] = list(roots)
    while stack:
        module = stack.pop()
        if id(module) in seen_modules:
            continue
        seen_modules.add(id(module))
        found.modules.append(module)
        for home in (module._parameters, module._buffers):
            for name, tensor in home.items():
                if tensor is None:
                    continue
                if type(tensor) in _PLAIN:
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        found.tensors.append(tensor)
                elif is_traceable_wrapper_subclass(tensor):
                    wrapped.setdefault(id(tensor), []).append((home, name))
                    outers[id(tensor)] = tensor
                else:
                    _add_subclass(found, seen, tensor)
        stack.extend(child for child in module._modules.values() if child is not None)
    for key, homes in wrapped.items():
        inner = tuple(inner_tensors(outers[key]))
        found.wrappers.append(Wrapper(tuple(homes), outers[key], inner))
    return found


def opaque_classes(module: nn.Module) -> set[str]:
    """Names of the classes of weights below ``module`` whose bytes are out of reach."""
    found = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) in _PLAIN or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
            continue
        try:
            within_reach = tensor.untyped_storage().data_ptr() != 0 or tensor.numel() == 0
        except RuntimeError:
            within_reach = False
        if not within_reach:
            found.add(type(tensor).__name__)
    return found


def _add_subclass(found: Scan, seen: set[int], tensor: Tensor) -> None:
    """A subclass that is its own data (GGUF, bitsandbytes), and the tensors its attributes hold."""
    found.subclasses.append(tensor)
    for each in (tensor, *_attribute_tensors(vars(tensor).values(), depth=3)):
        if id(each) not in seen:
            seen.add(id(each))
            found.tensors.append(each)


def _attribute_tensors(values: Iterable[Any], depth: int) -> Iterator[Tensor]:
    for value in list(values):
        if isinstance(value, Tensor):
            yield value
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
            yield from _attribute_tensors(vars(value).values(), depth - 1)


def inner_tensors(outer: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(attribute path, plain tensor) for everything that a wrapper holds."""
    for name in outer.__tensor_flatten__()[0]:
        inner = getattr(outer, name)
        if is_traceable_wrapper_subclass(inner):
            yield from inner_tensors(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def rebuild(outer: Any, inner: dict[str, Tensor], path: str = "") -> Tensor:
    """A wrapper like ``outer`` around the tensors in ``inner`` (attribute path -> tensor)."""
    names, context = outer.__tensor_flatten__()
    parts = {}
    for name in names:
        part = getattr(outer, name)
        nested = is_traceable_wrapper_subclass(part)
        here = f"{path}{name}"
        parts[name] = rebuild(part, inner, f"{here}.") if nested else inner[here]
    twin = type(outer).__tensor_unflatten__(parts, context, outer.size(), outer.stride())
    if isinstance(outer, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=outer.requires_grad)
    return twin


def layout(tensors: list[Tensor]) -> tuple[int, list[View]]:
    """Bytes of the flat buffer that holds ``tensors``, and the place of each in it.

    See [Note: spans].
    """
    spans, span_of = _spans(tensors)
    nbytes, starts = _place([end - start for start, end in spans])
    views = []
    for tensor, span in zip(tensors, span_of, strict=True):
        place = (0, 0, 0)
        if span >= 0:
            first, end = spans[span]
            place = (starts[span], end - first, tensor.data_ptr() - first)
        inference = tensor.is_inference()
        views.append(View(*place, tensor.size(), tensor.stride(), tensor.dtype, inference))
    return nbytes, views


def _spans(tensors: list[Tensor]) -> tuple[list[list[int]], list[int]]:
    """The runs of addresses that ``tensors`` cover, as [start, end], and the run of each tensor.

    A run that several tensors overlap in starts at a whole item, so that each stays aligned.
    """
    spans: list[list[int]] = []
    span_of = [-1] * len(tensors)
    last_device = ""
    for device, start, end, index in sorted(
        (str(tensor.device), *_address_range(tensor), index)
        for index, tensor in enumerate(tensors)
        if tensor.numel()
    ):
        if spans and device == last_device and start < spans[-1][1]:
            first, last = spans[-1]
            spans[-1] = [first - first % _ITEM, max(last, end)]
        else:
            spans.append([start, end])
        last_device = device
        span_of[index] = len(spans) - 1
    return spans, span_of


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """First byte of ``tensor`` and the byte behind its last, as addresses; rounded to elements."""
    steps = sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.itemsize


def stack(sizes: Iterable[int]) -> tuple[int, list[int]]:
    """Total bytes, and where each buffer begins, of buffers of ``sizes`` bytes in one slot."""
    end, starts = 0, []
    for nbytes in sizes:
        starts.append(-(-end // _LARGE_ALIGNMENT) * _LARGE_ALIGNMENT)
        end = starts[-1] + nbytes
    return end, starts


def _place(sizes: list[int]) -> tuple[int, list[int]]:
    """Total bytes and starts of spans, the ones of rounder size first: then hardly any are lost
    to alignment."""
    starts = [0] * len(sizes)
    end = 0
    for index in sorted(range(len(sizes)), key=lambda i: -_roundness(sizes[i])):
        alignment = _roundness(sizes[index])
        if sizes[index] >= _LARGE_NBYTES:
            alignment = max(alignment, _CACHE_LINE)
        starts[index] = -(-end // alignment) * alignment
        end = starts[index] + sizes[index]
    return end, starts


def _roundness(nbytes: int) -> int:
    """The largest power of two that divides ``nbytes``, up to the best alignment."""
    return min(nbytes & -nbytes, _LARGE_ALIGNMENT)


def sharing(modules: Iterable[nn.Module]) -> list[list[int]]:
    """Indices of ``modules``, those with weights in common (the same bytes) grouped together."""
    return sharing_scans([scan([module]) for module in modules])


def sharing_scans(scans: Iterable[Scan]) -> list[list[int]]:
    """Indices of ``scans``, those with bytes in common grouped together."""
    leader: list[int] = []

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    ranges: list[tuple[str, int, int, int]] = []
    for index, found in enumerate(scans):
        leader.append(index)
        for tensor in found.tensors:
            if tensor.numel() and not tensor.is_meta:
                ranges.append((str(tensor.device), *_address_range(tensor), index))
    reach = ("", 0, 0)  # device, end and owner of the tensor that goes furthest
    for device, start, end, index in sorted(ranges):
        if device == reach[0] and start < reach[1]:
            leader[max(find(index), find(reach[2]))] = min(find(index), find(reach[2]))
        if device != reach[0] or end > reach[1]:
            reach = (device, end, index)
    groups: dict[int, list[int]] = {}
    for index in range(len(leader)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())
