"""A pipeline in miniature: a real class whose call runs the parts that it is told to run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from offload_engine import sim

WIDTHS = {"te": 96, "te2": 160, "controlnet": 256, "unet": 512, "vae": 128}


class Part(nn.Module):
    """About ``width`` times 520 bytes of weights; per row of its input it needs room for that and
    ``scratch`` numbers more; it takes ``seconds`` beside what the simulator charges."""

    def __init__(self, width, scratch=0, seconds=0.0):
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 64)
        self.scratch, self.seconds = scratch, seconds

    @property
    def device(self):
        return self.up.weight.device

    @property
    def dtype(self):
        return self.up.weight.dtype

    def forward(self, x):
        if self.seconds:
            sim.spend(self.seconds)
        x = x.to(self.dtype)
        zeros = x.new_zeros(len(x), self.scratch)
        return torch.tanh(self.down(self.up(x)) + zeros.sum())


class Miniature(DiffusionPipeline):
    """Runs ``first``, then ``loop`` once per step, then ``last``."""

    model_cpu_offload_seq = "te->te2->controlnet->unet->vae"
    _optional_components = ("te", "te2", "controlnet", "unet", "vae")

    def __init__(self, te, te2, controlnet, unet, vae):
        super().__init__()
        self.register_modules(te=te, te2=te2, controlnet=controlnet, unet=unet, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        x,
        first="te te2",
        loop="unet",
        last="vae",
        num_inference_steps=4,
        output_type="host",
        on_step=None,
    ):
        x = x.to(self._execution_device)
        for name in first.split():
            x = getattr(self, name)(x)
        for step in range(num_inference_steps):
            for name in loop.split():
                x = getattr(self, name)(x)
            if on_step is not None:
                on_step(self, step)
        for name in last.split():
            x = getattr(self, name)(x)
        self.maybe_free_model_hooks()
        return x.cpu() if output_type == "host" else x


def make(widths=None, scratch=None, seconds=None, seed=0):
    """A `Miniature`; ``widths``, ``scratch`` and ``seconds`` by part, see `Part`."""
    torch.manual_seed(seed)
    parts = {
        name: Part(width, (scratch or {}).get(name, 0), (seconds or {}).get(name, 0.0)).eval()
        for name, width in {**WIDTHS, **(widths or {})}.items()
    }
    return Miniature(**parts)


def noise(rows=4):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))


class Call(NamedTuple):
    """One call, as it was measured from outside."""

    output: torch.Tensor
    seconds: float  # simulated, from an idle device to an idle device
    moved: sim.Counters
    peak_nbytes: int  # since the peak was reset last


def measured(call):
    """`Call` of what ``call`` does, with its result on the host."""
    torch.accelerator.synchronize()
    counters, began = sim.counters(), sim.now()
    output = torch.as_tensor(call()).cpu()
    torch.accelerator.synchronize()
    peak_nbytes = torch.accelerator.max_memory_allocated()
    return Call(output, sim.now() - began, sim.counters().since(counters), peak_nbytes)


def unoffloaded(pipe, *args, **kwargs):
    """A call of ``pipe``, all of it on the device; after it on the host again."""
    device = torch.accelerator.current_accelerator()
    pipe.to(f"{device.type}:0")
    torch.accelerator.reset_peak_memory_stats()
    result = measured(lambda: pipe(*args, **kwargs))
    pipe.to("cpu")
    return result


def untouched(pipe):
    """Whether ``pipe`` is as if nobody had ever tried to attach to it."""
    parts = [part for part in pipe.components.values() if part is not None]
    modules = [module for part in parts for module in part.modules()]
    tensors = [tensor for part in parts for tensor in part.parameters()]
    return (
        not any("_hf_hook" in m.__dict__ or "forward" in m.__dict__ for m in modules)
        and not any(m._forward_pre_hooks or m._forward_hooks for m in modules)
        and not any(t.is_pinned() or t.device.type != "cpu" for t in tensors)
        and "_offload_engine" not in pipe.__dict__
        and type(pipe).__dict__.get("_offload_original") is None
    )
