"""What diffusers' and accelerate's own tests ask of model offload, asked of the engine: attached,
and in the place of enable_model_cpu_offload."""

import inspect
import logging

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import nn

import offload_engine
from benchmarks.pipelines import modules

from .conftest import build, expected, is_hooked, on_device, places, run

PIPELINES = ["sd15", "sd15_safety_checker", "sdxl", "sd3", "flux", "wan_t2v", "stable_audio"]


def attach(pipe, **arguments):
    offload_engine.attach(pipe, **arguments)


def patched(pipe, **arguments):
    with offload_engine.patch_diffusers():
        pipe.enable_model_cpu_offload(**arguments)


each_way = pytest.mark.parametrize("offload", [attach, patched])


def check_all_is_on_the_host(pipe):
    for name, module in modules(pipe).items():
        if name not in pipe._exclude_from_cpu_offload:
            assert places(pipe)[name] == "cpu", name
            assert is_hooked(module), name


@each_way
@pytest.mark.parametrize("name", PIPELINES)
def test_an_offloaded_call_gives_the_same_and_leaves_all_on_the_host(name, offload):
    pipe = build(name)
    offload(pipe, device="sim")
    assert pipe._execution_device.type == "sim"
    assert torch.equal(run(pipe, name), expected(name))
    check_all_is_on_the_host(pipe)


@each_way
@pytest.mark.parametrize("name", PIPELINES)
def test_enabled_run_enabled_and_run_again_is_the_same(name, offload):
    pipe = build(name)
    for _ in range(2):
        offload(pipe, device="sim")
        assert torch.equal(run(pipe, name), expected(name))
        check_all_is_on_the_host(pipe)


@each_way
def test_a_pipeline_made_from_another_runs_offloaded_and_leaves_the_first_as_it_was(offload):
    first, other = build("sd15"), on_device()
    state = {key: value.clone() for key, value in first.unet.state_dict().items()}
    config = dict(first.config)
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    offload(second, device="sim")
    want = run(StableDiffusionImg2ImgPipeline.from_pipe(other), "sd15_img2img")
    assert torch.equal(run(second, "sd15_img2img"), want)
    check_all_is_on_the_host(second)
    third = StableDiffusionPipeline.from_pipe(second)
    offload(third, device="sim")
    assert torch.equal(run(third), expected())
    assert dict(first.config) == config
    assert all(torch.equal(first.unet.state_dict()[key], value) for key, value in state.items())


@each_way
def test_the_index_that_was_given_stays_in_force(offload):
    pipe = build("sd15")
    offload(pipe, gpu_id=1)
    for _ in range(2):
        assert pipe._offload_gpu_id == 1
        assert pipe._offload_device == pipe._execution_device == torch.device("sim:1")
        pipe.maybe_free_model_hooks()
    run(pipe)
    assert pipe._offload_gpu_id == 1


@each_way
def test_moving_an_offloaded_pipeline_warns_and_not_one_that_is_no_longer(offload, caplog):
    pipe = build("sd15")
    offload(pipe, device="sim")
    with caplog.at_level(logging.WARNING):
        pipe.to("sim")
    assert "offloaded" in caplog.text
    caplog.clear()
    pipe.remove_all_hooks()
    pipe.to("sim")
    assert "offloaded" not in caplog.text
    assert torch.equal(run(pipe), expected())


class ModelForTest(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.batchnorm, self.linear2 = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 5),
        )

    def forward(self, x, *, scale=1.0):
        """The doc."""
        return scale * self.linear2(self.batchnorm(self.linear1(x)))


def test_models_come_lazily_evict_the_previous_and_take_inputs_from_the_host():
    one, two = ModelForTest().eval(), ModelForTest().eval()
    signature = inspect.signature(one.forward)
    engine = offload_engine.attach({"one": one, "two": two}, "one->two")
    assert {p.device.type for m in (one, two) for p in m.parameters()} == {"cpu"}
    x = torch.ones(2, 3)
    for model, other in ((one, two), (two, one)):
        out = model(x, scale=2.0)
        assert out.device.type == model.linear1.weight.device.type == "sim"
        assert other.linear1.weight.device.type == "cpu"
    assert inspect.signature(one.forward) == signature and one.forward.__doc__ == "The doc."
    engine.release()
    assert two.linear1.weight.device.type == "cpu"
    engine.detach()
    assert two(x).device.type == "cpu"
