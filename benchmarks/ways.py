"""The ways to run a pipeline that are compared: one word for each, and how to set it up."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import offload_engine
from offload_engine import Engine
from offload_engine.hooks import to_device


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The components of ``pipe`` that are modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


Way = Callable[..., "Placed"]  # (pipe, device, seq=None)


@dataclass(frozen=True)
class Placed:
    """A pipeline that is ready to run in one of the ways."""

    detach: Callable[[], None]  # undoes it; the weights are on the host then
    engine: Engine | None = None


def resident(pipe: Any, device: torch.device, seq: str | None = None) -> Placed:
    """No offload: everything on the device."""
    pipe.to(device)
    return Placed(functools.partial(pipe.to, "cpu"))


def accelerate(pipe: Any, device: torch.device, seq: str | None = None) -> Placed:
    """diffusers' own model offload."""
    pipe.enable_model_cpu_offload(device=device)

    def detach() -> None:
        pipe.remove_all_hooks()
        pipe.to("cpu")

    return Placed(detach)


def engine(pipe: Any, device: torch.device, seq: str | None = None) -> Placed:
    """This engine, in chain mode."""
    attached = offload_engine.attach(pipe, seq, device=device)
    return Placed(attached.detach, attached)


def budgeted(
    pipe: Any,
    device: torch.device,
    seq: str | None = None,
    *,
    vram: Callable[[int], int],
) -> Placed:
    """This engine with a budget: ``vram`` tells it from the bytes of the weights."""
    weights = sum(t.nbytes for m in modules(pipe).values() for t in m.state_dict().values())
    attached = offload_engine.attach(pipe, seq, device=device, vram=vram(weights))
    return Placed(attached.detach, attached)


def sequential(pipe: Any, device: torch.device, seq: str | None = None) -> Placed:
    """accelerate's offload of every module on its own."""
    pipe.enable_sequential_cpu_offload(device=device)
    return Placed(pipe.remove_all_hooks)


def group_offload(
    pipe: Any, device: torch.device, seq: str | None = None, *, record_stream: bool = False
) -> Placed:
    """diffusers' group offload, block by block with a copy stream."""
    pipe.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=record_stream,
    )
    return Placed(lambda: None)


class PinnedChain:
    """The plainest chain that copies nothing back: pinned masters, tensor by tensor, and before a
    component runs the one before it is dropped. It trusts that no weight ever changes."""

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.device = device
        self._masters: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._here: nn.Module | None = None
        self._undo: list[Callable[[], Any]] = []
        for module in modules(pipe).values():
            self._add(module)
        pipe.maybe_free_model_hooks = self.leave
        self._undo.append(lambda: pipe.__dict__.pop("maybe_free_model_hooks"))

    def _add(self, module: nn.Module) -> None:
        tensors = {id(t): t for t in chain(module.parameters(), module.buffers())}
        self._masters[module] = [(t, _pin(t)) for t in tensors.values()]
        self._undo.append(
            module.register_forward_pre_hook(
                lambda module, args, kwargs: self._enter(module, args, kwargs), with_kwargs=True
            ).remove
        )
        module.__dict__["_hf_hook"] = SimpleNamespace(execution_device=self.device)
        self._undo.append(functools.partial(module.__dict__.pop, "_hf_hook"))
        for name in ("encode", "decode"):
            if hasattr(module, name):
                module.__dict__[name] = self._before(module, getattr(module, name))
                self._undo.append(functools.partial(module.__dict__.pop, name))

    def _before(self, module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._enter(module, args, kwargs)
            return method(*args, **kwargs)

        return entered

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._here is not module:
            self.leave()
            for tensor, master in self._masters[module]:
                tensor.data = master.to(self.device, non_blocking=True)
            self._here = module
        return to_device(args, self.device), to_device(kwargs, self.device)

    def leave(self) -> None:
        """Drops what is on the device; the work that uses it is ahead on the same stream."""
        if self._here is not None:
            for tensor, master in self._masters[self._here]:
                tensor.data = master
        self._here = None

    def detach(self) -> None:
        """The weights in ordinary memory, no hooks."""
        self.leave()
        torch.accelerator.synchronize()
        while self._undo:
            self._undo.pop()()
        for masters in self._masters.values():
            for tensor, master in masters:
                tensor.data = master.clone()
        self._masters.clear()


def _pin(tensor: Tensor) -> Tensor:
    tensor.data = tensor.data.pin_memory()
    return tensor.data


def pinned_chain(pipe: Any, device: torch.device, seq: str | None = None) -> Placed:
    """See PinnedChain."""
    return Placed(PinnedChain(pipe, device).detach)


WAYS: dict[str, Way] = {
    "no offload": resident,
    "accelerate": accelerate,
    "this engine": engine,
    "pinned chain": pinned_chain,
    "sequential": sequential,
    "group offload": group_offload,
    "group, recording": functools.partial(group_offload, record_stream=True),
    "this engine, 35%": functools.partial(budgeted, vram=lambda weights: int(0.35 * weights)),
    "this engine, 70%": functools.partial(budgeted, vram=lambda weights: int(0.7 * weights)),
}


def why_missing(way: str) -> str | None:
    """Why ``way`` cannot be had here; None where it can."""
    needs = ("accelerate", "sequential", "group offload", "group, recording")
    if way in needs and importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed"
    return None
