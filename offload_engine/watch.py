"""Notices writes that leave no other trace: who took a weight's data while it was on the device.

[Note: watched weights] ``p.add_`` bumps the version counter and ``p.data = x`` moves the data,
but ``p.data.add_``, a write through the storage and a fused optimizer do neither. While a weight
is on the device, the accessors to its raw data mark it; a marked weight is compared by content
before its device copy is dropped (`same_content`). A forward pass uses none of them, so the normal
case costs nothing and never waits for the device.

The accessors of parameters are put on ``nn.Parameter`` itself, while there is an engine, and taken
off with the last: torch's C++ takes a slow path (0.5 us per operator and weight) for any subclass.
They only mark, and only parameters that are watched. Buffers, which few operators read, get a
subclass of their own while they are on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_MARK = "_offload_engine_touched"  # in a tensor's __dict__ while it is watched: was it touched?
_BASE: Any = torch._C.TensorBase  # type: ignore[attr-defined]
_METHODS = ("detach", "untyped_storage", "storage", "_typed_storage", "__dlpack__", "numpy")


touches = 0  # how often any watched tensor was touched


def _touch(tensor: Any) -> None:
    global touches
    marks = tensor.__dict__
    if _MARK in marks:
        marks[_MARK] = True
        touches += 1


def _get_data(self: Any) -> Tensor:
    _touch(self)
    return _BASE.data.__get__(self)


def _set_data(self: Any, value: Tensor) -> None:
    global touches
    if _MARK in self.__dict__:
        touches += 1  # calls for a full look, which sees where the data lies
    _BASE.data.__set__(self, value)


def _get_interface(self: Any) -> Any:
    _touch(self)
    return Tensor.__cuda_array_interface__.__get__(self)  # type: ignore[attr-defined]


def _marking(name: str) -> Callable[..., Any]:
    inherited = getattr(Tensor, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _touch(self)
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    return method


def _reduce(self: Any, protocol: Any) -> Any:
    if _MARK not in self.__dict__:
        return _PARAMETER_REDUCE(self, protocol)
    plain = _compact(self)
    if isinstance(self, nn.Parameter):
        plain = nn.Parameter(plain, requires_grad=self.requires_grad)
    return plain.__reduce_ex__(protocol)


def _compact(tensor: Any) -> Tensor:
    """A copy with memory of its own: a pickle would take the whole slot along, for each weight."""
    with torch.no_grad():
        return _plain(tensor).clone(memory_format=torch.preserve_format)


_PARAMETER_REDUCE: Any = nn.Parameter.__reduce_ex__
_ACCESSORS: dict[str, Any] = {
    "data": property(_get_data, _set_data),
    "__cuda_array_interface__": property(_get_interface),
    "__reduce_ex__": _reduce,
    **{name: _marking(name) for name in _METHODS},
}


class WatchedTensor(Tensor):
    """A buffer on the device; see [Note: watched weights]."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _compact(self)
        return memo[id(self)]


for _name, _accessor in _ACCESSORS.items():
    setattr(WatchedTensor, _name, _accessor)


def watch(tensor: Tensor) -> None:
    """Starts to watch a Parameter or Tensor; subclasses of either are left alone."""
    if type(tensor) is nn.Parameter:
        tensor.__dict__[_MARK] = False
    elif type(tensor) is Tensor:
        tensor.__class__ = WatchedTensor
        tensor.__dict__[_MARK] = False


def unwatch(tensor: Tensor) -> bool:
    """Ends the watch; True where somebody took the data of ``tensor`` in the meantime."""
    if type(tensor) is WatchedTensor:
        tensor.__class__ = Tensor  # type: ignore[assignment]
    return tensor.__dict__.pop(_MARK, False)


def is_touched(tensor: Tensor) -> bool:
    """Whether somebody took the data of a watched ``tensor`` since the watch began."""
    return bool(tensor.__dict__.get(_MARK, False))


def _plain(tensor: Any) -> Tensor:
    return _BASE.detach(tensor)


def watch_process() -> Callable[[], None]:
    """Puts the accessors on nn.Parameter and a hook behind optimizers; returns the undo.

    Fused optimizers change weights without a version bump.
    """
    before = {name: vars(nn.Parameter)[name] for name in _ACCESSORS if name in vars(nn.Parameter)}
    for name, accessor in _ACCESSORS.items():
        setattr(nn.Parameter, name, accessor)
    handle = register_optimizer_step_post_hook(_mark_stepped)

    def undo() -> None:
        handle.remove()
        for name in _ACCESSORS:
            if name in before:
                setattr(nn.Parameter, name, before[name])
            elif name in vars(nn.Parameter):
                delattr(nn.Parameter, name)

    return undo


def _mark_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _touch(parameter)


_CHUNK = 1 << 20  # words hashed at a time: some 24 MiB of temporaries
_MIX = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def same_content(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of equal shape and dtype hold the same bytes; they may be on two devices.

    Compares 64-bit hashes, computed where each tensor lies: only the hashes travel.
    """
    return _hash(left) == _hash(right)


@torch.no_grad()
def _hash(tensor: Tensor) -> int:
    """Sum of every 32-bit word times an odd factor that depends on its place, modulo 2**64.

    A multiply-shift family as in Dietzfelbinger et al. (1997), the factors from splitmix64
    (Steele et al., 2014).
    """
    with torch.inference_mode(False):
        words = _words(_plain(tensor))
        factors = _factors(min(_CHUNK, words.numel()), words.device)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for chunk in words.split(_CHUNK):
            total = total * _MIX[0] + (chunk.to(torch.int64) * factors[: chunk.numel()]).sum()
        return int(total.item())


def _words(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor`` in logical order, as 32-bit integers where that divides."""
    flat = tensor.reshape(-1)
    raw = flat.view(torch.uint8) if flat.dtype.itemsize != 1 else flat.view(torch.int8)
    aligned = raw.numel() % 4 == 0 and raw.storage_offset() % 4 == 0
    return raw.view(torch.int32) if aligned else raw


def _factors(count: int, device: torch.device) -> Tensor:
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _MIX[0]
    z = (z ^ (z >> 30)) * _MIX[1]
    z = (z ^ (z >> 27)) * _MIX[2]
    return z | 1
