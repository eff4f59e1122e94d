"""``torch.sim``: the module that torch and its users expect of a device type.

Most of it is torch.accelerator under the names that torch.cuda uses.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

_Device = torch.device | str | int | None


def register() -> None:
    """Install the kernels, name the device type ``sim``, and provide ``torch.sim``."""
    torch.utils.rename_privateuse1_backend("sim")
    torch.ops.offload_engine_sim.install()
    torch._register_device_module("sim", _module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _index(device: _Device) -> int:
    if isinstance(device, str):
        device = torch.device(device)
    index = device.index if isinstance(device, torch.device) else device
    return torch.accelerator.current_device_index() if index is None else index


def _generator(device: _Device = None) -> torch.Generator:
    return torch.default_generator  # which the default generators of both devices share


def _manual_seed(seed: int) -> None:
    _generator().manual_seed(seed)


def _get_rng_state(device: _Device = "sim") -> torch.Tensor:
    return _generator(device).get_state()


def _set_rng_state(state: torch.Tensor, device: _Device = "sim") -> None:
    _generator(device).set_state(state)


@contextlib.contextmanager
def _stream(stream: torch.Stream | None) -> Iterator[None]:
    with stream if stream is not None else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _device(device: _Device) -> Iterator[None]:
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(_index(device))
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


def _memory_info(device: _Device = None) -> tuple[int, int]:
    free, total = torch.ops.offload_engine_sim.memory_info(_index(device))
    return free, total


def _properties(device: _Device = None) -> types.SimpleNamespace:
    _, total = _memory_info(device)
    return types.SimpleNamespace(name="Simulated accelerator", total_memory=total)


def _module() -> types.ModuleType:
    accelerator: Any = torch.accelerator
    module = types.ModuleType("torch.sim", __doc__)
    members = {
        "Stream": torch.Stream,
        "Event": torch.Event,
        "stream": _stream,
        "device": _device,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 2,
        "current_device": accelerator.current_device_index,
        "set_device": accelerator.set_device_index,
        "current_stream": accelerator.current_stream,
        "set_stream": accelerator.set_stream,
        "synchronize": accelerator.synchronize,
        "get_device_name": lambda device=None: _properties(device).name,
        "get_device_properties": _properties,
        "memory_allocated": accelerator.memory_allocated,
        "max_memory_allocated": accelerator.max_memory_allocated,
        "memory_reserved": accelerator.memory_reserved,
        "max_memory_reserved": accelerator.max_memory_reserved,
        "memory_stats": accelerator.memory_stats,
        "reset_peak_memory_stats": accelerator.reset_peak_memory_stats,
        "mem_get_info": _memory_info,
        "empty_cache": accelerator.empty_cache,
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "is_bf16_supported": lambda: True,
    }
    for name, member in members.items():
        setattr(module, name, member)
    return module
