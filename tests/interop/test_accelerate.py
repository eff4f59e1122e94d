"""The engine and accelerate in one process: each hands over to the other without a trace."""

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, remove_hook_from_module
from diffusers import ComponentsManager, DiffusionPipeline, StableDiffusionPipeline

import offload_engine
from benchmarks.pipelines import PIPELINES, modules
from offload_engine.errors import ComponentError

from .conftest import build, expected, is_hooked, places, run

each_kind = pytest.mark.parametrize("kind", ["model", "sequential"])


@pytest.fixture
def pipe():
    return build("sd15")


def unet_inputs(device="cpu"):
    return torch.ones(1, 4, 16, 16, device=device), 1, torch.ones(1, 7, 32, device=device)


def offload_groups(module):
    module.enable_group_offload(
        onload_device=torch.device("sim"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def is_free_of(pipe):
    """Whether nothing of the engine is left on ``pipe``."""
    return (
        type(pipe) is StableDiffusionPipeline
        and not any(is_hooked(module) for module in modules(pipe).values())
        and not any(module._forward_pre_hooks for module in modules(pipe).values())
    )


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_apply_forward_hook_of_diffusers_finds_its_hook(pipe, method):
    """With accelerate here, vae.decode itself fires _hf_hook.pre_forward."""
    engine = offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    bare = getattr(type(pipe.vae), method)  # not the engine's wrapper on the instance
    x = torch.ones(1, 4, 8, 8) if method == "decode" else torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        bare(pipe.vae, x.to("sim"))
    assert engine.resident == ("vae",)


@each_kind
def test_attaching_takes_over_from_accelerate(pipe, kind):
    getattr(pipe, f"enable_{kind}_cpu_offload")(device="sim")
    run(pipe)
    engine = offload_engine.attach(pipe)
    assert not any(p.is_meta for m in modules(pipe).values() for p in m.parameters())
    assert not any("_old_forward" in vars(m) for m in modules(pipe).values())
    for _ in range(2):
        assert torch.equal(run(pipe), expected())
        assert engine.resident == () and set(places(pipe).values()) == {"cpu"}
    engine.detach()
    pipe.to("sim")
    assert torch.equal(run(pipe), expected())


@each_kind
@pytest.mark.parametrize("resident", [False, True], ids=["on the host", "on the device"])
def test_accelerate_takes_over_from_the_engine_and_back(pipe, kind, resident):
    engine = offload_engine.attach(pipe)
    if resident:
        pipe.unet(*unet_inputs())
    getattr(pipe, f"enable_{kind}_cpu_offload")(device="sim")
    assert "detached" in repr(engine) and type(pipe) is StableDiffusionPipeline
    assert all(type(m._hf_hook).__module__ == "accelerate.hooks" for m in modules(pipe).values())
    for _ in range(2):
        assert torch.equal(run(pipe), expected())
        assert engine.resident == ()
    again = offload_engine.attach(pipe)
    assert torch.equal(run(pipe), expected()) and again.resident == ()


def test_remove_all_hooks_detaches(pipe):
    engine = offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    pipe.remove_all_hooks()
    assert is_free_of(pipe) and engine.resident == () and pipe._all_hooks == []
    pipe.to("sim")
    assert torch.equal(run(pipe), expected())


def test_accelerates_own_removal_of_a_hook_detaches(pipe):
    offload_engine.attach(pipe)
    pipe.unet(*unet_inputs())
    remove_hook_from_module(pipe.unet, recurse=True)
    assert is_free_of(pipe) and set(places(pipe).values()) == {"cpu"}
    offload_engine.attach(pipe)
    DiffusionPipeline.remove_all_hooks(pipe)  # upstream's own, not the engine's
    assert is_free_of(pipe)
    pipe.to("sim")
    assert torch.equal(run(pipe), expected())


def test_a_hook_of_accelerate_on_one_component_is_replaced(pipe):
    cpu_offload_with_hook(pipe.vae, "sim")
    assert isinstance(pipe.vae._hf_hook, CpuOffload)
    offload_engine.attach(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe), expected())
        assert set(places(pipe).values()) == {"cpu"}


def test_the_hooks_of_accelerate_on_a_plain_mapping_are_refused_with_what_to_do(pipe):
    cpu_offload_with_hook(pipe.vae, "sim")
    parts = {"unet": pipe.unet, "vae": pipe.vae}
    with pytest.raises(ComponentError, match="remove_hook_from_module") as error:
        offload_engine.attach(parts, "unet->vae")
    assert error.value.names == ("vae",)
    assert not is_hooked(pipe.unet) and isinstance(pipe.vae._hf_hook, CpuOffload)


def test_the_undone_patch_gives_accelerate_back(pipe):
    with offload_engine.patch_diffusers():
        pass
    pipe.enable_model_cpu_offload(device="sim")
    assert isinstance(pipe.unet._hf_hook, CpuOffload)
    assert torch.equal(run(pipe), expected())


def test_a_failed_attempt_leaves_the_offload_of_accelerate_in_force(pipe):
    """On purpose: upstream removes the hooks before it looks at the device."""
    pipe.enable_model_cpu_offload(device="sim")
    with pytest.raises(ValueError, match="does not exist"):
        offload_engine.attach(pipe, gpu_id=7)
    assert isinstance(pipe.unet._hf_hook, CpuOffload)
    assert torch.equal(run(pipe), expected())


# ---- group offload


def test_a_group_offloaded_component_is_refused(pipe):
    offload_groups(pipe.unet)
    with pytest.raises(ValueError, match="Group offloading is active on unet"):
        offload_engine.attach(pipe)
    assert type(pipe) is StableDiffusionPipeline


def test_group_offload_enabled_on_an_attached_component_is_refused_at_the_next_call(pipe):
    """Upstream refuses it at once, but only next to hooks of accelerate's own classes."""
    engine = offload_engine.attach(pipe)
    offload_groups(pipe.unet)
    with pytest.raises(ValueError, match=r"Group offloading .* unet"):
        run(pipe)
    assert engine.resident == ()


def test_under_the_patch_group_offload_is_refused_at_once_as_upstream(pipe):
    with offload_engine.patch_diffusers():
        pipe.enable_model_cpu_offload()
        with pytest.raises(ValueError, match="Cannot apply group offloading"):
            offload_groups(pipe.unet)
        assert torch.equal(run(pipe), expected())


def test_group_offload_is_possible_after_a_detach(pipe):
    offload_engine.attach(pipe).detach()
    offload_groups(pipe)
    assert torch.equal(run(pipe), expected())


# ---- ComponentsManager


@pytest.fixture
def managed():
    pipe, manager = build("modular_flux"), ComponentsManager()
    for name, module in modules(pipe).items():
        manager.add(name, module)
    return pipe, manager


def test_a_components_manager_that_offloads_is_refused_until_it_is_switched_off(managed):
    pipe, manager = managed
    case = PIPELINES["modular_flux"]
    manager.enable_auto_cpu_offload(device="sim:0")
    with pytest.raises(ComponentError, match="disable_auto_cpu_offload"):
        offload_engine.attach(pipe, case.seq)
    assert torch.equal(run(pipe, case.name), expected(case.name))
    manager.disable_auto_cpu_offload()
    engine = offload_engine.attach(pipe, case.seq)
    assert torch.equal(run(pipe, case.name), expected(case.name))
    assert engine.resident == ()


def test_a_components_manager_takes_over(managed):
    pipe, manager = managed
    case = PIPELINES["modular_flux"]
    engine = offload_engine.attach(pipe, case.seq)
    run(pipe, case.name)
    manager.enable_auto_cpu_offload(device="sim:0")
    assert "detached" in repr(engine)
    assert torch.equal(run(pipe, case.name), expected(case.name))
