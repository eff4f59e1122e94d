"""Notices writes that leave no other trace: who took a weight's data while it was on the device.

[Note: watched weights] ``p.add_`` bumps the version counter and ``p.data = x`` moves the data,
but ``p.data.add_``, a write through the storage and a fused optimizer do neither. While a weight
is on the device its class is one of those below: the same tensor, whose accessors to the raw data
set a mark first. A marked weight is compared by content before its device copy is dropped
(`same_content`). Forward passes do not touch these accessors, so the normal case costs nothing
and needs no synchronisation with the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_MARK = "_offload_engine_touched"
_BASE: Any = torch._C.TensorBase


class _Watched:
    """The accessors through which a weight can be written without a version bump."""

    @property
    def data(self) -> Tensor:
        self.__dict__[_MARK] = True
        return _BASE.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        _BASE.data.__set__(self, value)

    @property
    def __cuda_array_interface__(self) -> Any:
        self.__dict__[_MARK] = True
        return Tensor.__cuda_array_interface__.__get__(self)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _plain(self).clone(memory_format=torch.preserve_format)
            if isinstance(self, nn.Parameter):
                memo[id(self)] = nn.Parameter(memo[id(self)], requires_grad=self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = _plain(self)
        if isinstance(self, nn.Parameter):
            plain = nn.Parameter(plain, requires_grad=self.requires_grad)
        return plain.__reduce_ex__(protocol)


def _marking(name: str) -> Callable[..., Any]:
    inherited = getattr(Tensor, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[_MARK] = True
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in ("detach", "untyped_storage", "storage", "_typed_storage", "__dlpack__", "numpy"):
    setattr(_Watched, _name, _marking(_name))


class WatchedParameter(_Watched, nn.Parameter):
    """An nn.Parameter on the device; see [Note: watched weights]."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class WatchedTensor(_Watched, Tensor):
    """A buffer on the device; see [Note: watched weights]."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


WATCHED = (WatchedParameter, WatchedTensor)
_TO_WATCHED: dict[type, type] = {nn.Parameter: WatchedParameter, Tensor: WatchedTensor}
_TO_PLAIN: dict[type, type] = {watched: plain for plain, watched in _TO_WATCHED.items()}


def watch(tensor: Tensor) -> None:
    """Starts to watch ``tensor``; other classes than Parameter and Tensor are left alone."""
    watched = _TO_WATCHED.get(type(tensor))
    if watched is not None:
        tensor.__class__ = watched


def unwatch(tensor: Tensor) -> bool:
    """Ends the watch; True where somebody took the data of ``tensor`` in the meantime."""
    plain = _TO_PLAIN.get(type(tensor))
    if plain is None:
        return False
    touched = tensor.__dict__.pop(_MARK, False)
    tensor.__class__ = plain
    return touched


def _plain(tensor: Any) -> Tensor:
    return _BASE.detach(tensor)


def watch_optimizers() -> Callable[[], None]:
    """Marks watched weights that an optimizer has stepped; returns the undo.

    Fused optimizers change weights without a version bump.
    """

    def mark(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if type(parameter) in WATCHED:
                    parameter.__dict__[_MARK] = True

    return register_optimizer_step_post_hook(mark).remove


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
