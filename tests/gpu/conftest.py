"""These run on a real GPU (``make test-gpu``) and are skipped where there is none.

``OFFLOAD_ENGINE_GPU_TESTS=sim`` runs them on the simulated accelerator instead, to test the tests.
They need torch, diffusers, transformers, numpy and pytest, and nothing installed beside.
"""

import contextlib
import gc
import os

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

WHERE = os.environ.get("OFFLOAD_ENGINE_GPU_TESTS", "cuda")
MIB = 2**20
WIDTH = 1024
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts


def why_not():
    if WHERE == "sim":
        from offload_engine import sim

        return sim.why_unavailable()
    return None if torch.cuda.is_available() else "torch finds no CUDA device here"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def real():
    """Whether the device is a real one."""
    return WHERE != "sim"


@pytest.fixture(scope="session")
def ready():
    """The device, warm: what libraries allocate once they have allocated."""
    if WHERE == "sim":
        from offload_engine import sim

        device = sim.load()
        torch.set_num_threads(1)
    else:
        device = torch.device("cuda", 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        part = Part(2).to(device, dtype)
        part(torch.ones(4, WIDTH, device=device, dtype=dtype)).sum().item()
    return device


@pytest.fixture
def device(ready):
    """The device, in deterministic settings, with nothing of earlier tests on it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch what is allocated
    torch.backends.cudnn.benchmark = False
    clean()
    yield ready
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = True
    clean()


def clean():
    gc.collect()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()


def allocated():
    gc.collect()
    torch.accelerator.synchronize()
    return torch.accelerator.memory_allocated()


def reserved():
    return torch.accelerator.memory_reserved()


class Peak:
    """The peak of allocated memory within its block, above what there was."""

    def __enter__(self):
        self._base = allocated()
        torch.accelerator.reset_peak_memory_stats()
        return self

    def __exit__(self, *exception):
        self.nbytes = torch.accelerator.max_memory_allocated() - self._base


@contextlib.contextmanager
def limited(device, nbytes):
    """Within, so many bytes more can be taken from the device by this process."""
    clean()
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((reserved() + nbytes) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    from offload_engine import sim

    sim.configure(capacity_nbytes=torch.accelerator.memory_allocated() + nbytes)
    try:
        yield
    finally:
        sim.configure(capacity_nbytes=64 * 2**30)


class Placed(nn.Module):
    """What pipelines ask of a component."""

    @property
    def nbytes(self):
        return sum(p.nbytes for p in self.parameters())

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def dtype(self):
        return next(self.parameters()).dtype


class Part(Placed, nn.Sequential):
    """Two linear layers that hold about so many MiB, in float32."""

    def __init__(self, mib):
        inner = mib * MIB // (2 * 4 * WIDTH)
        super().__init__(nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH))
        self.eval()

    def decode(self, x):
        return self(x)


class Pipe(DiffusionPipeline):
    """A pipeline that runs its parts in the order it is told."""

    model_cpu_offload_seq = "te->unet->unet_2->vae"

    def __init__(self, te, unet, unet_2, vae):
        super().__init__()
        self.register_modules(te=te, unet=unet, unet_2=unet_2, vae=vae)

    @torch.no_grad()
    def __call__(self, x, order="te unet unet unet vae", callback=None):
        x = x.to(self._execution_device)
        for name in order.split():
            part = getattr(self, name)
            x = torch.tanh(part.decode(x) if name == "vae" else part(x))
            if callback is not None:
                callback(name)
        x = x.cpu()
        self.maybe_free_model_hooks()
        return x


SIZES = {"te": 16, "unet": 64, "unet_2": 56, "vae": 24}  # MiB


@pytest.fixture
def pipe(device):
    torch.manual_seed(0)
    return Pipe(**{name: Part(mib) for name, mib in SIZES.items()})


@pytest.fixture
def x():
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def without_offload(pipe, x, device, **options):
    """What comes out when everything is on the device; the pipeline goes back to the host."""
    pipe.to(device)
    out = pipe(x, **options)
    pipe.to("cpu")
    clean()
    return out
