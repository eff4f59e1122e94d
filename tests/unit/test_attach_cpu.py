"""attach on device="cpu": the same hooks, no transfers. Bad input, and undoing."""

import copy
import pickle

import pytest
import torch
from torch import nn

import offload_engine
from offload_engine.errors import (
    ComponentError,
    DeviceError,
    OffloadError,
    PlanError,
    SequenceError,
)
from offload_engine.pipeline import _steps


def make():
    torch.manual_seed(0)
    return {"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4), nn.Tanh())}


def state_of(modules):
    return {
        name: (
            dict(m.__dict__["_forward_pre_hooks"]),
            sorted(k for k in m.__dict__ if k not in ("_forward_pre_hooks",)),
            [(id(p), p.data_ptr()) for p in m.parameters()],
        )
        for name, m in modules.items()
    }


def test_it_runs_records_and_detaches_without_a_trace():
    modules = make()
    before = state_of(modules)
    x = torch.randn(2, 4)
    expected = modules["b"](modules["a"](x))
    with offload_engine.attach(modules, "a->b", device="cpu") as engine:
        assert torch.equal(modules["b"](modules["a"](x)), expected)
        assert engine.resident == ("b",)
        assert engine.report().components["a"].uses == 1
        engine.release()
        assert engine.resident == ()
    assert state_of(modules) == before
    engine.detach()  # idempotent


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq": "a->c"}, SequenceError, "does not have: 'c'"),
        ({"seq": "a->"}, SequenceError, "a name is missing"),
        ({"seq": 3}, SequenceError, "text or a list"),
        ({}, SequenceError, "no model_cpu_offload_seq.*seq='text_encoder->unet->vae'"),
        ({"seq": "a->b", "device": "cuda"}, DeviceError, "'cuda' does not exist"),
        ({"seq": "a->b", "device": "cuda:3", "gpu_id": 0}, DeviceError, "Both gpu_id=0"),
        ({"seq": "a->b", "device": "nonsense"}, DeviceError, "is not a device"),
        ({"seq": "a->b", "device": None}, DeviceError, "device='cpu'.*simulated accelerator"),
        ({"seq": "a->b", "vram": "lots"}, OffloadError, "vram='lots'"),
        ({"seq": "a->b", "vram": 16}, PlanError, "16 bytes"),
        ({"seq": "a->b", "pin": "lots"}, OffloadError, "pin='lots'"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(arguments, error, message):
    modules = make()
    before = state_of(modules)
    with pytest.raises(error, match=message):
        offload_engine.attach(modules, **{"device": "cpu", **arguments})
    assert state_of(modules) == before


def test_no_accelerator_is_a_runtime_error_as_upstream():
    with pytest.raises(RuntimeError, match="no accelerator"):
        offload_engine.attach(make(), "a->b")


def test_what_has_no_components_is_refused():
    with pytest.raises(ComponentError, match="has no components"):
        offload_engine.attach(object(), device="cpu")


def test_a_component_on_meta_is_refused_by_name():
    modules = make()
    modules["c"] = nn.Linear(4, 4, device="meta")
    with pytest.raises(ComponentError, match="c has weights on the meta device") as error:
        offload_engine.attach(modules, "a->b->c", device="cpu")
    assert error.value.names == ("c",)


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({}, 50),
        ({"num_inference_steps": 7}, 7),
        ({"sigmas": [1.0, 0.5]}, 2),
        ({"timesteps": [9]}, 1),
    ],
)
def test_the_steps_of_a_call_are_those_it_is_asked_for(asked, steps):
    class Pipe:
        def __call__(self, x=None, num_inference_steps=50, timesteps=None, sigmas=None):
            pass

    assert _steps(Pipe, Pipe(), (), asked) == steps


def mount_of(module):
    return getattr(module.__dict__.get("_hf_hook"), "owner", None)


def test_a_copy_and_a_pickle_of_a_component_are_free_of_the_engine():
    modules = make()
    x = torch.randn(2, 4)
    with offload_engine.attach(modules, "a->b", device="cpu"):
        expected = modules["b"](x)
        for other in (copy.deepcopy(modules["b"]), pickle.loads(pickle.dumps(modules["b"]))):
            meter = mount_of(modules["b"]).walker.meter
            uses = len(meter.marks)
            assert torch.equal(other(x), expected)
            assert mount_of(other) is None
            assert len(meter.marks) == uses


def test_attaching_again_replaces():
    class Pipe:
        model_cpu_offload_seq = "a->b"

        def __init__(self):
            self.components = make()

        def __call__(self, x):
            return self.components["b"](self.components["a"](x))

    pipe = Pipe()
    first = offload_engine.attach(pipe, device="cpu")
    second = offload_engine.attach(pipe, device="cpu")
    assert type(pipe).__name__ == "Pipe"
    pipe(torch.randn(1, 4))
    assert second.report().components["b"].uses == 1
    first.detach()
    pipe(torch.randn(1, 4))
    assert second.report().components["b"].uses == 1
    second.detach()
    assert type(pipe) is Pipe
    assert not hasattr(pipe.components["a"], "_hf_hook")


def test_the_signature_of_an_attached_method_is_the_original():
    import inspect

    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def decode(self, z: torch.Tensor, return_dict: bool = True):
            return self.linear(z)

    coder = Coder()
    before = inspect.signature(coder.decode)
    with offload_engine.attach({"vae": coder}, "vae", device="cpu") as engine:
        assert inspect.signature(coder.decode) == before
        coder.decode(torch.randn(1, 4))
        assert engine.resident == ("vae",)
    assert "decode" not in coder.__dict__
