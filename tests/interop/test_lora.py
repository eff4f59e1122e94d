"""LoRA adapters, loaded by peft while the pipeline is attached: after each step the same bits as
on a pipeline that was never offloaded."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from accelerate.hooks import CpuOffload
from peft import LoraConfig, get_peft_model_state_dict

import offload_engine
from benchmarks.pipelines import modules

from .conftest import build, expected, is_hooked, on_device, run

ATTENTION = {"unet": ["to_q", "to_v"], "transformer": ["to_q", "to_v"]}
TEXT_ATTENTION = ["q_proj", "v_proj"]


class Setup(NamedTuple):
    pipeline: str
    components: tuple[str, ...]  # those with an adapter; the first is where fusing is watched


SETUPS = [
    Setup("sd15", ("unet", "text_encoder")),
    Setup("sdxl", ("unet", "text_encoder", "text_encoder_2")),
    Setup("flux", ("transformer", "text_encoder")),
]


class Step(NamedTuple):
    do: Callable
    is_like_new: bool = False  # whether the pipeline is then as before the adapter came


STEPS = {
    "load": Step(lambda pipe, lora: pipe.load_lora_weights(dict(lora), adapter_name="mine")),
    "scale": Step(lambda pipe, lora: pipe.set_adapters(["mine"], [0.5])),
    "fuse": Step(lambda pipe, lora: pipe.fuse_lora()),
    "unfuse": Step(lambda pipe, lora: pipe.unfuse_lora()),
    "disable": Step(lambda pipe, lora: pipe.disable_lora()),
    "enable": Step(lambda pipe, lora: pipe.enable_lora()),
    "fuse safely": Step(lambda pipe, lora: pipe.fuse_lora(safe_fusing=True, lora_scale=0.7)),
    "unfuse again": Step(lambda pipe, lora: pipe.unfuse_lora()),
    "unload": Step(lambda pipe, lora: pipe.unload_lora_weights()),
}


@functools.cache
def lora_of(setup):
    """A random adapter as load_lora_weights takes it, large enough to show."""
    pipe, draw, weights = build(setup.pipeline), torch.Generator().manual_seed(1), {}
    for name in setup.components:
        module = getattr(pipe, name)
        targets = ATTENTION.get(name, TEXT_ATTENTION)
        module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets), "mine")
        for key, value in get_peft_model_state_dict(module, adapter_name="mine").items():
            weights[f"{name}.{key}"] = 0.2 * torch.randn(value.shape, generator=draw)
    return weights


def bring(module):
    """Has the component resident, as in the middle of a call."""
    module._hf_hook.pre_forward(module)


@pytest.mark.parametrize("resident", [False, True], ids=["between calls", "while resident"])
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.pipeline)
def test_every_step_in_the_life_of_an_adapter_gives_the_same_bits(setup, resident):
    pipe, twin, lora = build(setup.pipeline), on_device(setup.pipeline), lora_of(setup)
    engine = offload_engine.attach(pipe)
    last = expected(setup.pipeline)
    for name, step in STEPS.items():
        if resident:
            watched = setup.components[0]
            bring(getattr(pipe, watched))
            assert engine.resident == (watched,)
        step.do(pipe, lora), step.do(twin, lora)
        out, want = run(pipe, setup.pipeline), run(twin, setup.pipeline)
        assert torch.equal(out, want), name
        assert not torch.equal(want, last), name  # each step shows, by rounding at least
        assert engine.resident == ()
        assert all(is_hooked(module) for module in modules(pipe).values())
        last = want


@pytest.mark.parametrize("safely", [False, True])
def test_a_fuse_while_resident_is_not_lost_by_the_eviction(safely):
    """`weight.data += delta` moves nothing and counts no version: only a watch can tell."""
    setup = SETUPS[0]
    pipe, twin, lora = build("sd15"), on_device(), lora_of(setup)
    engine = offload_engine.attach(pipe)
    for each in (pipe, twin):
        each.load_lora_weights(dict(lora), adapter_name="mine")
    for _ in range(3):
        for fuse in ("fuse_lora", "unfuse_lora"):
            options = {"safe_fusing": safely} if fuse == "fuse_lora" else {}
            bring(pipe.unet)
            getattr(pipe, fuse)(**options), getattr(twin, fuse)(**options)
            bring(pipe.vae)
            assert engine.resident == ("vae",)
            state, want = pipe.unet.state_dict(), twin.unet.state_dict()
            assert all(torch.equal(state[key], value.cpu()) for key, value in want.items())
            engine.release()
    assert torch.equal(run(pipe), run(twin))


def test_a_fuse_in_a_callback_takes_effect_with_the_next_step():
    setup = SETUPS[0]
    pipe, twin, lora = build("sd15"), on_device(), lora_of(setup)
    engine = offload_engine.attach(pipe)

    def fuse(pipe, step, timestep, tensors):
        if step == 0:
            pipe.fuse_lora(components=["unet"])
        return tensors

    for each in (pipe, twin):
        each.load_lora_weights(dict(lora), adapter_name="mine")
    assert torch.equal(run(pipe, callback_on_step_end=fuse), run(twin, callback_on_step_end=fuse))
    assert engine.resident == ()
    assert torch.equal(run(pipe), run(twin))


def test_an_adapter_that_cannot_be_loaded_leaves_the_pipeline_attached():
    """Upstream leaves it without its hooks."""
    pipe = build("sd15")
    engine = offload_engine.attach(pipe)
    with pytest.raises(IndexError):
        pipe.load_lora_weights({"unet.nonsense.lora_A.weight": torch.ones(4, 5)})
    for _ in range(2):
        assert torch.equal(run(pipe), expected())
        assert engine.resident == () and all(is_hooked(m) for m in modules(pipe).values())


def test_under_the_patch_loaders_find_the_hooks_they_know_and_put_the_engine_back():
    """They take off what is a CpuOffload, and call enable_model_cpu_offload at the end."""
    setup = SETUPS[0]
    pipe, twin, lora = build("sd15"), on_device(), lora_of(setup)
    embedding = {"<mine>": torch.randn(32, generator=torch.Generator().manual_seed(0))}
    with offload_engine.patch_diffusers():
        pipe.enable_model_cpu_offload(gpu_id=1)
        assert isinstance(pipe.unet._hf_hook, CpuOffload)
        for each in (pipe, twin):
            each.load_lora_weights(dict(lora), adapter_name="mine")
            each.load_textual_inversion(embedding)
        for _ in range(2):
            out, want = (run(each, prompt="a <mine> bird") for each in (pipe, twin))
            assert torch.equal(out, want)
            assert pipe._execution_device == torch.device("sim:1")
            assert type(pipe.unet._hf_hook).__module__.startswith("offload_engine")
        for each in (pipe, twin):
            each.unload_lora_weights(), each.unload_textual_inversion()
        assert torch.equal(run(pipe), run(twin))


def test_an_adapter_loaded_before_attaching_is_offloaded_with_its_component():
    setup = SETUPS[0]
    pipe, twin, lora = build("sd15"), on_device(), lora_of(setup)
    for each in (pipe, twin):
        each.load_lora_weights(dict(lora), adapter_name="mine")
    engine = offload_engine.attach(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe), run(twin))
    engine.detach()
    pipe.unload_lora_weights(), pipe.to("sim")
    assert torch.equal(run(pipe), expected())
